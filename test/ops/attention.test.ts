import { expect, test } from 'vitest';
import { attention, type AttentionOptions } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { bytesOf, expectClose, floatDTypes, onDevices, rounded, strided, tensor, valuesOf, type Values } from './support.js'; // prettier-ignore

interface Shape {
  B: number;
  S: number;
  T: number;
  H: number;
  Hk: number;
  D: number;
  Dv: number;
}
interface Plain extends Omit<AttentionOptions, 'lengths' | 'sinks' | 'lse'> {
  lengths?: number[];
  sinks?: number[];
}

/** Attention by its definition, in float64: o, lse and the rows of weights. */
function naive({ B, S, T, H, Hk, D, Dv }: Shape, q: Values, k: Values, v: Values, o: Plain) {
  const y = new Float64Array(B * S * H * Dv);
  const lse = new Float64Array(B * H * S);
  for (let b = 0; b < B; b++)
    for (let h = 0; h < H; h++)
      for (let s = 0; s < S; s++) {
        const g = Math.floor(h / (H / Hk));
        const at = s + (o.offset ?? 0);
        const scores = new Map<number, number>();
        for (let t = 0; t < Math.min(T, o.lengths?.[b] ?? T); t++) {
          if ((o.causal ?? true) && t > at) continue;
          if (o.window && t <= at - o.window) continue;
          let x = 0;
          for (let d = 0; d < D; d++) x += q[((b * S + s) * H + h) * D + d]! * k[((b * T + t) * Hk + g) * D + d]!;
          x *= o.scale;
          scores.set(t, o.cap ? o.cap * Math.tanh(x / o.cap) : x);
        }
        const all = [...scores.values(), ...(o.sinks ? [o.sinks[h]!] : [])];
        const most = Math.max(...all);
        const total = all.reduce((sum, x) => sum + Math.exp(x - most), 0);
        lse[(b * H + h) * S + s] = all.length ? most + Math.log(total) : -Infinity;
        for (const [t, x] of scores)
          for (let d = 0; d < Dv; d++)
            y[((b * S + s) * H + h) * Dv + d]! += (Math.exp(x - most) / total) * v[((b * T + t) * Hk + g) * Dv + d]!;
      }
  return { y, lse };
}

onDevices('attention', (device, random) => {
  const base: Shape = { B: 2, S: 21, T: 21, H: 4, Hk: 2, D: 24, Dv: 24 };
  const cases: [string, Partial<Shape>, Partial<Plain>][] = [
    ['causal', {}, {}],
    ['bidirectional', {}, { causal: false }],
    ['offset into a cache', { T: 30 }, { offset: 9 }],
    ['one query (decoding)', { S: 1, T: 700, H: 8, Hk: 2 }, { offset: 699 }],
    ['three queries, masked differently', { S: 3, T: 600, H: 2, Hk: 2 }, { offset: 511 }],
    ['window', { S: 70, T: 70 }, { window: 7 }],
    ['window with few queries', { S: 2, T: 600, H: 4 }, { window: 40, offset: 598 }],
    ['window without a causal mask', {}, { window: 4, causal: false }],
    ['lengths, one of them 0', {}, { lengths: [13, 0] }],
    ['lengths with few queries', { S: 1, H: 2, T: 21 }, { lengths: [13, 0], offset: 20 }],
    ['soft cap', {}, { cap: 1.5 }],
    ['soft cap, one query', { S: 1, T: 40, H: 2 }, { cap: 1.5, offset: 39 }],
    ['sinks', {}, { sinks: [0.5, -2, 30, -30] }],
    ['sinks, one query, nothing else to see', { S: 1, T: 4, H: 4 }, { sinks: [0.5, -2, 30, -30], lengths: [4, 0] }],
    ['values wider than keys, one key head', { Hk: 1, D: 5, Dv: 33 }, {}],
    ['values narrower (192 and 128, as MLA)', { S: 33, T: 33, D: 192, Dv: 128, H: 2, Hk: 2 }, {}],
    ['several tiles of keys and queries', { B: 1, S: 150, T: 530, H: 2, Hk: 1, D: 16, Dv: 8 }, { offset: 380 }],
    ['several tiles, window and lengths', { S: 300, T: 300, H: 2, D: 8, Dv: 8 }, { window: 130, lengths: [290, 261] }],
    ['queries before the first key', { S: 20 }, { offset: -5 }],
  ];
  for (const [name, shape, options] of cases) {
    test(name, async () => {
      const x: Shape = { ...base, ...shape };
      const plain: Plain = { scale: 1 / Math.sqrt(x.D), ...options };
      for (const dtype of floatDTypes) {
        using s = new Scope(device());
        const q = rounded(dtype, random.normals(x.B * x.S * x.H * x.D, 2));
        const k = rounded(dtype, random.normals(x.B * x.T * x.Hk * x.D, 2));
        const v = rounded(dtype, random.normals(x.B * x.T * x.Hk * x.Dv));
        const expected = naive(x, q, k, v, plain);
        const { lengths, sinks, ...rest } = plain;
        const lse = strided(s, 'f32', [x.B, x.H, x.S]);
        const y = attention(
          s,
          tensor(s, dtype, [x.B, x.S, x.H, x.D], q, { pad: 3 }),
          tensor(s, dtype, [x.B, x.T, x.Hk, x.D], k, { order: [0, 2, 1, 3], pad: 5 }),
          tensor(s, dtype, [x.B, x.T, x.Hk, x.Dv], v, { pad: 1 }),
          {
            ...rest,
            lse,
            ...(lengths ? { lengths: tensor(s, 'i32', [x.B], lengths) } : {}),
            ...(sinks ? { sinks: tensor(s, 'f32', [x.H], sinks) } : {}),
          },
        );
        await expectClose(y, expected.y);
        await expectClose(lse, expected.lse);
      }
    });
  }

  test('the same bytes twice', async () => {
    using s = new Scope(device());
    const [S, H, D] = [90, 4, 32];
    const values = () => rounded('bf16', random.normals(S * H * D));
    const [q, k, v] = [values(), values(), values()].map((x) => tensor(s, 'bf16', [1, S, H, D], x)) as [never, never, never]; // prettier-ignore
    const y = attention(s, q, k, v, { scale: 0.2 });
    expect(await bytesOf(attention(s, q, k, v, { scale: 0.2 }))).toEqual(await bytesOf(y));
  });

  test('a NaN stays visible', async () => {
    using s = new Scope(device());
    const x = new Float64Array(2 * 8).fill(1);
    x[0] = NaN;
    const q = tensor(s, 'f32', [1, 2, 1, 8], x);
    const k = tensor(s, 'f32', [1, 2, 1, 8], new Float64Array(16).fill(1));
    const y = await valuesOf(attention(s, q, k, k, { scale: 1 }));
    expect([...y.slice(0, 8)]).toEqual(new Array(8).fill(NaN));
    expect([...y.slice(8)]).toEqual(new Array(8).fill(1));
  });
});
