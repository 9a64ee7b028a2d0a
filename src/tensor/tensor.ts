import type { ByteSource } from '../base/bytes.js';
import { dtypeSize, elementCount, type DType } from '../base/dtype.js';
import { bug } from '../base/errors.js';
import type { Device } from '../backend/device.js';
import type { TensorView } from '../backend/types.js';

/** Device memory with one owner (a scope). */
interface Storage {
  readonly device: Device;
  readonly buffer: number;
  readonly bytes: number;
  freed: boolean;
}

export const contiguousStrides = (shape: readonly number[]): number[] => {
  const strides = new Array<number>(shape.length);
  let step = 1;
  for (let d = shape.length - 1; d >= 0; d--) {
    strides[d] = step;
    step *= shape[d]!;
  }
  return strides;
};

/** A view of device memory: rank <= 4, strides in elements. Views share their storage; the scope that made it frees it. */
export class Tensor implements TensorView {
  constructor(
    readonly storage: Storage,
    readonly byteOffset: number,
    readonly dtype: DType,
    readonly shape: readonly number[],
    readonly strides: readonly number[],
  ) {
    if (shape.length > 4) throw bug(`tensor of rank ${shape.length}`);
  }

  get buffer(): number {
    if (this.storage.freed) throw bug(`use of a freed tensor [${this.shape.join(', ')}]`);
    return this.storage.buffer;
  }
  get device(): Device {
    return this.storage.device;
  }
  get count(): number {
    return elementCount(this.shape);
  }
  /** Bytes of the values, without gaps. */
  get bytes(): number {
    return this.count * dtypeSize(this.dtype);
  }
  /** Dimension `d`; negative counts from the end. */
  dim(d: number): number {
    const size = this.shape.at(d);
    if (size === undefined) throw bug(`dimension ${d} of a tensor of rank ${this.shape.length}`);
    return size;
  }
  get contiguous(): boolean {
    let step = 1;
    for (let d = this.shape.length - 1; d >= 0; d--) {
      if (this.shape[d] !== 1 && this.strides[d] !== step) return false;
      step *= this.shape[d]!;
    }
    return true;
  }

  /** The same memory under another shape; contiguous tensors only. One dimension may be -1. */
  view(...shape: number[]): Tensor {
    const known = shape.filter((d) => d !== -1).reduce((n, d) => n * d, 1);
    const full = shape.map((d) => (d === -1 ? this.count / known : d));
    if (!this.contiguous || elementCount(full) !== this.count) {
      throw bug(`view [${full.join(', ')}] of [${this.shape.join(', ')}] with strides [${this.strides.join(', ')}]`);
    }
    return new Tensor(this.storage, this.byteOffset, this.dtype, full, contiguousStrides(full));
  }
  /** Elements [from, to) of dimension `d`. */
  slice(d: number, from: number, to: number): Tensor {
    if (!(from >= 0 && from <= to && to <= this.dim(d))) throw bug(`slice ${from}..${to} of ${this.dim(d)}`);
    const shape = this.shape.with(d, to - from);
    const offset = this.byteOffset + from * this.strides[d]! * dtypeSize(this.dtype);
    return new Tensor(this.storage, offset, this.dtype, shape, this.strides);
  }
  /** Index `i` of the first dimension, which goes away. */
  at(i: number): Tensor {
    const slice = this.slice(0, i, i + 1);
    return new Tensor(this.storage, slice.byteOffset, this.dtype, this.shape.slice(1), this.strides.slice(1));
  }
  transpose(a = -2, b = -1): Tensor {
    const [i, j] = [a, b].map((d) => (d < 0 ? d + this.shape.length : d)) as [number, number];
    const swap = (values: readonly number[]) => values.with(i, values[j]!).with(j, values[i]!);
    return new Tensor(this.storage, this.byteOffset, this.dtype, swap(this.shape), swap(this.strides));
  }
  /** Broadcast to `shape` with strides of 0 (numpy rules). */
  expand(...shape: number[]): Tensor {
    const lead = shape.length - this.shape.length;
    const strides = shape.map((size, d) => {
      const own = d < lead ? 1 : this.shape[d - lead]!;
      if (own !== size && own !== 1) throw bug(`expand [${this.shape.join(', ')}] to [${shape.join(', ')}]`);
      return own === size && d >= lead ? this.strides[d - lead]! : 0;
    });
    return new Tensor(this.storage, this.byteOffset, this.dtype, shape, strides);
  }

