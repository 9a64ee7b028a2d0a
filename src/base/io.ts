import { open } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import type { ByteSource, FileSpan } from './bytes.js';
import { ioError, readFully, writeFully } from './files.js';

/** One transfer unit: large enough to keep a disk busy, small enough to have many in flight. */
export const chunkBytes = 2 * 2 ** 20;
/** Chunks of one span in flight at a time. */
const parallelChunks = 4;

/** Buffers of `chunkBytes` under one budget for the whole process; a request beyond it waits. */
class BufferPool {
  readonly #limit = 32;
  #taken = 0;
  readonly #idle: Buffer[] = [];
  readonly #waiting: ((buffer: Buffer) => void)[] = [];

  async take(): Promise<Buffer> {
    if (this.#taken < this.#limit) {
      this.#taken++;
      return this.#idle.pop() ?? Buffer.allocUnsafeSlow(chunkBytes);
    }
    return new Promise((resolve) => this.#waiting.push(resolve));
  }

  give(buffer: Buffer): void {
    const next = this.#taken <= this.#limit ? this.#waiting.shift() : undefined;
    if (next !== undefined) next(buffer);
    else {
      this.#taken--;
      if (this.#taken < this.#limit) this.#idle.push(buffer);
    }
  }
}

const pool = new BufferPool();

/** Keeps files open between uses: a checkpoint of 91,000 tensors would otherwise open its shards as often. */
class OpenFiles {
  readonly #files = new Map<string, { handle: Promise<FileHandle>; users: number }>();
  readonly #maxIdle = 64;

  async use<T>(path: string, action: (handle: FileHandle) => Promise<T>): Promise<T> {
    const file = this.#files.get(path) ?? { handle: open(path, 'r'), users: 0 };
    this.#files.delete(path); // and to the end: the map's order is by last use
    this.#files.set(path, file);
    file.users++;
    try {
      return await action(await file.handle);
    } catch (error) {
      throw ioError(error, 'read', path);
    } finally {
      file.users--;
      await this.#trim(file.users === 0 && (await failed(file.handle)) ? path : undefined);
    }
  }

  async #trim(broken: string | undefined): Promise<void> {
    if (broken !== undefined) this.#files.delete(broken);
    for (const [path, file] of this.#files) {
      if (this.#files.size <= this.#maxIdle) return;
      if (file.users > 0) continue;
      this.#files.delete(path);
      await (await file.handle).close();
    }
  }

  /** Closes the idle ones among these files (they are about to be replaced, or not needed again). */
  async close(paths: Iterable<string>): Promise<void> {
    for (const path of paths) {
      const file = this.#files.get(path);
      if (file === undefined || file.users > 0) continue;
      this.#files.delete(path);
      await (await file.handle).close();
    }
  }
}

const failed = (handle: Promise<FileHandle>): Promise<boolean> => handle.then(() => false, () => true); // prettier-ignore

const openFiles = new OpenFiles();

/** Lets go of files that `fileSource` and `readSpan` kept open. */
export const closeFiles = (paths: Iterable<string>): Promise<void> => openFiles.close(paths);

/** A span of another file, copied with bounded buffers, several in flight. */
export function fileSource(span: FileSpan): ByteSource {
  return {
    byteLength: span.bytes,
    writeTo: (fd, position) =>
      openFiles.use(span.path, async (handle) => {
        let next = 0;
        const lane = async (): Promise<void> => {
          while (next < span.bytes) {
            const at = next;
            next += Math.min(chunkBytes, span.bytes - at);
            const buffer = await pool.take();
            try {
              const part = buffer.subarray(0, Math.min(chunkBytes, span.bytes - at));
              await readFully(handle.fd, part, span.offset + at, span.path);
              await writeFully(fd, part, position + at, 'the output');
            } finally {
              pool.give(buffer);
            }
          }
        };
        const lanes = Math.min(parallelChunks, Math.ceil(span.bytes / chunkBytes));
        const results = await Promise.allSettled(Array.from({ length: lanes }, lane));
        const failure = results.find((result) => result.status === 'rejected');
        if (failure !== undefined) throw failure.reason;
      }),
  };
}

/** Bytes in memory. */
export function bytesSource(bytes: Uint8Array): ByteSource {
  return {
    byteLength: bytes.byteLength,
    writeTo: (fd, position) => writeFully(fd, bytes, position, 'the output'),
  };
}

/** Reads a small span whole (a scale, a bias): for weights, use `fileSource` or native reads. */
export const readSpan = (span: FileSpan): Promise<Buffer> =>
  openFiles.use(span.path, async (handle) => {
    const buffer = Buffer.allocUnsafe(span.bytes);
    await readFully(handle.fd, buffer, span.offset, span.path);
    return buffer;
  });
