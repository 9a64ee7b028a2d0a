import { open, readFile, stat } from 'node:fs/promises';
import { readSync, openSync, closeSync } from 'node:fs';
import { basename } from 'node:path';
import { badInput, badUsage } from '../base/errors.js';
import { ioError } from '../base/files.js';

/** A stretch of text; `begins` when a document starts with it. */
export interface Piece {
  readonly text: string;
  readonly begins: boolean;
}

/** Text of one origin (a .txt file; one kind of document of a .jsonl file), addressed by fractions of its length. */
export interface TextSource {
  readonly name: string;
  /** Pieces from fraction `a` to fraction `b` of the source, lazily: a reader that has enough stops early. */
  from(a: number, b: number): Iterable<Piece>;
}

/** Errors: kind 'input' for files that are missing, empty, no UTF-8 or no valid .jsonl. */
export async function openSources(paths: readonly string[]): Promise<TextSource[]> {
  const sources: TextSource[] = [];
  for (const path of paths) {
    if (/\.jsonl$/i.test(path)) sources.push(...(await documents(path)));
    else if (/\.(txt|text|md)$/i.test(path)) sources.push(await textFile(path));
    else {
      throw badUsage('A calibration file must be .txt, .md or .jsonl', {
        where: path,
        hint: 'A .jsonl file has one {"text": "..."} a line; rename the file after what it holds.',
      });
    }
  }
  return sources;
}

const pieceBytes = 8192;

async function textFile(path: string): Promise<TextSource> {
  let size: number;
  try {
    const handle = await open(path, 'r');
    size = (await handle.stat()).size;
    await handle.close();
  } catch (error) {
    throw ioError(error, 'read the calibration text', path);
  }
  if (size === 0) throw badInput('A calibration file is empty', { where: path });
  return { name: basename(path), from: (a, b) => stretch(path, Math.floor(a * size), Math.floor(b * size)) };
}

/** Bytes [from, to) of a file as text, from the first line break (or space, or character) at or after `from`. */
function* stretch(path: string, from: number, to: number): Generator<Piece> {
  const fd = openSync(path, 'r');
  try {
    let at = from;
    let carry = Buffer.alloc(0);
    let first = true;
    while (at < to) {
      const chunk = Buffer.alloc(Math.min(pieceBytes, to - at));
      const got = readSync(fd, chunk, 0, chunk.length, at);
      if (got === 0) break;
      at += got;
      let bytes = Buffer.concat([carry, chunk.subarray(0, got)]);
      if (first && from > 0) bytes = bytes.subarray(startOfText(bytes));
      const whole = at < to ? cutAtSpace(bytes) : lastCharacter(bytes);
      carry = bytes.subarray(whole);
      const text = decode(bytes.subarray(0, whole), path, at);
      if (text.length > 0) yield { text, begins: first && from === 0 };
      first = false;
    }
  } finally {
    closeSync(fd);
  }
}

const isContinuation = (byte: number | undefined): boolean => byte !== undefined && (byte & 0xc0) === 0x80;

/** Where a window may begin: after a line break in the first 400 bytes, else after a space, else at a character. */
function startOfText(bytes: Buffer): number {
  const near = bytes.subarray(0, 400);
  const line = near.indexOf(0x0a);
  if (line !== -1) return line + 1;
  const space = near.indexOf(0x20);
  if (space !== -1) return space + 1;
  let at = 0;
  while (isContinuation(bytes[at])) at++;
  return at;
}

/** Length of the part that ends before a space or line break, so that pieces meet between words. */
function cutAtSpace(bytes: Buffer): number {
  for (let at = bytes.length - 1; at > bytes.length / 2; at--) {
    if (bytes[at] === 0x0a || bytes[at] === 0x20) return at;
  }
  return lastCharacter(bytes);
}

/** Length of the part that ends with a whole UTF-8 character. */
function lastCharacter(bytes: Buffer): number {
  let at = bytes.length - 1;
  while (at > 0 && at > bytes.length - 4 && isContinuation(bytes[at])) at--;
  const lead = bytes[at] ?? 0;
  const need = lead >= 0xf0 ? 4 : lead >= 0xe0 ? 3 : lead >= 0xc0 ? 2 : 1;
  return at + need <= bytes.length ? bytes.length : at;
}

const utf8 = new TextDecoder('utf-8', { fatal: true });

function decode(bytes: Buffer, path: string, near: number): string {
  try {
    return utf8.decode(bytes);
  } catch (cause) {
    throw badInput('A calibration file is not UTF-8 text', { where: `${path}, before byte ${near}`, cause });
  }
}

/** One source for each `kind` (or `language`) that the documents name. */
async function documents(path: string): Promise<TextSource[]> {
  let content: string;
  try {
    if ((await stat(path)).size > 2 ** 29) {
      throw badInput('The .jsonl file is too large', { where: path, expected: 'at most 512 MB', hint: 'Use .txt, which is read in parts.' }); // prettier-ignore
    }
    content = await readFile(path, 'utf8');
  } catch (error) {
    throw ioError(error, 'read the calibration text', path);
  }
  const kinds = new Map<string, string[]>();
  for (const [i, line] of content.split('\n').entries()) {
    if (line.trim() === '') continue;
    const { text, kind } = parseLine(line, `${path}, line ${i + 1}`);
    if (text === '') continue;
    const list = kinds.get(kind);
    if (list) list.push(text);
    else kinds.set(kind, [text]);
  }
  if (kinds.size === 0) throw badInput('A calibration file holds no text', { where: path });
  return [...kinds].map(([kind, texts]) => {
    const name = kinds.size === 1 ? basename(path) : `${basename(path)}:${kind === '' ? 'other' : kind}`;
    return { name, from: (a: number, b: number) => someOf(texts, a, b) };
  });
}

function parseLine(line: string, where: string): { text: string; kind: string } {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (cause) {
    throw badInput('A calibration line is no JSON', { where, cause, got: (cause as Error).message });
  }
  const { text, kind, language } = (value ?? {}) as Record<string, unknown>;
  if (typeof text !== 'string') {
    throw badInput('A calibration line has no text', { where, expected: '{"text": "..."}', got: line.slice(0, 60) });
  }
  const named = [kind, language].find((name) => typeof name === 'string');
  return { text, kind: named ?? '' };
}

/** Whole documents, from the one at fraction `a` on. */
function* someOf(texts: readonly string[], a: number, b: number): Generator<Piece> {
  const last = b >= 1 ? texts.length : Math.floor(b * texts.length);
  for (let i = Math.floor(a * texts.length); i < last; i++) yield { text: texts[i]!, begins: true };
}
