import { open, readdir, rm, type FileHandle } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { ConvertError, badInput, bug, noResource } from '../base/errors.js';
import { ioError, processId, renameDurable } from '../base/files.js';
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
  /** File of the states after a block, `.../<name>-<block>.bin`; another name each time while they grow. */
  readonly path: (block: number | `next-${string}`) => string;
}

/** The states between two blocks: their file, and on the device while they are resident. */
interface Generation {
  file: FileHandle;
  path: string;
  readonly scope: Scope;
  readonly tensors: Tensor[];
  readonly writes: Promise<void>[];
}

/**
 * The hidden states [tokens, hidden] of all calibration batches between two blocks. They are written to a file as they
 * are (which is what makes a killed job go on bit-identically), and held on the device as well where memory allows:
 * these go to their file when they are committed, while the next block computes.
 */
export class States implements AsyncDisposable {
  readonly #device: Device;
  readonly #options: StatesOptions;
  readonly #offsets: number[] = [];
  #now: Generation | undefined;
  #next: Generation | undefined;
  #committing: Promise<void> = Promise.resolve();
  /** Until the states before the last ones are out of memory, and until their file is closed. */
  #freeing: Promise<void> = Promise.resolve();
  #closing: Promise<void> = Promise.resolve();
  #generations = 0;
  /** Files that `forget` leaves alone: a name is here before the file is, and never used twice. */
  readonly #growing = new Set<string>();

