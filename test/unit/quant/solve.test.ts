import { describe, expect, it } from 'vitest';
import { hessianAdd, symmetrize, dequantize } from '../../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../../src/tensor/tensor.js';
import { statisticsOf, type Statistics } from '../../../src/quant/capture.js';
import { byFallingEnergy, gptq, total } from '../../../src/quant/gptq.js';
import { defaultRecipe, type Recipe, type Scheme } from '../../../src/quant/scheme.js';
import { solve } from '../../../src/quant/solve.js';
import { expected, fixture, testEnv } from '../../arch/support.js';

const { device } = testEnv();
const given = expected(fixture('quant', 'gptq.safetensors'));
const [n, k, t] = [24, 96, 256];
const g32: Scheme = { bits: 4, group: 32, symmetric: true };
const unrefined: Recipe = { ...defaultRecipe, refine: { rounds: 0, passes: 0 } };

const uniform = (seed: number) => () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 2 ** 32 - 0.5;
};
const noise = (seed: number, count: number): Float32Array => {
  const draw = uniform(seed);
  return Float32Array.from({ length: count }, () => draw() + draw() + draw());
};

async function statistics(scope: Scope, x: Float32Array, columns: number): Promise<Statistics> {
  const tokens = x.length / columns;
  const h = scope.zeros('f32', [columns, columns]);
  hessianAdd(h, scope.from('f32', [tokens, columns], x), { alpha: 1 / tokens });
  symmetrize(h);
  return await statisticsOf(h, tokens, scope, 'test');
}

/** tr((W - Q) X'X (W - Q)') / T in doubles. */
function errorOf(w: Float32Array, q: Float32Array, x: Float32Array, columns: number): number {
  const [rows, tokens] = [w.length / columns, x.length / columns];
  let sum = 0;
  for (let i = 0; i < rows; i++) {
    for (let s = 0; s < tokens; s++) {
      let y = 0;
      for (let j = 0; j < columns; j++) y += (w[i * columns + j]! - q[i * columns + j]!) * x[s * columns + j]!;
      sum += y * y;
    }
  }
  return sum / tokens;
}

const wOf = (scope: Scope): Tensor => scope.from('f32', [n, k], given.w!.f32);

describe('gptq', () => {
  it('finds the scales and codes of the textbook form in float64', async () => {
    using scope = new Scope(device);
    const solved = await gptq(scope, wOf(scope), await statistics(scope, given.x!.f32, k), g32, unrefined, 'bf16');
    const scales = await solved.grid.scale.float32();
    const differing = scales.filter((scale, i) => Math.abs(scale - given.scales!.f32[i]!) > 1e-6 * Math.abs(scale));
    // Two multiples can give errors that differ in the last bits only.
    expect(differing.length).toBeLessThanOrEqual(1);
    const codes = await solved.codes.int8();
    const reference = given.codes!.i32;
    const other = codes.filter((code, i) => code !== reference[i]).length;
    expect(other / codes.length).toBeLessThan(0.005);
    const wanted = total(given.errors!.f32);
    expect(total(solved.errors)).toBeGreaterThan(0.98 * wanted);
    expect(total(solved.errors)).toBeLessThan(1.02 * wanted);
  });

  it('reports the error that its codes have', async () => {
    using scope = new Scope(device);
    const solved = await gptq(scope, wOf(scope), await statistics(scope, given.x!.f32, k), g32, defaultRecipe, 'bf16');
    const q = await dequantize(scope, solved.codes, solved.grid).float32();
    const exact = errorOf(given.w!.f32, q, given.x!.f32, k);
    expect(total(solved.errors) / exact).toBeGreaterThan(0.999);
    expect(total(solved.errors) / exact).toBeLessThan(1.001);
  });

  it('gains by refinement, by the order of columns, and by the search of scales', async () => {
    using scope = new Scope(device);
    const stats = await statistics(scope, given.x!.f32, k);
    const error = async (recipe: Recipe) => total((await gptq(scope, wOf(scope), stats, g32, recipe, 'bf16')).errors);
    const refined = await error(defaultRecipe);
    const plain = await error(unrefined);
    expect(refined).toBeLessThan(0.97 * plain);
    expect(plain).toBeLessThan(await error({ ...unrefined, order: false }));
    expect(plain).toBeLessThan(await error({ ...unrefined, search: { points: 1, from: 1, to: 1, freeSign: false } }));
  });

  it('keeps scales to what their stored precision can hold', async () => {
    using scope = new Scope(device);
    const stats = await statistics(scope, given.x!.f32, k);
    for (const [dtype, drop] of [
      ['bf16', 16],
      ['f16', 13],
    ] as const) {
      const { grid } = await gptq(scope, wOf(scope), stats, g32, defaultRecipe, dtype);
      const bits = new Uint32Array((await grid.scale.float32()).buffer);
      expect(bits.every((word) => word % 2 ** drop === 0)).toBe(true);
    }
  });

  it('sweeps equal energies in their own order', () => {
    expect([...byFallingEnergy(Float32Array.of(1, 3, 1, 3, 2))]).toEqual([1, 3, 4, 0, 2]);
  });
});

