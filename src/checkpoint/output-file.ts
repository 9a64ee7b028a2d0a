import { open } from 'node:fs/promises';
import type { FileHandle } from 'node:fs/promises';
import { join } from 'node:path';
import type { ByteSource } from '../base/bytes.js';
import type { Digests } from '../base/digest.js';
import { badInput, bug } from '../base/errors.js';
import { ioError, writeFully } from '../base/files.js';
import type { FileLayout } from './layout.js';

/**
 * One output file while it grows: data lands at its final place in any order, and the checksum follows the data as far
 * as it is complete from the start.
 */
export class OutputFile {
  readonly path: string;
  readonly layout: FileLayout;
  readonly #handle: FileHandle;
  readonly #digest: Digests;
  /** Which extents are complete, by index. */
  readonly done: Uint8Array;
  #dirty = false;
  /** Extents before this one are in the checksum. */
  #hashed = 0;
  #crcs: number[] = [];
  #following: Promise<void> | undefined;
  #failure: unknown;

  private constructor(path: string, layout: FileLayout, handle: FileHandle, digest: Digests) {
    [this.path, this.layout, this.#handle, this.#digest] = [path, layout, handle, digest];
    this.done = new Uint8Array(layout.extents.length);
  }

  /** Makes the file in its final size, with the headers that are known already. */
  static async create(folder: string, layout: FileLayout, digest: Digests): Promise<OutputFile> {
    const path = join(folder, layout.name);
    try {
      const handle = await open(path, 'w+');
      await handle.truncate(layout.size);
      for (const { position, bytes } of layout.pieces) await writeFully(handle.fd, bytes, position, path);
      const file = new OutputFile(path, layout, handle, digest);
      file.#dirty = true;
      return file;
    } catch (error) {
      throw ioError(error, 'make the output file', path, layout.size);
    }
  }

  /** Goes on with a file of an earlier run; `done` says which extents are on disk. */
  static async reopen(folder: string, layout: FileLayout, digest: Digests, done: Uint8Array): Promise<OutputFile> {
    const path = join(folder, layout.name);
    try {
      const handle = await open(path, 'r+');
      const { size } = await handle.stat();
      if (size !== layout.size) {
        throw badInput('An output file of the earlier run has another size', {
          where: path,
          expected: `${layout.size} bytes`,
          got: `${size} bytes`,
          hint: 'Something changed the work folder: begin anew with --restart.',
        });
      }
      const file = new OutputFile(path, layout, handle, digest);
      file.done.set(done);
      return file;
    } catch (error) {
      throw ioError(error, 'open the output file', path);
    }
  }

  /** Bytes of this file that are on disk already (a sparse file takes no more). */
  async allocated(): Promise<number> {
    const { blocks } = await this.#handle.stat();
    return Math.min(blocks * 512, this.layout.size);
  }

  async write(index: number, data: ByteSource): Promise<void> {
    const extent = this.layout.extents[index]!;
    if (data.byteLength !== extent.bytes) {
      throw bug('A tensor has another size than planned', {
        where: `${this.path}, tensor ${JSON.stringify(extent.names[0])}`,
        expected: `${extent.bytes} bytes`,
        got: `${data.byteLength} bytes`,
      });
    }
    if (index < this.#hashed) await this.#startOver();
    this.done[index] = 0;
    this.#dirty = true;
    try {
      await data.writeTo(this.#handle.fd, extent.position);
    } catch (error) {
      throw ioError(error, 'write', this.path, extent.bytes);
    }
    this.done[index] = 1;
    this.follow();
  }

  /** Lets the checksum catch up with what is complete, in the background. */
  follow(): void {
    this.#following ??= this.#advance()
      .catch((error: unknown) => {
        this.#failure ??= error;
      })
      .finally(() => {
        this.#following = undefined;
      });
  }

  async sync(): Promise<void> {
    if (!this.#dirty) return;
    this.#dirty = false;
    try {
      await this.#handle.sync();
    } catch (error) {
      throw ioError(error, 'flush to disk', this.path, this.layout.size);
    }
  }

  /** Writes what ends the file; returns its SHA-256. All extents must be complete. */
  async finish(): Promise<string> {
    while (this.#hashed < this.layout.extents.length && this.#failure === undefined) {
      this.follow();
      await this.#following;
    }
    if (this.#failure !== undefined) throw this.#failure as Error;
    for (const { position, bytes } of this.layout.tail?.(this.#crcs) ?? []) {
      await writeFully(this.#handle.fd, bytes, position, this.path);
      this.#dirty = true;
    }
    await this.sync();
    return this.#digest.finish(this.path);
  }

  async close(): Promise<void> {
    await this.#following;
    await this.#handle.close();
  }

  async #advance(): Promise<void> {
    const { extents, afterExtent } = this.layout;
    while (this.#hashed < extents.length && this.done[this.#hashed] === 1 && this.#failure === undefined) {
      const index = this.#hashed;
      const { position, bytes } = extents[index]!;
      if (afterExtent === undefined) {
        await this.#digest.advance(this.path, position + bytes);
      } else {
        await this.#digest.advance(this.path, position);
        const crc = await this.#digest.advance(this.path, position + bytes, true);
        const piece = afterExtent(index, crc);
        await writeFully(this.#handle.fd, piece.bytes, piece.position, this.path);
        this.#crcs.push(crc);
      }
      this.#hashed = index + 1;
    }
  }

  /** A tensor behind the checksum is written again: the checksum begins anew. */
  async #startOver(): Promise<void> {
    await this.#following;
    await this.#digest.restart(this.path);
    this.#hashed = 0;
    this.#crcs = [];
  }
}
