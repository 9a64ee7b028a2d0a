import { fstatSync, readlinkSync } from 'node:fs';
import { ConvertError, bug, noResource } from '../base/errors.js';
import { dtypeCode, type DType } from '../base/dtype.js';
import type { DeviceKind, DeviceOptions, MemoryStats, NativeDevice, NativeModule, TensorView } from './types.js';

/** One call of an op of native/backend.h. */
export interface Op {
  readonly name: string;
  readonly tensors: (TensorView | undefined)[];
  readonly ints: readonly number[];
  readonly floats: readonly number[];
}

export interface FilePlace {
  readonly fd: number;
  /** Byte. */
  readonly position: number;
}

const maxNumbers = 12 * 16 + 32;

/** In the order of native/backend.h, where they are described. */
const collectives = ['all_reduce', 'reduce_scatter', 'all_gather'] as const;
export type Collective = (typeof collectives)[number];

/**
 * A CPU or GPU with its queue. Ops are enqueued and return at once; only `download`, `sync` and file transfers are
 * awaited. An op's failure is reported by the next of those.
 */
export class Device {
  readonly kind: DeviceKind;
  readonly index: number;
  readonly #native: NativeDevice;
  readonly #assign: NativeModule['assign'];
  readonly #ops: ReadonlyMap<string, number>;
  readonly #numbers = new Float64Array(maxNumbers);
  /** Threads that work on file transfers. */
  readonly #transfers: number;
  /** Sees each op just before it is enqueued, and may complete its tensors: how a tape records. */
  watch: ((op: Op) => void) | undefined;