  constructor(device: Device, options: StatesOptions) {
    [this.#device, this.#options] = [device, options];
    let at = 0;
    for (const rows of options.rows) {
      this.#offsets.push(at);
      at += rows * options.hidden * dtypeSize(options.dtype);
    }
    this.#offsets.push(at);
  }

  get dtype(): 'f32' | 'bf16' {
    return this.#options.dtype;
  }

  /** The states of batch `b`; a copy in `scope` when they are not resident. */
  async get(b: number, scope: Scope): Promise<Tensor> {
    if (this.#now === undefined) throw bug(`states of batch ${b} before there are any`);
    return this.#now.tensors[b] ?? (await this.#read(this.#now.file, b, scope));
  }

  /** Takes what batch `b` has become; `scope` may own it and loses it then. */
  async put(b: number, x: Tensor, scope: Scope): Promise<void> {
    const shape = this.#shape(b);
    if (elementCount(shape) !== x.count) throw bug(`states of batch ${b}`, { got: `[${x.shape.join(', ')}]` });
    const next = (this.#next ??= await this.#begin());
    let state = x.view(...shape);
    if (x.dtype === this.#options.dtype && scope.owns(x) && x.bytes === x.storage.bytes) {
      scope.move(x, next.scope);
    } else {
      state = next.scope.empty(this.#options.dtype, shape);
      copyInto(state, x.view(...shape));
    }
    if (this.#options.resident) {
      next.tensors[b] = state;
    } else {
      await this.#write(next, b, state);
      next.scope.free(state);
    }
  }

  /** Rows [from, to) of what batch `b` is, or of what was put for it already; they may be a copy in `scope`. */
  async rows(which: 'now' | 'next', b: number, from: number, to: number, scope: Scope): Promise<Tensor> {
    const generation = which === 'now' ? this.#now : this.#next;
    if (generation === undefined) throw bug(`states of batch ${b} before there are any`);
    const resident = generation.tensors[b];
    return resident ? resident.slice(0, from, to) : await this.#read(generation.file, b, scope, from, to);
  }

  /** All batches are put: they are the states from now on. */
  next(): Promise<void> {
    const before = this.#now;
    [this.#now, this.#next] = [this.#next, undefined];
    if (before) this.#end(before);
    return Promise.resolve();
  }

  /**
   * Writes the states, unless they are written already, and gives their file its durable name: those after block
   * `block`. To be awaited before the block counts as done; the next block may begin before.
   */
  async commit(block: number): Promise<void> {
    const now = this.#now;
    if (now === undefined) throw bug('commit of states that were never put');
    if (this.#options.resident) {
      for (const [b, state] of now.tensors.entries()) {
        const writing = this.#write(now, b, state);
        writing.catch(() => undefined); // awaited in `written`
        now.writes.push(writing);
      }
    }
    this.#committing = (async () => {
      await written(now);
      try {
        await now.file.sync();
      } catch (error) {
        throw ioError(error, 'flush to disk', now.path);
      }
      await renameDurable(now.path, this.#options.path(block));
      this.#growing.delete(now.path);
      now.path = this.#options.path(block);
    })();
    await this.#committing;
  }

  /** Removes all state files but those of the blocks `keep` and those in use. */
  async forget(keep: ReadonlySet<number>): Promise<void> {
    const [folder, first] = [dirname(this.#options.path(0)), basename(this.#options.path(0))];
    const own = first.slice(0, first.lastIndexOf('-'));
    const kept = new Set([...keep].map((block) => this.#options.path(block)));
    const ours = new RegExp(`^${own}-(\\d+|next.*)\\.bin$`);
    for (const name of await readdir(folder).catch(() => [] as string[])) {
      const path = join(folder, name);
      if (ours.test(name) && !kept.has(path) && !this.#growing.has(path)) await rm(path, { force: true });
    }
  }

  /** Goes on from stored states. */
  async load(path: string): Promise<void> {
    let file: FileHandle;
    try {
      file = await open(path, 'r');
    } catch (error) {
      throw ioError(error, 'read', path);
    }
    const now: Generation = { file, path, scope: new Scope(this.#device), tensors: [], writes: [] };
    this.#now = now;
    const { size } = await file.stat();
    const expected = this.#offsets.at(-1)!;
    if (size !== expected) {
      throw badInput('The stored calibration states are damaged', {
        where: path,
        expected: `${expected} bytes`,
        got: `${size}`,
        hint: 'Begin anew with --restart.',
      });
    }
    if (!this.#options.resident) return;
    now.tensors.push(...(await Promise.all(this.#options.rows.map((_, b) => this.#read(file, b, now.scope)))));
  }

  async #begin(): Promise<Generation> {
    await this.#freeing; // never more than two generations in memory
    const path = this.#options.path(`next-${processId()}-${this.#generations++}`);
    this.#growing.add(path);
    return { file: await create(path), path, scope: new Scope(this.#device), tensors: [], writes: [] };
  }

  /** Memory and descriptor go when the last transfer has ended; what fails there is told who asked for the commit. */
  #end(generation: Generation): void {
    if (generation.writes.length === 0) generation.scope[Symbol.dispose]();
    else this.#freeing = Promise.allSettled(generation.writes).then(() => generation.scope[Symbol.dispose]());
    this.#closing = Promise.allSettled([this.#closing, this.#freeing, this.#committing]).then(async () => {
      this.#growing.delete(generation.path);
      await generation.file.close().catch(() => undefined); // its bytes are synced, or nobody wants them
    });
  }

  async #write(generation: Generation, b: number, { buffer, byteOffset, bytes }: Tensor): Promise<void> {
    try {
      await this.#device.writeFile(buffer, byteOffset, generation.file.fd, this.#offsets[b]!, bytes, true);
    } catch (error) {
      throw cannotWrite(error, generation.path);
    }
  }

  async #read(file: FileHandle, b: number, scope: Scope, from = 0, to = this.#options.rows[b]!): Promise<Tensor> {
    const { dtype, hidden } = this.#options;
    const x = scope.empty(dtype, [to - from, hidden]);
    const offset = this.#offsets[b]! + from * hidden * dtypeSize(dtype);
    await this.#device.readFile(x.buffer, x.byteOffset, file.fd, offset, x.bytes);
    return x;
  }

  #shape(b: number): [number, number] {
    return [this.#options.rows[b]!, this.#options.hidden];
  }

  /** Transfers hold memory and descriptors: both go when the last one has ended. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const generation of [this.#now, this.#next]) if (generation) this.#end(generation);
    [this.#now, this.#next] = [undefined, undefined];
    await this.#closing;
  }
}

/** All writes have ended; throws what the first failed one said. */
async function written({ writes }: Generation): Promise<void> {
  const ends = await Promise.allSettled(writes);
  const failed = ends.find((end) => end.status === 'rejected');
  if (failed) throw failed.reason;
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
