import { afterAll, describe, expect, it } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import {
  blockCodes,
  blockFormats,
  blockGrid,
  decode,
  dequantize,
  encode,
  quantize,
  type BlockFormatName,
  type EncodableName,
} from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { fixture, nmse, noise, weights } from './quant-cases.js';

const device = openDevice({ kind: 'cpu', poison: true });
afterAll(() => device.close());
const expected = fixture('quant');
const [n, k] = [4, 512];
const names = Object.keys(blockFormats) as BlockFormatName[];

/** Weighted squared error of each row after a round trip. */
async function rowErrors(s: Scope, name: EncodableName, values: Float32Array, weight?: Float32Array, steer?: Tensor) {
  const blocks = encode(s, s.from('f32', [n, k], values), name, steer);
  const back = await decode(s, blocks, name, [n, k], 'f32').float32();
  const errors = new Array<number>(n).fill(0);
  back.forEach((v, i) => (errors[Math.floor(i / k)]! += (weight?.[i % k] ?? 1) * (v - values[i]!) ** 2));
  return errors;
}

describe('encode', () => {
  for (const [name, reference] of Object.entries(expected.meta<Record<string, number[]>>('encode'))) {
    it(`${name} leaves no more error than ggml's search`, async () => {
      using s = new Scope(device);
      const errors = await rowErrors(s, name as BlockFormatName, weights(80000, n, k));
      errors.forEach((error, row) => {
        expect(error).toBeLessThan(reference[row]! * 1.0001);
        expect(error).toBeGreaterThan(reference[row]! * 0.5); // the same format: no miracle
      });
    });
  }
  for (const name of [...names, 'iq4_nl', 'mxfp4'] as const) {
    it(`${name}: importance weights lower the error that they weight`, async () => {
      using s = new Scope(device);
      const values = weights(81000, n, k);
      const weight = noise(5, k).map((v) => (v / 100) ** 4);
      const steered = await rowErrors(s, name, values, weight, s.from('f32', [k], weight));
      const plain = await rowErrors(s, name, values, weight);
      const sum = (x: number[]) => x.reduce((a, b) => a + b, 0);
      if (name === 'q8_0') expect(sum(steered)).toBeLessThanOrEqual(sum(plain));
      else expect(sum(steered)).toBeLessThan(0.98 * sum(plain));
    });
    it(`${name}: zeros, constants, huge, tiny and broken values`, async () => {
      using s = new Scope(device);
      const values = new Float32Array(n * k);
      values.fill(0.37, k, 2 * k);
      values.fill(-2, 2 * k, 2 * k + 256);
      for (let i = 0; i < 256; i++) values[2 * k + 256 + i] = (i - 100) * 1e-6;
      values.set(weights(1, 1, k), 3 * k);
      values[3 * k] = NaN;
      values[3 * k + 1] = Infinity;
      values[3 * k + 2] = 3e4;
      const blocks = encode(s, s.from('f32', [n, k], values), name);
      const back = await decode(s, blocks, name, [n, k], 'f32').float32();
      expect(back.every(Number.isFinite)).toBe(true);
      expect(back.subarray(0, k).every((v) => v === 0)).toBe(true);
      expect(nmse(back.subarray(k, 2 * k + 256), values.subarray(k, 2 * k + 256))).toBeLessThan(0.02);
      expect(back[3 * k + 2]!).toBeGreaterThan(1.5e4);
      const dead = encode(s, s.from('f32', [n, k], values), name, s.from('f32', [k], new Float32Array(k)));
      expect(await dead.bytesOut()).toEqual(await blocks.bytesOut());
    });
  }
});

describe('block_grid and block_codes', () => {
  for (const name of names) {
    it(`${name}: the grid is what decode makes of the codes, and any codes come back`, async () => {
      using s = new Scope(device);
      const w = s.from('f32', [n, k], weights(82000, n, k));
      const blocks = encode(s, w, name);
      const first = await decode(s, blocks, name, [n, k], 'f32').float32();
      const grid = blockGrid(s, blocks, name);
      const own = quantize(s, w, grid);
      expect(nmse(await dequantize(s, own, grid).float32(), first)).toBeLessThan(1e-9);
      const { low, high } = blockFormats[name];
      const codes = Int8Array.from(
        noise(3, n * k),
        (v) => low + (((v % (high - low + 1)) + high - low + 1) % (high - low + 1)),
      );
      const stored = s.from('i8', [n, k], codes);
      blockCodes(blocks, stored, name);
      const back = await decode(s, blocks, name, [n, k], 'f32').float32();
      expect(nmse(back, await dequantize(s, stored, grid).float32())).toBeLessThan(1e-11);
      expect(back).not.toEqual(first);
      blockCodes(blocks, own, name);
      expect(nmse(await decode(s, blocks, name, [n, k], 'f32').float32(), first)).toBeLessThan(1e-9);
    });
  }
  it('a block of zeros has a grid on which every code is next to nothing', async () => {
    using s = new Scope(device);
    for (const name of names) {
      const grid = blockGrid(s, encode(s, s.from('f32', [1, k], new Float32Array(k)), name), name);
      const codes = s.from('i8', [1, k], new Int8Array(k).fill(blockFormats[name].high));
      const back = await dequantize(s, codes, grid).float32();
      expect(back.every((v) => Math.abs(v) < 1e-20)).toBe(true);
    }
  });
});