  /** The values as they are in memory; contiguous tensors only. Waits for the queue. */
  async bytesOut(): Promise<Uint8Array> {
    if (!this.contiguous) throw bug('download of a tensor that is not contiguous');
    const into = new Uint8Array(this.bytes);
    if (into.length > 0) await this.device.download(this.buffer, this.byteOffset, into);
    return into;
  }
  async float32(): Promise<Float32Array> {
    this.#expect('f32');
    return new Float32Array((await this.bytesOut()).buffer);
  }
  async int32(): Promise<Int32Array> {
    this.#expect('i32');
    return new Int32Array((await this.bytesOut()).buffer);
  }
  async int8(): Promise<Int8Array> {
    this.#expect('i8');
    return new Int8Array((await this.bytesOut()).buffer);
  }
  #expect(dtype: DType): void {
    if (this.dtype !== dtype) throw bug(`download of a ${this.dtype} tensor as ${dtype}`);
  }

  /** This tensor as bytes for a writer: goes from the device to the file without the JS heap. */
  source(): ByteSource {
    if (!this.contiguous) throw bug('writing a tensor that is not contiguous');
    return {
      byteLength: this.bytes,
      writeTo: (fd, position) => this.device.writeFile(this.buffer, this.byteOffset, fd, position, this.bytes),
    };
  }
}

type Data = Float32Array | Int32Array | Int8Array | Uint8Array | Uint16Array | Float64Array | BigInt64Array;

/**
 * Owns the tensors made through it and frees them when it ends (`using s = new Scope(device)`): memory is explicit,
 * never left to the garbage collector. Ops take the scope in which their outputs are to live.
 */
export class Scope implements Disposable {
  readonly device: Device;
  readonly #owned = new Set<Storage>();

  constructor(device: Device) {
    this.device = device;
  }

  /** New memory, contents undefined. */
  empty(dtype: DType, shape: readonly number[]): Tensor {
    const bytes = Math.max(elementCount(shape) * dtypeSize(dtype), 1);
    const storage = { device: this.device, buffer: this.device.alloc(bytes), bytes, freed: false };
    this.#owned.add(storage);
    return new Tensor(storage, 0, dtype, [...shape], contiguousStrides(shape));
  }
  zeros(dtype: DType, shape: readonly number[]): Tensor {
    const tensor = this.empty(dtype, shape);
    if (tensor.count > 0) this.device.run('fill', [tensor], [], [0]);
    return tensor;
  }
  /** Copies `data` to the device now; the array may change afterwards. */
  from(dtype: DType, shape: readonly number[], data: Data): Tensor {
    const tensor = this.empty(dtype, shape);
    if (data.byteLength !== tensor.bytes) {
      throw bug(`upload of ${data.byteLength} bytes into ${dtype} [${shape.join(', ')}] (${tensor.bytes} bytes)`);
    }
    if (tensor.count > 0)
      this.device.upload(tensor.buffer, 0, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
    return tensor;
  }
  /** Frees `tensors` before the scope ends. */
  free(...tensors: Tensor[]): void {
    for (const { storage } of tensors) {
      if (!this.#owned.delete(storage)) throw bug('freeing a tensor of another scope');
      this.#release(storage);
    }
  }
  owns(tensor: Tensor): boolean {
    return this.#owned.has(tensor.storage);
  }
  /** Hands `tensor` over to the scope `to`. */
  move(tensor: Tensor, to: Scope): Tensor {
    if (!this.#owned.delete(tensor.storage)) throw bug('moving a tensor of another scope');
    to.#owned.add(tensor.storage);
    return tensor;
  }
  [Symbol.dispose](): void {
    for (const storage of this.#owned) this.#release(storage);
    this.#owned.clear();
  }
  #release(storage: Storage): void {
    storage.freed = true;
    this.device.free(storage.buffer);
  }
}
