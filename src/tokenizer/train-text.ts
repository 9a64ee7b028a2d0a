import { open } from 'node:fs/promises';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';

/** Whole lines of a file, and the byte at which they begin. */
export interface TextLines {
  readonly bytes: Uint8Array;
  readonly path: string;
  readonly offset: number;
}

const chunkBytes = 32 * 2 ** 20;
/** Of one line; native code counts its bytes in 32 bits. */
const longestLine = 2 ** 30;

/**
 * The text of files: as it stands, or of a .jsonl file the "text" of each line.
 * Errors: input, files that cannot be read, lines that are too long or no JSON.
 */
export async function* textLines(paths: readonly string[]): AsyncGenerator<TextLines> {
  for (const path of paths) {
    if (/\.jsonl$/i.test(path)) yield* documents(path);
    else yield* chunks(path);
  }
}

async function* chunks(path: string): AsyncGenerator<TextLines> {
  const file = await open(path, 'r').catch((error: unknown) => {
    throw ioError(error, 'read the text', path);
  });
  try {
    let offset = 0;
    let carry = Buffer.alloc(0);
    for (;;) {
      const buffer = Buffer.allocUnsafe(carry.length + chunkBytes);
      carry.copy(buffer);
      const { bytesRead } = await file.read(buffer, carry.length, chunkBytes, offset + carry.length).catch((error: unknown) => {
        throw ioError(error, 'read the text', path);
      }); // prettier-ignore
      const bytes = buffer.subarray(0, carry.length + bytesRead);
      if (bytesRead === 0) {
        if (bytes.length > 0) yield { bytes, path, offset };
        return;
      }
      const end = bytes.lastIndexOf(0x0a) + 1;
      if (bytes.length - end > longestLine) {
        throw badInput('A line of the text is too long', { where: `${path}, byte ${offset + end}`, expected: 'at most 1 GiB' }); // prettier-ignore
      }
      if (end > 0) yield { bytes: bytes.subarray(0, end), path, offset };
      [carry, offset] = [bytes.subarray(end), offset + end];
    }
  } finally {
    await file.close();
  }
}

async function* documents(path: string): AsyncGenerator<TextLines> {
  for await (const { bytes, offset } of chunks(path)) {
    for (let from = 0, next = 0; from < bytes.length; from = next) {
      const end = bytes.indexOf(0x0a, from);
      next = end === -1 ? bytes.length : end + 1;
      const where = `${path}, the line at byte ${offset + from}`;
      const line = decode(bytes.subarray(from, next), where);
      if (line.trim() !== '') yield { bytes: Buffer.from(textOf(line, where)), path, offset: offset + from };
    }
  }
}

function decode(bytes: Uint8Array, where: string): string {
  try {
    return utf8.decode(bytes);
  } catch (cause) {
    throw badInput('The text is not UTF-8', { where, cause });
  }
}
const utf8 = new TextDecoder('utf-8', { fatal: true });

function textOf(line: string, where: string): string {
  let value: unknown;
  try {
    value = JSON.parse(line);
  } catch (cause) {
    throw badInput('A line of a .jsonl file is no JSON', { where, got: (cause as Error).message, cause });
  }
  const { text } = (value ?? {}) as { text?: unknown };
  if (typeof text === 'string') return text;
  throw badInput('A line of a .jsonl file has no text', { where, expected: '{"text": "..."}', got: line.slice(0, 60) });
}
