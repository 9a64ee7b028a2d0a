import { createHash } from 'node:crypto';
import { closeSync, fstatSync, openSync, readSync } from 'node:fs';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';

/**
 * A file's bytes at any position. Headers are read synchronously: they are small, and parsers stay simple;
 * weights are read elsewhere, asynchronously.
 */
export interface RandomAccess {
  readonly path: string;
  readonly size: number;
  /** Exactly `bytes` bytes from `position` on; past the end is an input error. `what` names them in it. */
  read(position: number, bytes: number, what: string): Buffer;
}

function requireRange(source: RandomAccess, position: number, bytes: number, what: string): void {
  if (position >= 0 && bytes >= 0 && position + bytes <= source.size) return;
  throw badInput(`File ends before its ${what}`, {
    where: `${source.path}, byte ${position}`,
    expected: `${bytes} bytes`,
    got: `${Math.max(0, source.size - position)} bytes`,
    hint: 'The file is truncated or damaged: download or copy it again.',
  });
}

/** An open file, for headers. */
export class OpenFile implements RandomAccess, Disposable {
  readonly path: string;
  readonly size: number;
  /** Time of the last change, ms since 1970. */
  readonly modified: number;
  readonly #fd: number;

  constructor(path: string) {
    this.path = path;
    try {
      this.#fd = openSync(path, 'r');
    } catch (error) {
      throw ioError(error, 'open', path);
    }
    const stat = fstatSync(this.#fd);
    this.size = stat.size;
    this.modified = stat.mtimeMs;
    if (!stat.isFile()) {
      closeSync(this.#fd);
      throw badInput('Not a regular file', { where: path });
    }
  }

  read(position: number, bytes: number, what: string): Buffer {
    requireRange(this, position, bytes, what);
    const buffer = Buffer.allocUnsafe(bytes);
    let done = 0;
    while (done < bytes) {
      let count: number;
      try {
        count = readSync(this.#fd, buffer, done, bytes - done, position + done);
      } catch (error) {
        throw ioError(error, `read the ${what} of`, this.path, bytes);
      }
      if (count === 0) {
        throw badInput('File was shortened while it was read', { where: `${this.path}, byte ${position + done}` });
      }
      done += count;
    }
    return buffer;
  }

  [Symbol.dispose](): void {
    closeSync(this.#fd);
  }
}

/** Bytes in memory as a file (tests, pickles inside archives). */
export function inMemory(bytes: Buffer, path: string): RandomAccess {
  const source: RandomAccess = {
    path,
    size: bytes.length,
    read(position, count, what) {
      requireRange(source, position, count, what);
      return bytes.subarray(position, position + count);
    },
  };
  return source;
}

/** A part of a file, with positions relative to it (a member of an archive). */
export function slice(source: RandomAccess, start: number, size: number, what: string): RandomAccess {
  requireRange(source, start, size, what);
  return {
    path: `${source.path} (${what})`,
    size,
    read(position, count, inner) {
      if (position < 0 || position + count > size) requireRange({ ...this, path: this.path }, position, count, inner);
      return source.read(start + position, count, inner);
    },
  };
}

/** SHA-256 over parts of headers and the file's size: what identifies a file without reading its weights. */
export function hashHeaders(size: number, parts: Iterable<Uint8Array | string>): string {
  const hash = createHash('sha256').update(`${size}\n`);
  for (const part of parts) hash.update(part);
  return hash.digest('hex');
}

/** A 64-bit count or offset as a number; beyond 2^53 nothing in a real file is. */
export function safeU64(buffer: Buffer, at: number): number {
  return buffer.readUInt32LE(at) + buffer.readUInt32LE(at + 4) * 2 ** 32;
}
