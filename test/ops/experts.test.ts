import { expect, test } from 'vitest';
import { expertCombine, expertSort, gather, route, type RouteOptions } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture } from './quant-cases.js';
import { expectClose, expectSame, floatDTypes, onDevices, rounded, tensor, type Values } from './support.js';

const known = fixture('layers');

/** Routing by its definition: per token the chosen experts, best first, and their weights. */
function naive(logits: Values, E: number, o: Omit<RouteOptions, 'bias'>, bias?: ArrayLike<number>) {
  const idx: number[] = [];
  const w: number[] = [];
  for (let t = 0; t < logits.length / E; t++) {
    const x = Array.from(logits.subarray(t * E, t * E + E));
    const most = Math.max(...x);
    const sum = x.reduce((a, v) => a + Math.exp(v - most), 0);
    const score = x.map(
      (v) =>
      o.scoring === 'softmax' ? Math.exp(v - most) / sum : o.scoring === 'sigmoid' ? 1 / (1 + Math.exp(-v)) : Math.sqrt(Math.log1p(Math.exp(v))), // prettier-ignore
    );
    const choice = score.map((v, e) => v + (bias?.[e] ?? 0));
    const descending = (values: number[]) => values.map((_, i) => i).sort((a, b) => values[b]! - values[a]! || a - b);
    const groups = o.groups ?? 1;
    const per = E / groups;
    const groupScore = Array.from({ length: groups }, (_, g) => {
      const sorted = choice.slice(g * per, g * per + per).sort((a, b) => b - a);
      return o.groupScore === 'top2' ? sorted[0]! + (sorted[1] ?? 0) : sorted[0]!;
    });
    const open = new Set(descending(groupScore).slice(0, groups > 1 ? o.topGroups : 1));
    const chosen = descending(choice.map((v, e) => (open.has(Math.floor(e / per)) ? v : -Infinity))).slice(0, o.topK);
    const total = chosen.reduce((a, e) => a + score[e]!, 0);
    idx.push(...chosen);
    w.push(...chosen.map((e) => (score[e]! / (o.normalize ? total : 1)) * (o.scale ?? 1)));
  }
  return { idx, w };
}

onDevices('experts', (device, random) => {
  test('the router of DeepSeek-V3 and of Mixtral', async () => {
    using s = new Scope(device());
    const load = (name: string) => tensor(s, 'f32', known.shape(name), known.f32(name));
    const deep = route(s, load('route/deepseek_v3/logits'), {
      topK: 4,
      scoring: 'sigmoid',
      bias: load('route/deepseek_v3/bias'),
      groups: 4,
      topGroups: 2,
      groupScore: 'top2',
      normalize: true,
      scale: 2.5,
    });
    await expectSame(deep.idx, known.i32('route/deepseek_v3/idx'));
    await expectClose(deep.w, known.f32('route/deepseek_v3/w'));
    const mixtral = route(s, load('route/mixtral/logits'), { topK: 3, scoring: 'softmax', normalize: true });
    await expectSame(mixtral.idx, known.i32('route/mixtral/idx'));
    await expectClose(mixtral.w, known.f32('route/mixtral/w'));
  });

  const options: Omit<RouteOptions, 'topK' | 'bias'>[] = [
    { scoring: 'softmax' },
    { scoring: 'softmax', normalize: true, scale: 3 },
    { scoring: 'sigmoid', groups: 6, topGroups: 3 },
    { scoring: 'sigmoid', groups: 6, topGroups: 2, groupScore: 'top2', normalize: true },
    { scoring: 'sqrtsoftplus', normalize: true, scale: 1.5 },
  ];
  for (const [n, o] of options.entries()) {
    test(`${JSON.stringify(o)}`, async () => {
      using s = new Scope(device());
      const [T, E, topK] = [50, 24, 5];
      for (const dtype of floatDTypes) {
        const logits = rounded(dtype, random.normals(T * E));
        const bias = n % 2 ? rounded('f32', random.normals(E, 0.3)) : undefined;
        const x = tensor(s, dtype, [T, E], logits, { pad: 4 });
        const got = route(s, x, { ...o, topK, ...(bias ? { bias: tensor(s, 'f32', [E], bias) } : {}) });
        const expected = naive(logits, E, { ...o, topK }, bias);
        await expectSame(got.idx, expected.idx);
        await expectClose(got.w, expected.w);
      }
    });
  }

  test('ties go to the lower index; a NaN never gives an index out of range', async () => {
    using s = new Scope(device());
    const logits = tensor(s, 'f32', [2, 4], [1, 2, 2, 1, NaN, NaN, NaN, NaN]);
    const { idx } = route(s, logits, { topK: 3, scoring: 'sigmoid' });
    await expectSame(idx, [1, 2, 0, 0, 1, 2]);
  });

  test('sorted by expert, stable, and back', async () => {
    using s = new Scope(device());
    const [T, K, E, C] = [37, 3, 7, 21];
    const idx = Array.from({ length: T * K }, () => random.integer(0, E - 2)); // the last expert gets nothing
    const order = expertSort(s, tensor(s, 'i32', [T, K], idx), E);
    const slots = idx.map((_, i) => i).sort((a, b) => idx[a]! - idx[b]! || a - b);
    await expectSame(order.slots, slots);
    await expectSame(order.tokens, slots.map((i) => Math.floor(i / K))); // prettier-ignore
    await expectSame(
      order.offsets,
      Array.from({ length: E + 1 }, (_, e) => idx.filter((v) => v < e).length),
    );
    await expectSame(order.place, idx.map((_, i) => slots.indexOf(i))); // prettier-ignore
    for (const dtype of floatDTypes) {
      const [x, base] = [rounded(dtype, random.normals(T * C)), rounded(dtype, random.normals(T * C))];
      const w = rounded('f32', random.normals(T * K));
      const y = gather(s, tensor(s, dtype, [T, C], x), order.tokens);
      const sum = (i: number) =>
        w.subarray(Math.floor(i / C) * K, Math.floor(i / C) * K + K).reduce((a, v) => a + v, 0);
      const weights = tensor(s, 'f32', [T, K], w);
      await expectClose(expertCombine(s, y, order.place, weights), x.map((v, i) => v * sum(i)), 40); // prettier-ignore
      const plus = expertCombine(s, y, order.place, weights, tensor(s, dtype, [T, C], base));
      await expectClose(plus, x.map((v, i) => v * sum(i) + base[i]!)); // prettier-ignore
    }
    expertSort(s, tensor(s, 'i32', [1, 2], [0, 7]), 7);
    if (device().kind === 'cpu') await expect(device().sync()).rejects.toThrow('idx[0, 1] = 7 of 7');
    else
      await device()
        .sync()
        .catch(() => undefined);
  });

  test('no tokens', async () => {
    using s = new Scope(device());
    const { idx } = route(s, s.empty('f32', [0, 8]), { topK: 2, scoring: 'softmax' });
    const order = expertSort(s, idx, 8);
    await expectSame(order.offsets, new Array(9).fill(0));
  });
});
