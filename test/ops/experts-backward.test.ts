import { describe, expect, it } from 'vitest';
import {
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
import { nmse, onDevices, tensor, valuesOf } from './support.js';

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
