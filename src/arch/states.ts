import { open, readdir, rm, type FileHandle } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { ConvertError, badInput, bug, noResource } from '../base/errors.js';
import { ioError, renameDurable } from '../base/files.js';
import { dtypeSize, elementCount } from '../base/dtype.js';
import type { Device } from '../backend/device.js';
import { copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

export interface StatesOptions {
  readonly hidden: number;
  readonly dtype: 'f32' | 'bf16';
  /** Tokens of each batch. */
  readonly rows: readonly number[];
  /** Kept in device memory; else only in the file. */
  readonly resident: boolean;
  /** File of the states after a block; 'next' while it grows. */
  readonly path: (block: number | 'next') => string;
}

/**
 * The hidden states [tokens, hidden] of all calibration batches between two blocks. They are written to a file as they
 * are (which is what makes a killed job go on bit-identically), and held on the device as well where memory allows.
 */
export class States implements AsyncDisposable {
  readonly #device: Device;
  readonly #options: StatesOptions;
  readonly #offsets: number[] = [];
  #scope: Scope;
  #nextScope: Scope;
  #now: Tensor[] = [];
  #next: Tensor[] = [];
  #file: FileHandle | undefined;
  #nextFile: FileHandle | undefined;
  readonly #writes: Promise<void>[] = [];

  constructor(device: Device, options: StatesOptions) {
    [this.#device, this.#options] = [device, options];
    [this.#scope, this.#nextScope] = [new Scope(device), new Scope(device)];
    let at = 0;
    for (const rows of options.rows) {
      this.#offsets.push(at);
      at += rows * options.hidden * dtypeSize(options.dtype);
    }
    this.#offsets.push(at);
  }

  /** The states of batch `b`; a copy in `scope` when they are not resident. */
  async get(b: number, scope: Scope): Promise<Tensor> {
    const resident = this.#now[b];
    if (resident) return resident;
    if (this.#file === undefined) throw bug(`states of batch ${b} before there are any`);
    return await this.#read(this.#file, b, scope);
  }

  /** Takes what batch `b` has become; `scope` may own it and loses it then. */
  async put(b: number, x: Tensor, scope: Scope): Promise<void> {
    const shape = this.#shape(b);
    if (elementCount(shape) !== x.count) throw bug(`states of batch ${b}`, { got: `[${x.shape.join(', ')}]` });
    let state = x.view(...shape);
    if (x.dtype !== this.#options.dtype) {
      state = this.#nextScope.empty(this.#options.dtype, shape);
      copyInto(state, x.view(...shape));
    } else if (scope.owns(x) && x.bytes === x.storage.bytes) {
      scope.move(x, this.#nextScope);
    } else {
      state = this.#nextScope.empty(this.#options.dtype, shape);
      copyInto(state, x.view(...shape));
    }
    this.#nextFile ??= await create(this.#options.path('next'));
    const writing = this.#device
      .writeFile(state.buffer, state.byteOffset, this.#nextFile.fd, this.#offsets[b]!, state.bytes)
      .catch((error: unknown) => {
        throw cannotWrite(error, this.#options.path('next'));
      });
    if (this.#options.resident) {
      writing.catch(() => undefined); // awaited in `next`
      this.#writes.push(writing);
      this.#next[b] = state;
    } else {
      await writing;
      this.#nextScope.free(state);
    }
  }

  /** All batches are put: they are the states from now on. */
  async next(): Promise<void> {
    await this.#written();
    this.#scope[Symbol.dispose]();
    [this.#scope, this.#nextScope] = [this.#nextScope, new Scope(this.#device)];
    [this.#now, this.#next] = [this.#next, []];
    await this.#file?.close();
    [this.#file, this.#nextFile] = [this.#nextFile, undefined];
  }

  /** Gives the states' file its durable name: those after block `block`. */
  async commit(block: number): Promise<void> {
    if (this.#file === undefined) throw bug('commit of states that were never put');
    try {
      await this.#file.sync();
    } catch (error) {
      throw ioError(error, 'flush to disk', this.#options.path('next'));
    }
    await renameDurable(this.#options.path('next'), this.#options.path(block));
  }

  /** Removes all state files but the one of block `keep`. */
  async forget(keep: number | undefined): Promise<void> {
    const path = this.#options.path('next');
    const kept = keep === undefined ? undefined : basename(this.#options.path(keep));
    const ours = /^hidden-(\d+|next)\.bin$/;
    for (const name of await readdir(dirname(path)).catch(() => [] as string[])) {
      if (ours.test(name) && name !== kept) await rm(join(dirname(path), name), { force: true });
    }
  }

  /** Goes on from the stored states after block `block`. */
  async load(block: number): Promise<void> {
    const path = this.#options.path(block);
    try {
      this.#file = await open(path, 'r');
      const { size } = await this.#file.stat();
      const expected = this.#offsets.at(-1)!;
      if (size !== expected) {
        throw badInput('The stored calibration states are damaged', {
          where: path,
          expected: `${expected} bytes`,
          got: `${size}`,
          hint: 'Begin anew with --restart.',
        });
      }
    } catch (error) {
      throw ioError(error, 'read', path);
    }
    if (!this.#options.resident) return;
    this.#now = await Promise.all(this.#options.rows.map((_, b) => this.#read(this.#file!, b, this.#scope)));
  }

  async #read(file: FileHandle, b: number, scope: Scope): Promise<Tensor> {
    const x = scope.empty(this.#options.dtype, this.#shape(b));
    await this.#device.readFile(x.buffer, x.byteOffset, file.fd, this.#offsets[b]!, x.bytes);
    return x;
  }

  #shape(b: number): [number, number] {
    return [this.#options.rows[b]!, this.#options.hidden];
  }

  /** All writes have ended; throws what the first failed one said. */
  async #written(): Promise<void> {
    const ends = await Promise.allSettled(this.#writes.splice(0));
    const failed = ends.find((end) => end.status === 'rejected');
    if (failed) throw failed.reason;
  }

  /** Transfers hold memory and descriptors: both go when the last one has ended. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#written().catch(() => undefined); // has reported itself, or something else went wrong first
    this.#scope[Symbol.dispose]();
    this.#nextScope[Symbol.dispose]();
    for (const file of [this.#file, this.#nextFile]) await file?.close();
  }
}

function cannotWrite(error: unknown, path: string): unknown {
  if (!(error instanceof ConvertError) || error.kind !== 'resource') return error;
  return noResource('The calibration states cannot be written', {
    where: path,
    got: error.message,
    hint: 'Free some space and run the same command again: it goes on where it stopped.',
    cause: error,
  });
}

async function create(path: string): Promise<FileHandle> {
  try {
    return await open(path, 'w+');
  } catch (error) {
    throw ioError(error, 'make', path);
  }
}