  constructor(native: NativeModule, library: string, options: DeviceOptions) {
    this.kind = options.kind;
    this.index = options.index ?? 0;
    this.#assign = native.assign;
    this.#ops = new Map(native.ops.map((op, i) => [op.name, i]));
    this.#transfers = options.ioThreads ?? 4;
    const settings = { threads: options.threads, blas: options.blas === false ? 0 : 1 };
    this.#native = new native.Device(
      library,
      this.index,
      JSON.stringify(settings),
      options.memoryLimit ?? 0,
      this.#transfers,
      options.poison ?? false,
    );
  }

  /** Reserves `bytes` (64-byte aligned, contents undefined); a number for the other calls. */
  alloc(bytes: number): number {
    try {
      return this.#native.alloc(bytes);
    } catch (error) {
      throw this.#explain(error, 'alloc');
    }
  }

  free(buffer: number): void {
    this.#native.free(buffer);
  }

  /** Enqueues one op of native/backend.h; arguments in the order of its line there. */
  run(op: string, tensors: readonly (TensorView | undefined)[], ints: readonly number[], floats: readonly number[]) {
    const index = this.#ops.get(op);
    if (index === undefined) throw bug(`no native op named ${op}`);
    if (this.watch) {
      const seen = { name: op, tensors: [...tensors], ints, floats };
      this.watch(seen);
      tensors = seen.tensors;
    }
    const numbers = this.#numbers;
    let at = 0;
    for (const tensor of tensors) {
      if (tensor === undefined) {
        numbers.fill(0, at, at + 12);
      } else {
        const rank = tensor.shape.length;
        numbers[at] = tensor.buffer;
        numbers[at + 1] = tensor.byteOffset;
        numbers[at + 2] = dtypeCode[tensor.dtype];
        numbers[at + 3] = rank;
        for (let d = 0; d < 4; d++) {
          numbers[at + 4 + d] = d < rank ? tensor.shape[d]! : 1;
          numbers[at + 8 + d] = d < rank ? tensor.strides[d]! : 0;
        }
      }
      at += 12;
    }
    for (const i of ints) numbers[at++] = i;
    for (const f of floats) numbers[at++] = f;
    this.#native.run(index, numbers, tensors.length, ints.length, floats.length);
  }

  /** Makes `devices` the ranks of a group, in this order. Errors: the native reason, as it is. */
  static join(native: NativeModule, devices: readonly Device[]): void {
    native.join(devices.map((device) => device.#native));
  }

  /** Enqueues this device's part of what its group does together; dense f32 or bf16 tensors. See `Group.run`. */
  collective(kind: Collective, tensors: readonly TensorView[]): void {
    const numbers = tensors.flatMap(({ buffer, byteOffset, dtype, shape }) => [
      ...[buffer, byteOffset, dtypeCode[dtype]],
      shape.reduce((n, d) => n * d, 1),
    ]);
    this.#native.collective(collectives.indexOf(kind), Float64Array.from(numbers));
  }

  has(op: string): boolean {
    const index = this.#ops.get(op);
    return index !== undefined && this.#native.has(index);
  }

  upload(buffer: number, offset: number, data: Uint8Array): void {
    this.#native.upload(buffer, offset, data);
  }

  async download(buffer: number, offset: number, into: Uint8Array): Promise<void> {
    await this.#native.download(buffer, offset, into).catch((e: unknown) => this.#raise(e, 'download'));
  }

  /** File -> device memory, beside the queue; resolves when the bytes are there. */
  async readFile(buffer: number, offset: number, fd: number, position: number, bytes: number): Promise<void> {
    await this.#native.readFile(buffer, offset, fd, position, bytes).catch((e: unknown) => this.#raise(e, 'read', fd));
  }

  /**
   * Device memory -> file, after everything enqueued so far, large transfers in pieces beside each other; `later`: behind
   * all other transfers, by half of the threads.
   */
  async writeFile(
    buffer: number,
    offset: number,
    fd: number,
    position: number,
    bytes: number,
    later = false,
  ): Promise<void> {
    const piece = later ? 2 ** 26 : Math.max(2 ** 22, Math.ceil(bytes / this.#transfers / 4096) * 4096);
    const pieces: Promise<void>[] = [];
    for (let at = 0; at < bytes; at += piece) {
      const n = Math.min(piece, bytes - at);
      pieces.push(this.#native.writeFile(buffer, offset + at, fd, position + at, n, later));
    }
    // Memory and file are the caller's again only when the last piece has ended, also after a failure.
    const failed = (await Promise.allSettled(pieces)).find((end) => end.status === 'rejected');
    if (failed) this.#raise(failed.reason, 'write');
  }

  /**
   * File -> file, beside the queue and without device memory. Gives how many values are infinite or not a number, where
   * `dtype` is f32, bf16 or f16 (0 for others).
   */
  async copyRange(from: FilePlace, to: FilePlace, bytes: number, dtype: DType): Promise<number> {
    return this.#native
      .copyRange(from.fd, from.position, to.fd, to.position, bytes, dtypeCode[dtype])
      .catch((e: unknown) => this.#raise(e, 'copy', from.fd));
  }

  /** Balanced assignment, on a thread of the host: see `assign` in src/tensor/ops/experts.ts. `prices` is changed. */
  async assign(
    scores: Float32Array,
    capacities: Int32Array,
    prices: Float64Array,
    epsilon: number,
  ): Promise<Int32Array> {
    const made = await this.#assign(scores, capacities, prices, epsilon).catch((e: unknown) =>
      this.#raise(e, 'assign'),
    );
    prices.set(made.prices);
    return made.places;
  }

  /** Resolves when everything enqueued so far is done; rejects with the first failure. */
  async sync(): Promise<void> {
    await this.#native.sync().catch((e: unknown) => this.#raise(e, 'sync'));
  }

  memory(): MemoryStats {
    return this.#native.stats();
  }

  /** Bytes that are still to be had: of the device, under its limit; Infinity where neither is known. */
  available(): number {
    const { memory } = this.info() as { memory?: { free?: number } };
    const { limit } = this.memory();
    return Math.min(memory?.free ?? Infinity, limit > 0 ? limit : Infinity);
  }

  resetPeak(): void {
    this.#native.resetPeak();
  }

  /** Gives cached memory back to the system. */
  trim(): void {
    this.#native.trim();
  }

  /** What the backend says of itself: name, memory, libraries and where they were looked for. */
  info(): Record<string, unknown> {
    return JSON.parse(this.#native.info()) as Record<string, unknown>;
  }

  /**
   * From the first call on each op is waited for and timed, which slows a job down; gives calls and seconds by op and by
   * the sizes of its first two tensors, in falling order of seconds.
   */
  trace(): { op: string; sizes: string; calls: number; seconds: number }[] {
    return Object.entries(this.#native.trace())
      .map(([key, row]) => ({ op: key.split(' ', 1)[0]!, sizes: key.slice(key.indexOf(' ') + 1), ...row }))
      .sort((a, b) => b.seconds - a.seconds);
  }

  close(): void {
    this.#native.close();
  }

  /** `fd`: the file that was read. */
  #raise(error: unknown, during: string, fd?: number): never {
    throw this.#explain(error, during, fd);
  }

  #explain(error: unknown, during: string, fd?: number): Error {
    if (!(error instanceof Error)) return bug(`native ${during} failed`, { cause: error });
    const code = (error as Error & { code?: string }).code;
    switch (code) {
      case 'DC_NO_MEMORY':
        return noResource(`Out of memory on ${this.kind}:${this.index}: ${error.message}`, {
          hint: `Use fewer or shorter calibration samples (--samples, --seq-len)${this.kind === 'cuda' ? ', raise --vram, or run with --device cpu' : ', or raise --ram'}.`,
        });
      case 'ENOSPC':
        return noResource('Disk full while writing', {
          hint: 'Free some space and run the same command again: it resumes.',
        });
      case 'EIO':
        return noResource(`The disk failed during a ${during}`, { cause: error });
      case 'DC_IO':
        return noResource(`A ${during} failed: ${error.message}`, { cause: error });
      case 'DC_EOF':
        return new ConvertError('input', 'The file ended before the tensor did', {
          ...(fd !== undefined && whereabouts(fd)),
          hint: 'It is truncated or changed while being read: copy or download it again.',
        });
      default:
        return bug(`${this.kind}:${this.index} ${during}: ${error.message}`, { cause: error });
    }
  }
}

/** Name and size of an open file, as far as the system tells them. */
function whereabouts(fd: number): { where?: string; got?: string } {
  try {
    return { where: readlinkSync(`/proc/self/fd/${fd}`), got: `${fstatSync(fd).size} bytes` };
  } catch {
    return {};
  }
}