describe('solve', () => {
  const schemes: [string, Scheme][] = [
    ['symmetric groups', g32],
    ['asymmetric groups', { bits: 4, group: 32, symmetric: false }],
    ['one scale a row', { bits: 4, group: 0, symmetric: true }],
    ['8 bits', { bits: 8, group: 32, symmetric: true }],
  ];
  for (const [name, scheme] of schemes) {
    it(`is far better than rounding with ${name}`, async () => {
      using scope = new Scope(device);
      const stats = await statistics(scope, given.x!.f32, k);
      const solution = await solve(scope, wOf(scope), stats, scheme, defaultRecipe, 'bf16');
      const q = await dequantize(scope, solution.codes, solution.grid).float32();
      const exact = errorOf(given.w!.f32, q, given.x!.f32, k);
      expect(total(solution.errors) / exact).toBeCloseTo(1, 2);
      expect(total(solution.errors)).toBeLessThan(0.7 * total(solution.plain));
      const codes = await solution.codes.int8();
      const top = 2 ** (scheme.bits - 1);
      expect(codes.every((code) => code >= -top && code < top)).toBe(true);
      const zero = await solution.grid.zero?.float32();
      expect(zero === undefined).toBe(scheme.symmetric);
      expect(zero?.every((z) => Number.isInteger(z) && z >= -top && z < top) ?? true).toBe(true);
    });
  }

  it('never leaves a row worse than plain rounding, and says which rows fell back', async () => {
    using scope = new Scope(device);
    const stats = await statistics(scope, given.x!.f32, k);
    // A recipe that is bad on purpose: every grid far too narrow.
    const bad: Recipe = { ...unrefined, search: { points: 1, from: 0.2, to: 0.2, freeSign: false } };
    const solution = await solve(scope, wOf(scope), stats, g32, bad, 'bf16');
    expect(solution.fallbackRows.filter(Boolean).length).toBeGreaterThan(n / 2);
    solution.errors.forEach((error, i) => expect(error).toBeLessThanOrEqual(solution.plain[i]!));
    const q = await dequantize(scope, solution.codes, solution.grid).float32();
    expect(total(solution.errors) / errorOf(given.w!.f32, q, given.x!.f32, k)).toBeCloseTo(1, 2);
  });

  const hostile: [string, (x: Float32Array, w: Float32Array) => void][] = [
    ['dead input channels', (x) => x.forEach((_, i) => i % k < 40 && (x[i] = 0))],
    ['a single token', (x) => x.fill(0, k)],
    ['two equal channels', (x) => x.forEach((_, i) => i % k === 1 && (x[i] = x[i - 1]!))],
    ['one channel a million times as strong', (x) => x.forEach((_, i) => i % k === 7 && (x[i]! *= 1e6))],
    ['a group of zeros', (_, w) => w.forEach((_v, i) => i % k < 32 && (w[i] = 0))],
    ['a row of zeros', (_, w) => w.fill(0, 0, k)],
    ['tiny weights', (_, w) => w.forEach((v, i) => (w[i] = v * 1e-30))],
  ];
  const each = schemes.flatMap(([kind, scheme]) => hostile.map(([name, spoil]) => ({ kind, scheme, name, spoil })));
  for (const { kind, scheme, name, spoil } of each) {
    it(`copes with ${name}: ${kind}`, async () => {
      using scope = new Scope(device);
      const [x, w] = [noise(3, t * k), noise(4, n * k).map((v) => v * 0.05)];
      spoil(x, w);
      const stats = await statistics(scope, x, k);
      const solution = await solve(scope, scope.from('f32', [n, k], w), stats, scheme, defaultRecipe, 'bf16');
      const q = await dequantize(scope, solution.codes, solution.grid).float32();
      expect(q.every(Number.isFinite)).toBe(true);
      const largest = Math.max(...w.map(Math.abs));
      // Feedback moves weights of correlated channels, but nothing may run away.
      expect(Math.max(...q.map((v, i) => Math.abs(v - w[i]!)))).toBeLessThan(2 * largest);
      w.forEach((v, i) => name.includes('zeros') && v === 0 && expect(Math.abs(q[i]!)).toBe(0));
      expect(total(solution.errors)).toBeLessThanOrEqual(total(solution.plain));
    });
  }

  it('names the linear whose inputs are not finite', async () => {
    using scope = new Scope(device);
    const x = noise(5, t * k);
    x[5 * k + 3] = Infinity;
    await expect(statistics(scope, x, k)).rejects.toThrow(/not finite[\s\S]*test, input channel 3/);
  });

  it('rounds on the best grid without statistics', async () => {
    using scope = new Scope(device);
    const solution = await solve(scope, wOf(scope), undefined, g32, { ...defaultRecipe, method: 'rtn' }, 'bf16');
    const q = await dequantize(scope, solution.codes, solution.grid).float32();
    const squares = q.reduce((sum, v, i) => sum + (v - given.w!.f32[i]!) ** 2, 0);
    expect(total(solution.errors) / squares).toBeCloseTo(1, 3);
    expect(total(solution.errors)).toBeLessThan(0.95 * total(solution.plain));
  });
});
