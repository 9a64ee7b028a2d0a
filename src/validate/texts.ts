import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile, readdir } from 'node:fs/promises';
import { basename, join } from 'node:path';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';
import type { JobEnv } from '../backend/env.js';
import { calibrationTokens, defaultCalibrationFolder } from '../arch/calibration.js';
import type { OpenModel } from '../arch/open.js';
import { openSources } from '../arch/text-sources.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';

/** Windows of one text, all of one length: tokens [n, length], row by row. */
export interface Windows {
  readonly name: string;
  readonly tokens: Int32Array;
  readonly n: number;
  readonly length: number;
  readonly sha256: string;
}

/** Files that are compared on when none are named: the part of the tool's own texts that nothing is calibrated on. */
export async function defaultTexts(): Promise<{ files: string[]; note: string | undefined }> {
  const list = async (folder: string): Promise<string[]> => {
    const names = await readdir(folder).catch(() => [] as string[]);
    return names
      .filter((name) => name.endsWith('.jsonl'))
      .sort()
      .map((name) => join(folder, name));
  };
  const heldOut = await list(join(defaultCalibrationFolder, 'held-out'));
  if (heldOut.length > 0) return { files: heldOut, note: undefined };
  const files = await list(defaultCalibrationFolder);
  if (files.length === 0) {
    throw badInput('The texts that come with the tool are missing', {
      where: defaultCalibrationFolder,
      hint: 'Name texts to compare on: --text file.txt',
    });
  }
  return {
    files,
    note: 'Compared on the calibration texts themselves: name others with --text for a stricter result.',
  };
}

/**
 * Token windows, `samples` in all, spread evenly over the texts and over the length of each. A text that is too short
 * gives what it has.
 * Errors: as `calibrationTokens`.
 */
export async function readWindows(
  open: OpenModel,
  files: readonly string[],
  { samples, seqLen, seed }: { readonly samples: number; readonly seqLen: number; readonly seed: number },
  env: JobEnv,
): Promise<Windows[]> {
  const windows: Windows[] = [];
  for (const [i, file] of files.entries()) {
    const share = Math.floor(samples / files.length) + (i < samples % files.length ? 1 : 0);
    if (share === 0) continue;
    const set = await calibrationTokens(open, { source: [file], samples: share, seqLen, seed }, env);
    windows.push({
      name: basename(file),
      tokens: set.tokens,
      n: set.n,
      length: set.seqLen,
      sha256: await hashOf(file),
    });
  }
  const tokens = windows.reduce((total, { n, length }) => total + n * (length - 1), 0);
  if (tokens < 16) {
    throw badInput('Too little text to compare two models on', {
      where: files.join(', '),
      got: `${tokens + windows.length} tokens`,
      hint: 'Name more: --text file.txt (several thousand tokens give steady numbers).',
    });
  }
  return windows.filter(({ length }) => length > 1);
}

async function hashOf(path: string): Promise<string> {
  const hash = createHash('sha256');
  try {
    for await (const part of createReadStream(path)) hash.update(part as Buffer);
  } catch (error) {
    throw ioError(error, 'read the text', path);
  }
  return hash.digest('hex');
}

/** The first stretch of each text, for comparing tokenizers: at most `characters` of each source. */
export async function excerpts(
  files: readonly string[],
  characters = 60_000,
): Promise<{ readonly name: string; readonly text: string }[]> {
  return (await openSources(files)).map((source) => {
    let text = '';
    for (const piece of source.from(0, 1)) {
      text += piece.text;
      if (text.length >= characters) break;
    }
    return { name: source.name, text: text.slice(0, characters) };
  });
}

export interface Prompt {
  readonly text: string;
  readonly ids: Int32Array;
}

/**
 * Prompts for generations: the lines of a .txt file, "prompt" or "text" of a .jsonl file; by default stretches of
 * the windows.
 */
export async function readPrompts(
  tokenizer: Tokenizer,
  windows: readonly Windows[],
  {
    count,
    file,
    bosId,
    length = 16,
  }: {
    readonly count: number;
    readonly file?: string | undefined;
    readonly bosId: number | undefined;
    readonly length?: number;
  },
): Promise<Prompt[]> {
  if (file !== undefined) {
    const lines = await promptLines(file);
    return Promise.all(
      lines.slice(0, count).map(async (text) => ({ text, ids: await tokenizer.encode(text, { special: true }) })),
    );
  }
  const rows = windows.flatMap(({ tokens, n, length: width }) =>
    Array.from({ length: n }, (_, i) => tokens.subarray(i * width, (i + 1) * width)),
  );
  const each = Math.ceil(count / rows.length);
  const all = rows.flatMap((row) => beginnings(row, each, length, bosId));
  const wanted = Math.min(count, all.length);
  const chosen = Array.from({ length: wanted }, (_, i) => all[Math.floor((i * all.length) / wanted)]!);
  return Promise.all(chosen.map(async (ids) => ({ ids, text: await tokenizer.decode(ids) })));
}

/** `count` stretches of a window, spread over it; BOS stands before each where it stands before the window. */
function beginnings(row: Int32Array, count: number, length: number, bosId: number | undefined): Int32Array[] {
  const lead = row[0] === bosId ? 1 : 0;
  const body = row.subarray(lead);
  const room = Math.min(count, Math.max(1, Math.floor(body.length / length)));
  return Array.from({ length: room }, (_, i) => {
    const at = Math.floor((i * body.length) / room);
    return Int32Array.from([...row.subarray(0, lead), ...body.subarray(at, at + length - lead)]);
  });
}

async function promptLines(file: string): Promise<string[]> {
  let content: string;
  try {
    content = await readFile(file, 'utf8');
  } catch (error) {
    throw ioError(error, 'read the prompts', file);
  }
  const lines = content.split('\n').filter((line) => line.trim() !== '');
  if (lines.length === 0) throw badInput('The file of prompts is empty', { where: file });
  if (!/\.jsonl$/i.test(file)) return lines;
  return lines.map((line, i) => {
    const where = `${file}, line ${i + 1}`;
    let value: Record<string, unknown>;
    try {
      value = (JSON.parse(line) ?? {}) as Record<string, unknown>;
    } catch (cause) {
      throw badInput('A line of the prompts is no JSON', { where, got: (cause as Error).message, cause });
    }
    const text = value.prompt ?? value.text;
    if (typeof text !== 'string' || text === '') {
      throw badInput('A line of the prompts has no prompt', { where, expected: '{"prompt": "..."}' });
    }
    return text;
  });
}
