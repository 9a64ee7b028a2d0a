import { afterAll, beforeAll, describe, expect } from 'vitest';
import type { Device } from '../../src/backend/device.js';
import { openDevice } from '../../src/backend/load.js';
import { dtypeSize, elementCount, type DType, type FloatDType } from '../../src/base/dtype.js';
import type { Scope } from '../../src/tensor/tensor.js';
import { Tensor } from '../../src/tensor/tensor.js';

// Fresh data on every run; the seed stands in the suite's name, so that a failure can be repeated.
const seed = Number(process.env.DEEPSEEK_CONVERT_TEST_SEED ?? Date.now() % 1_000_000);

export type Values = Float64Array;
export const floatDTypes: readonly FloatDType[] = ['f32', 'bf16', 'f16'];

/** Seeded numbers (mulberry32), one stream a suite. */
export class Random {
  #state: number;
  constructor(state = seed) {
    this.#state = state;
  }
  uniform(low = 0, high = 1): number {
    this.#state = (this.#state + 0x6d2b79f5) | 0;
    let t = Math.imul(this.#state ^ (this.#state >>> 15), 1 | this.#state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return low + (((t ^ (t >>> 14)) >>> 0) / 2 ** 32) * (high - low);
  }
  integer(low: number, high: number): number {
    return low + Math.floor(this.uniform() * (high - low + 1));
  }
  normal(): number {
    return Math.sqrt(-2 * Math.log(1 - this.uniform())) * Math.cos(2 * Math.PI * this.uniform());
  }
  normals(n: number, deviation = 1): Values {
    return Float64Array.from({ length: n }, () => deviation * this.normal());
  }
}

/** A suite that runs on every device there is to test: the CPU, and CUDA when DEEPSEEK_CONVERT_TEST_CUDA=1. */
export function onDevices(title: string, body: (device: () => Device, random: Random) => void): void {
  const kinds = process.env.DEEPSEEK_CONVERT_TEST_CUDA === '1' ? (['cpu', 'cuda'] as const) : (['cpu'] as const);
  const isa = process.env.DEEPSEEK_CONVERT_ISA;
  for (const kind of kinds) {
    describe(`${title} on ${kind}${kind === 'cpu' && isa ? ` (${isa})` : ''}, seed ${seed}`, () => {
      let device: Device | undefined;
      beforeAll(() => {
        device = openDevice({ kind, poison: true });
      });
      afterAll(() => {
        expect(device?.memory().buffers, 'buffers left').toBe(0);
        device?.close();
      });
      body(() => device!, new Random());
    });
  }
}

// --- numbers as bytes ---
const f32 = new Float32Array(1);
const u32 = new Uint32Array(f32.buffer);
const bf16Bits = (x: number): number => {
  f32[0] = x;
  const u = u32[0]!;
  if ((u & 0x7fffffff) > 0x7f800000) return (u >>> 16) | 0x40;
  return ((u + 0x7fff + ((u >>> 16) & 1)) >>> 16) & 0xffff;
};
const fromBf16 = (h: number): number => {
  u32[0] = h << 16;
  return f32[0]!;
};
const fromF16 = (h: number): number => {
  const sign = h & 0x8000 ? -1 : 1;
  const e = (h >> 10) & 31;
  const m = h & 1023;
  return sign * (e === 31 ? (m ? NaN : Infinity) : e === 0 ? m * 2 ** -24 : (1 + m / 1024) * 2 ** (e - 15));
};
/** Nearest f16, ties to even, by search among the neighbours of the truncated value. */
const f16Bits = (x: number): number => {
  if (Number.isNaN(x)) return 0x7e00;
  const sign = x < 0 || Object.is(x, -0) ? 0x8000 : 0;
  const a = Math.abs(x);
  if (a >= 65520) return sign | 0x7c00;
  const e = Math.max(-14, Math.floor(Math.log2(a || 2 ** -30)));
  const steps = a / 2 ** (e - 10);
  let n = Math.floor(steps);
  if (steps - n > 0.5 || (steps - n === 0.5 && n % 2 === 1)) n++;
  return sign | (e === -14 ? n : ((e + 15) << 10) + (n - 1024));
};

type Array_ = Float32Array | Float64Array | Uint16Array | Int8Array | Uint8Array | Int16Array | Int32Array | Uint32Array | BigInt64Array | BigUint64Array; // prettier-ignore
const arrays: Record<DType, new (buffer: ArrayBuffer) => Array_> = {
  f32: Float32Array,
  bf16: Uint16Array,
  f16: Uint16Array,
  f64: Float64Array,
  i8: Int8Array,
  u8: Uint8Array,
  i16: Int16Array,
  u16: Uint16Array,
  i32: Int32Array,
  u32: Uint32Array,
  i64: BigInt64Array,
  u64: BigUint64Array,
  bool: Uint8Array,
  f8_e4m3: Uint8Array,
  f8_e5m2: Uint8Array,
};
function write(array: Array_, dtype: DType, i: number, x: number): void {
  if (array instanceof BigInt64Array || array instanceof BigUint64Array) array[i] = BigInt(x);
  else array[i] = dtype === 'bf16' ? bf16Bits(x) : dtype === 'f16' ? f16Bits(x) : x;
}
function read(array: Array_, dtype: DType, i: number): number {
  const x = Number(array[i]);
  return dtype === 'bf16' ? fromBf16(x) : dtype === 'f16' ? fromF16(x) : x;
}
/** The values as `dtype` can hold them. */
export function rounded(dtype: DType, values: ArrayLike<number>): Values {
  const array = new arrays[dtype](new ArrayBuffer(values.length * dtypeSize(dtype)));
  return Float64Array.from(values, (x, i) => {
    write(array, dtype, i, x);
    return read(array, dtype, i);
  });
}

// --- tensors ---
export interface Layout {
  /** Dimensions from slowest to fastest in memory; default: as they come. */
  order?: readonly number[];
  /** Unused elements after each run of the fastest dimension, and before the first element. */
  pad?: number;
}

/** A view of new memory in the given layout, everything else in it NaN patterns. */
export function strided(s: Scope, dtype: DType, shape: readonly number[], layout: Layout = {}): Tensor {
  const order = layout.order ?? shape.map((_, d) => d);
  const pad = layout.pad ?? 0;
  const strides = shape.map(() => 0);
  let step = 1;
  for (let k = order.length - 1; k >= 0; k--) {
    strides[order[k]!] = step;
    step *= shape[order[k]!]!;
    if (k === order.length - 1) step += pad;
  }
  const whole = s.from(
    'u8',
    [(step + pad) * dtypeSize(dtype)],
    new Uint8Array((step + pad) * dtypeSize(dtype)).fill(255),
  );
  return new Tensor(whole.storage, pad * dtypeSize(dtype), dtype, [...shape], strides);
}

/** A tensor of `values` (row-major), rounded to `dtype`. */
export function tensor(
  s: Scope,
  dtype: DType,
  shape: readonly number[],
  values: ArrayLike<number>,
  layout: Layout = {},
): Tensor {
  expect(values.length).toBe(elementCount(shape));
  const view = strided(s, dtype, shape, layout);
  const bytes = new Uint8Array(view.storage.bytes).fill(255);
  const array = new arrays[dtype](bytes.buffer);
  const first = view.byteOffset / dtypeSize(dtype);
  forEachOffset(view, (offset, i) => write(array, dtype, first + offset, values[i]!));
  if (bytes.length > 0) s.device.upload(view.buffer, 0, bytes);
  return view;
}

function forEachOffset(t: Tensor, visit: (offset: number, i: number) => void): void {
  const index = t.shape.map(() => 0);
  for (let i = 0, offset = 0; i < t.count; i++) {
    visit(offset, i);
    for (let d = index.length - 1; d >= 0; d--) {
      offset += t.strides[d]!;
      if (++index[d]! < t.shape[d]!) break;
      offset -= t.shape[d]! * t.strides[d]!;
      index[d] = 0;
    }
  }
}

/** The values of any view, row-major; does not use the op `copy`. */
export async function valuesOf(t: Tensor): Promise<Values> {
  const bytes = new Uint8Array(Math.floor(t.storage.bytes / 8) * 8 + 8);
  await t.device.download(t.buffer, 0, bytes.subarray(0, t.storage.bytes));
  const array = new arrays[t.dtype](bytes.buffer);
  const out = new Float64Array(t.count);
  const first = t.byteOffset / dtypeSize(t.dtype);
  forEachOffset(t, (offset, i) => (out[i] = read(array, t.dtype, first + offset)));
  return out;
}

// --- comparison ---
/** Squared error relative to the expected energy; NaN or infinity must stand at the same places. */
export function nmse(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  expect(actual.length).toBe(expected.length);
  let error = 0;
  let energy = 0;
  for (let i = 0; i < expected.length; i++) {
    const [a, e] = [actual[i]!, expected[i]!];
    if (!Number.isFinite(e) || !Number.isFinite(a)) {
      if (!Object.is(a, e)) return Infinity;
      continue;
    }
    error += (a - e) ** 2;
    energy += e ** 2;
  }
  return error === 0 ? 0 : error / Math.max(energy, 1e-30);
}

/** Square of the largest relative error of one rounding to the dtype; for f32, of fp32 sums of some thousand terms. */
export const nmseBound: Record<FloatDType, number> = { f32: 1e-11, bf16: 1.6e-5, f16: 2.5e-7 };

/** Compares a device tensor with expected values: NMSE within the bound of its dtype times `room`. */
export async function expectClose(actual: Tensor, expected: ArrayLike<number>, room = 1): Promise<void> {
  const bound = nmseBound[actual.dtype as FloatDType] * room;
  const got = await valuesOf(actual);
  const error = nmse(got, expected);
  if (!(error <= bound)) {
    const worst = Array.from(got, (g, i) => [Math.abs(g - expected[i]!), i] as const)
      .map(([d, i]) => [Number.isNaN(d) && !Object.is(got[i], expected[i]) ? Infinity : d, i] as const)
      .reduce((a, b) => (b[0] > a[0] ? b : a), [-1, -1]);
    const at = worst[1];
    expect.fail(`NMSE ${error} > ${bound} for ${actual.dtype} [${actual.shape.join(', ')}]; worst at ${at}: got ${got[at]}, expected ${expected[at]}`); // prettier-ignore
  }
}

/** Exact equality of every value. */
export async function expectSame(actual: Tensor, expected: ArrayLike<number>): Promise<void> {
  expect(Array.from(await valuesOf(actual))).toEqual(Array.from(expected));
}

/** The bytes of an op's output, to compare two runs. */
export async function bytesOf(t: Tensor): Promise<Buffer> {
  return Buffer.from(await t.bytesOut());
}
