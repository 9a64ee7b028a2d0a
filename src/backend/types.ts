import type { NativeHasher } from '../base/digest.js';
import type { DType } from '../base/dtype.js';
import type { Scanner } from '../base/scanner.js';

/** What build/deepseek_convert.node exports: see native/addon.cc. */
export interface NativeModule {
  readonly abi: number;
  /** The op table in order, with the argument names that native/backend.h gives. */
  readonly ops: readonly { name: string; tensors: string; ints: string; floats: string }[];
  readonly Device: new (
    library: string,
    index: number,
    options: string,
    memoryLimit: number,
    ioThreads: number,
    poison: boolean,
  ) => NativeDevice;
  /** Makes devices of one backend the ranks of a group, in this order. */
  readonly join: (devices: readonly NativeDevice[]) => void;
  /** Balanced assignment: see native/assign.h. */
  readonly assign: (
    scores: Float32Array,
    capacities: Int32Array,
    prices: Float64Array,
    epsilon: number,
  ) => Promise<{ places: Int32Array; prices: Float64Array }>;
  /** Learns byte-level BPE: see native/bpe.h. */
  readonly BpeTrainer: new (splits: readonly string[]) => NativeBpeTrainer;
  readonly scanner: Scanner;
  /** Absent where Node hashes as fast. */
  readonly Hasher?: new () => NativeHasher;
}

/** One device: an in-order queue, memory, file transfers. Buffers are numbers; offsets and sizes are bytes. */
export interface NativeDevice {
  alloc(bytes: number): number;
  free(buffer: number): void;
  /** `numbers`: per tensor {buffer or 0, byte offset, dtype, rank, dim[4], stride[4]}, then integers, then floats. */
  run(op: number, numbers: Float64Array, tensors: number, ints: number, floats: number): void;
  /** Of the group that the device is in; `numbers`: per tensor {buffer, byte offset, dtype, elements}. */
  collective(kind: number, numbers: Float64Array): void;
  upload(buffer: number, offset: number, data: Uint8Array): void;
  download(buffer: number, offset: number, into: Uint8Array): Promise<Uint8Array>;
  readFile(buffer: number, offset: number, fd: number, position: number, bytes: number): Promise<void>;
  writeFile(buffer: number, offset: number, fd: number, position: number, bytes: number, later: boolean): Promise<void>;
  /** Gives the values that are infinite or not a number, where `dtype` is the number of f32, bf16 or f16. */
  copyRange(from: number, position: number, to: number, at: number, bytes: number, dtype: number): Promise<number>;
  sync(): Promise<void>;
  stats(): MemoryStats;
  resetPeak(): void;
  trim(): void;
  info(): string;
  trace(): Record<string, { calls: number; seconds: number }>;
  has(op: number): boolean;
  close(): void;
}

/** What src/tokenizer/bpe-train.ts drives. */
export interface NativeBpeTrainer {
  count(text: Uint8Array): Promise<number>;
  merge(first: readonly string[], byteIds: Int32Array, vocabSize: number, minFrequency: number): Promise<Int32Array>;
  made(): number;
  stop(): void;
}

/** Bytes. `peak` is the most that was in use at once. */
export interface MemoryStats {
  used: number;
  reserved: number;
  peak: number;
  limit: number;
  buffers: number;
}

/** A view of device memory, as an op sees it. */
export interface TensorView {
  readonly buffer: number;
  readonly byteOffset: number;
  readonly dtype: DType;
  readonly shape: readonly number[];
  /** In elements; 0 broadcasts. */
  readonly strides: readonly number[];
}

export type DeviceKind = 'cpu' | 'cuda';

export interface DeviceOptions {
  kind: DeviceKind;
  /** Which GPU. */
  index?: number;
  threads?: number;
  /** Bytes; 0 or absent: what the machine has. */
  memoryLimit?: number;
  ioThreads?: number;
  /** Fills new memory with NaN patterns: tests find outputs that an op did not write. */
  poison?: boolean;
  /** Use OpenBLAS where it is found (default true). */
  blas?: boolean;
}
