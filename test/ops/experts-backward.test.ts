import { describe, expect, it } from 'vitest';
import {
  choiceGradient,
  expertCombine,
  expertCombineBackward,
  expertSort,
  groupedGemm,
  groupedOuter,
  route,
  routeBackward,
  type RouteOptions,
} from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { bytesOf, nmse, onDevices, rounded, tensor, valuesOf } from './support.js';

/** d f / d x_i by central differences. */
async function slopes(x: Float64Array, f: (x: Float64Array) => Promise<number>, step = 1e-2): Promise<Float64Array> {
  const out = new Float64Array(x.length);
  for (let i = 0; i < x.length; i++) {
    const at = (d: number) => f(x.map((v, j) => (i === j ? v + d : v)));
    out[i] = ((await at(step)) - (await at(-step))) / (2 * step);
  }
  return out;
}
const dot = (a: ArrayLike<number>, b: ArrayLike<number>) => Array.from(a).reduce((sum, v, i) => sum + v * b[i]!, 0);

onDevices('gradients of experts', (device, random) => {
  const [T, E, K, C] = [7, 6, 2, 5];

  const scorings: [string, RouteOptions][] = [
    ['softmax', { topK: K, scoring: 'softmax' }],
    ['softmax, normalised', { topK: K, scoring: 'softmax', normalize: true, scale: 1.5 }],
    ['sigmoid', { topK: K, scoring: 'sigmoid', scale: 2.5 }],
    ['sigmoid, normalised', { topK: K, scoring: 'sigmoid', normalize: true, scale: 2.5 }],
    ['sqrt softplus, normalised', { topK: K, scoring: 'sqrtsoftplus', normalize: true }],
  ];
  it.each(scorings)('route, %s: differences', async (_, options) => {
    using s = new Scope(device());
    // Far enough apart that no step changes the choice.
    const logits = Float64Array.from({ length: T * E }, (_, i) => ((i * 7) % E) * 0.7 + 0.2 * random.uniform());
    const dw = random.normals(T * K);
    const f = async (x: Float64Array) => {
      using inner = new Scope(device());
      return dot(await valuesOf(route(inner, tensor(inner, 'f32', [T, E], x), options).w), dw);
    };
    const x = tensor(s, 'f32', [T, E], logits);
    const { idx } = route(s, x, options);
    const got = routeBackward(s, tensor(s, 'f32', [T, K], dw), { logits: x, idx }, options);
    expect(nmse(await valuesOf(got), await slopes(logits, f))).toBeLessThan(1e-4);
  });

  /** Of the soft choice in double precision, tau by bisection: value and, by central differences, its slopes. */
  function softChoice(scores: Float64Array, c: Float64Array, experts: number, active: number, temperature: number) {
    const value = (row: Float64Array, gains: Float64Array): number => {
      let [low, high] = [Math.min(...row) - 50 * temperature, Math.max(...row) + 50 * temperature];
      const p = (tau: number) => row.map((v) => 1 / (1 + Math.exp((tau - v) / temperature)));
      const chosen = (tau: number) => {
        let sum = 0;
        for (const v of row) sum += 1 / (1 + Math.exp((tau - v) / temperature));
        return sum;
      };
      for (let i = 0; i < 60; i++) {
        const middle = (low + high) / 2;
        if (chosen(middle) > active) low = middle;
        else high = middle;
      }
      return dot(p(low), gains);
    };
    return scores.map((_, i) => {
      const first = i - (i % experts);
      const [row, gains] = [scores, c].map((x) => x.slice(first, first + experts)) as [Float64Array, Float64Array];
      const at = (d: number) => value(row.with(i - first, scores[i]! + d), gains);
      const step = 1e-4 * temperature;
      return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step);
    });
  }

  it.each([
    [9, 7, 3, 1, 'f32'],
    [9, 65, 48, 0.25, 'f32'],
    [6, 2, 1, 0.5, 'f32'],
    [5, 40, 39, 1, 'f32'],
    [3, 64, 1, 0.05, 'f32'],
    [4, 33, 8, 0.7, 'bf16'],
  ] as const)(
    'choice_gradient, %i tokens, %i of which %i, temperature %d, %s: differences',
    async (tokens, experts, active, temperature, dtype) => {
      using s = new Scope(device());
      const scores = rounded(dtype, random.normals(tokens * experts));
      const c = rounded(
        dtype,
        random.normals(tokens * experts).map((v) => v * v),
      );
      const want = softChoice(scores, c, experts, active, temperature).map((v) => -0.125 * v);
      // One side by columns, the other with gaps.
      const x = tensor(s, dtype, [tokens, experts], scores, { order: [1, 0] });
      const gains = tensor(s, dtype, [tokens, experts], c, { pad: 3 });
      const got = choiceGradient(s, x, gains, { active, temperature, scale: -0.125 });
      expect(nmse(await valuesOf(got), want)).toBeLessThan(1e-9);
      const again = choiceGradient(s, x, gains, { active, temperature, scale: -0.125 });
      expect(await bytesOf(again)).toEqual(await bytesOf(got));
    },
  );

  it('choice_gradient of equal scores, and of scores far apart', async () => {
    using s = new Scope(device());
    const c = [1, 2, 3, 6, 1, 2, 3, 6];
    const x = tensor(s, 'f32', [2, 4], [2, 2, 2, 2, 900, -900, 2, 2]);
    const got = await valuesOf(
      choiceGradient(s, x, tensor(s, 'f32', [2, 4], c), { active: 2, temperature: 0.5, scale: 1 }),
    );
    // p = 1/2 everywhere: q / temperature = 1/2 times c less its mean; one taken, one out: the others share one place.
    expect(nmse(got, [-1, -0.5, 0, 1.5, 0, 0, -0.75, 0.75])).toBeLessThan(1e-11);
  });

  it('expert_combine: differences', async () => {
    using s = new Scope(device());
    const idx = s.from(
      'i32',
      [T, K],
      Int32Array.from({ length: T * K }, (_, i) => (i * 5 + (i % 3)) % E),
    );
    const { place } = expertSort(s, idx, E);
    const [y, w, d] = [random.normals(T * K * C), random.normals(T * K), random.normals(T * C)];
    const f = async (values: Float64Array) => {
      using inner = new Scope(device());
      const of = tensor(inner, 'f32', [T * K, C], values.subarray(0, T * K * C));
      const weight = tensor(inner, 'f32', [T, K], values.subarray(T * K * C));
      return dot(await valuesOf(expertCombine(inner, of, place, weight)), d);
    };
    const ty = tensor(s, 'f32', [T * K, C], y);
    const got = expertCombineBackward(s, tensor(s, 'f32', [T, C], d), { y: ty, place, w: tensor(s, 'f32', [T, K], w) });
    const want = await slopes(Float64Array.of(...y, ...w), f, 0.1);
    expect(nmse([...(await valuesOf(got.dy)), ...(await valuesOf(got.dw))], want)).toBeLessThan(1e-8);
  });

  describe('grouped_outer', () => {
    it('is the gradient of grouped_gemm for the weights, and adds up', async () => {
      using s = new Scope(device());
      const [R, N] = [9, 4];
      const offsets = s.from('i32', [4], Int32Array.of(0, 4, 4, 9));
      const [a, b, d, before] = [random.normals(R * C), random.normals(3 * N * C), random.normals(R * N), random.normals(3 * N * C)]; // prettier-ignore
      const x = tensor(s, 'f32', [R, C], a);
      const f = async (values: Float64Array) => {
        using inner = new Scope(device());
        return dot(await valuesOf(groupedGemm(inner, x, tensor(inner, 'f32', [3, N, C], values), offsets)), d);
      };
      const got = tensor(s, 'f32', [3, N, C], before);
      groupedOuter(got, tensor(s, 'f32', [R, N], d), x, offsets);
      const want = (await slopes(b, f, 0.1)).map((v, i) => v + before[i]!);
      expect(nmse(await valuesOf(got), want)).toBeLessThan(1e-8);
    });
  });
});
