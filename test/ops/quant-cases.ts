/** Inputs and expected values of the quantization ops: the TypeScript half of fixtures/ops/make_quant.py. */
import { readFileSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

/** Integers in [-510, 510] from a hash of (seed, index): `noise` of make_quant.py. */
export function noise(seed: number, count: number): Float32Array {
  const out = new Float32Array(count);
  for (let i = 0; i < count; i++) {
    let x = (Math.imul(i, 2654435761) + seed) >>> 0;
    x = Math.imul(x ^ (x >>> 16), 0x85ebca6b) >>> 0;
    x = Math.imul(x ^ (x >>> 13), 0xc2b2ae35) >>> 0;
    x = (x ^ (x >>> 16)) >>> 0;
    out[i] = (x & 255) + ((x >>> 8) & 255) - ((x >>> 16) & 255) - (x >>> 24);
  }
  return out;
}

/** Correlated integer inputs [t, k] with a few strong channels. */
export function activations(seed: number, t: number, k: number): Float32Array {
  const z = noise(seed, t * k).map((v) => Math.trunc(v / 64));
  const at = (r: number, c: number) => z[r * k + (((c % k) + k) % k)]!;
  return z.map((_, i) => {
    const [r, c] = [Math.floor(i / k), i % k];
    return (at(r, c) + at(r, c - 1) + at(r, c - 5)) * (c % 17 === 0 ? 4 : 1);
  });
}

export function weights(seed: number, n: number, k: number): Float32Array {
  return noise(seed, n * k).map((v, i) => (v / 4096) * ((i % k) % 23 === 0 ? 3 : 1));
}

/** X'X in float64, full. */
export function gram(x: Float32Array, k: number): Float64Array {
  const h = new Float64Array(k * k);
  for (let t = 0; t < x.length; t += k) {
    for (let i = 0; i < k; i++) {
      const s = x[t + i]!;
      for (let j = 0; j < k; j++) h[i * k + j]! += s * x[t + j]!;
    }
  }
  return h;
}

/** Rows and columns of a square matrix in the order `perm`. */
export function permuted<T extends Float32Array | Float64Array>(h: T, perm: ArrayLike<number>): T {
  const k = perm.length;
  return h.map((_, i) => h[perm[Math.floor(i / k)]! * k + perm[i % k]!]!) as T;
}

export function columns(w: Float32Array, perm: ArrayLike<number>): Float32Array {
  const k = perm.length;
  return w.map((_, i) => w[i - (i % k) + perm[i % k]!]!);
}

interface Entry {
  dtype: 'F32' | 'I8' | 'I32' | 'U8' | 'F64';
  shape: number[];
  data_offsets: [number, number];
}

/** The tensors and the JSON metadata of a small safetensors file. */
export function fixture(name: string) {
  const file = readFileSync(fileURLToPath(new URL(`../../fixtures/ops/${name}.safetensors`, import.meta.url)));
  const length = Number(file.readBigUInt64LE(0));
  const header = JSON.parse(file.toString('utf8', 8, 8 + length)) as Record<string, Entry>;
  const { __metadata__: metadata, ...entries } = header as unknown as Record<string, Entry> & {
    __metadata__: Record<string, string>;
  };
  const bytes = (key: string, dtype: Entry['dtype']): ArrayBuffer => {
    const entry = (entries as Record<string, Entry>)[key];
    if (entry?.dtype !== dtype) throw new Error(`no ${dtype} tensor ${key} in fixtures/ops/${name}.safetensors`);
    const [from, to] = entry.data_offsets;
    return Uint8Array.from(file.subarray(8 + length + from, 8 + length + to)).buffer;
  };
  return {
    has: (key: string) => key in entries,
    f32: (key: string) => new Float32Array(bytes(key, 'F32')),
    f64: (key: string) => new Float64Array(bytes(key, 'F64')),
    i8: (key: string) => new Int8Array(bytes(key, 'I8')),
    u8: (key: string) => new Uint8Array(bytes(key, 'U8')),
    i32: (key: string) => new Int32Array(bytes(key, 'I32')),
    shape: (key: string) => (entries as Record<string, Entry>)[key]!.shape,
    meta: <T>(key: string) => JSON.parse(metadata[key] ?? 'null') as T,
  };
}

/** Mean squared difference over the mean square of what is expected. */
export function nmse(got: ArrayLike<number>, expected: ArrayLike<number>): number {
  let [difference, energy] = [0, 0];
  if (got.length !== expected.length) return NaN;
  for (let i = 0; i < expected.length; i++) {
    difference += (got[i]! - expected[i]!) ** 2;
    energy += expected[i]! ** 2;
  }
  return difference / (energy || 1);
}
