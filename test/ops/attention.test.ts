import { expect, test } from 'vitest';
import { attention, attentionBackward, attentionCompare, type AttentionOptions } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture } from './quant-cases.js';
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
    ['several tiles, wide heads', { B: 1, S: 70, T: 530, H: 2, Hk: 1, D: 128, Dv: 80 }, { offset: 460 }],
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

const known = fixture('layers');

onDevices('attention gradients', (device, random) => {
  const cases = [['causal', {}], ['window', { offset: 2, window: 5 }], ['lengths', {}]] as const; // prettier-ignore
  test.each(cases)('%s as PyTorch', async (name, options) => {
    using s = new Scope(device());
    const load = (key: string) => tensor(s, 'f32', known.shape(`attention/${name}/${key}`), known.f32(`attention/${name}/${key}`)); // prettier-ignore
    const [q, k, v, dy] = [load('q'), load('k'), load('v'), load('dy')];
    const lse = s.empty('f32', [q.dim(0), q.dim(2), q.dim(1)]);
    const lengths =
      name === 'lengths' ? { lengths: tensor(s, 'i32', [2], known.i32('attention/lengths/lengths')) } : {};
    const o = attention(s, q, k, v, { scale: 0.3, lse, ...options, ...lengths });
    await expectClose(o, known.f32(`attention/${name}/y`));
    const d = attentionBackward(s, dy, { o, q, k, v, lse }, { scale: 0.3, ...options, ...lengths });
    for (const key of ['dq', 'dk', 'dv'] as const) await expectClose(d[key], known.f32(`attention/${name}/${key}`), 10);
  });

  test('several tiles, narrow dtypes, a sink, rows without keys: against differences in float64', async () => {
    const x: Shape = { B: 2, S: 140, T: 150, H: 2, Hk: 1, D: 8, Dv: 12 };
    const options: Plain = { scale: 0.4, offset: 10, window: 135, lengths: [150, 0], sinks: [0.3, -1] };
    const sizes = { q: x.B * x.S * x.H * x.D, k: x.B * x.T * x.Hk * x.D, v: x.B * x.T * x.Hk * x.Dv };
    const dy = rounded('f16', random.normals(x.B * x.S * x.H * x.Dv));
    const inputs = { q: rounded('f16', random.normals(sizes.q)), k: rounded('f16', random.normals(sizes.k)), v: rounded('f16', random.normals(sizes.v)) }; // prettier-ignore
    const loss = (i: typeof inputs) => naive(x, i.q, i.k, i.v, options).y.reduce((sum, y, n) => sum + y * dy[n]!, 0);
    using s = new Scope(device());
    const q = tensor(s, 'f16', [x.B, x.S, x.H, x.D], inputs.q, { pad: 2 });
    const k = tensor(s, 'f16', [x.B, x.T, x.Hk, x.D], inputs.k);
    const v = tensor(s, 'f16', [x.B, x.T, x.Hk, x.Dv], inputs.v, { order: [1, 0, 2, 3] });
    const lse = s.empty('f32', [x.B, x.H, x.S]);
    const lengths = tensor(s, 'i32', [2], options.lengths!);
    const { scale, offset, window } = options as Required<Plain>;
    const o = attention(s, q, k, v, { scale, offset, window, lengths, sinks: tensor(s, 'f32', [x.H], options.sinks!), lse }); // prettier-ignore
    const gradients = attentionBackward(s, tensor(s, 'f16', [x.B, x.S, x.H, x.Dv], dy), { o, q, k, v, lse }, { scale, offset, window, lengths }); // prettier-ignore
    for (const key of ['q', 'k', 'v'] as const) {
      const got = await valuesOf(gradients[`d${key}`]);
      expect(got.every(Number.isFinite)).toBe(true);
      expect(got.subarray(got.length / 2).every((g) => g === 0)).toBe(true); // the second sequence sees nothing
      for (let trial = 0; trial < 3; trial++) {
        const i = random.integer(0, got.length / 2 - 1);
        const at = (d: number) => loss({ ...inputs, [key]: inputs[key].with(i, inputs[key][i]! + d) });
        const expected = (at(1e-4) - at(-1e-4)) / 2e-4;
        expect(Math.abs(got[i]! - expected)).toBeLessThan(0.01 * (0.1 + Math.abs(expected)));
      }
    }
  });
});

onDevices('attention_compare', (device, random) => {
  test('as computed row by row with numpy', async () => {
    using s = new Scope(device());
    const load = (key: string) => tensor(s, 'f32', known.shape(`compare/${key}`), known.f32(`compare/${key}`));
    const [a, b] = [
      { q: load('qa'), k: load('ka'), scale: 0.5 },
      { q: load('qb'), k: load('kb'), scale: 0.4 },
    ];
    await expectClose(attentionCompare(s, a, b), known.f32('compare/y'), 10);
  });

  test('equal attentions: divergence exactly 0, cosine and overlap 1; NaN without a key but the first', async () => {
    using s = new Scope(device());
    const [S, H, D] = [40, 3, 16];
    for (const dtype of floatDTypes) {
      const q = tensor(s, dtype, [1, S, H, D], random.normals(S * H * D));
      const k = tensor(s, dtype, [1, S, H, D], random.normals(S * H * D));
      const y = await valuesOf(attentionCompare(s, { q, k, scale: 1 }, { q, k, scale: 1 }));
      for (let row = 0; row < H * S; row++) {
        const [js, cosine, overlap] = y.subarray(row * 3, row * 3 + 3);
        if (row % S === 0) expect([js, cosine, overlap]).toEqual([NaN, NaN, NaN]);
        else expect([js, Math.abs(cosine! - 1) < 1e-6, overlap]).toEqual([0, true, 1]);
      }
    }
  });

  test('other head counts and widths, a soft cap on one side, window, lengths, ties to the lower index', async () => {
    using s = new Scope(device());
    const [B, S, T, H] = [2, 60, 64, 4];
    const part = (Hk: number, D: number, scale: number, cap: number) => ({
      D, Hk, scale, cap, q: rounded('bf16', random.normals(B * S * H * D)), k: rounded('bf16', random.normals(B * T * Hk * D)),
    }); // prettier-ignore
    const models = [part(2, 8, 0.5, 2.5), part(4, 12, 0.3, 0)] as const;
    models[0].q.fill(0, 0, H * 8); // query 0 of sequence 0 gives equal scores everywhere: ties
    models[1].q.fill(0, 0, H * 12);
    const [offset, window, lengths] = [4, 30, [64, 37]];
    const expected = new Float64Array(B * H * S * 3).fill(NaN);
    for (let b = 0; b < B; b++)
      for (let h = 0; h < H; h++)
        for (let i = 0; i < S; i++) {
          const keys = Array.from({ length: T }, (_, t) => t).filter((t) => t >= 1 && t <= i + offset && t > i + offset - window && t < lengths[b]!); // prettier-ignore
          if (keys.length === 0) continue;
          const rows = models.map(({ q, k, D, Hk, scale, cap }) => {
            const scores = keys.map((t) => {
              let x = 0;
              for (let d = 0; d < D; d++) x += q[((b * S + i) * H + h) * D + d]! * k[((b * T + t) * Hk + Math.floor(h / (H / Hk))) * D + d]!; // prettier-ignore
              return cap > 0 ? cap * Math.tanh((scale * x) / cap) : scale * x;
            });
            const most = Math.max(...scores);
            const sum = scores.reduce((a, x) => a + Math.exp(x - most), 0);
            const best = keys.map((_, n) => n).sort((u, v) => scores[v]! - scores[u]! || u - v).slice(0, 8); // prettier-ignore
            return { p: scores.map((x) => Math.exp(x - most) / sum), best };
          });
          const [p, q] = [rows[0]!.p, rows[1]!.p];
          const dot = (u: number[], v: number[]) => u.reduce((a, x, n) => a + x * v[n]!, 0);
          const js = p.reduce((a, x, n) => a + (x * Math.log((2 * x) / (x + q[n]!)) + q[n]! * Math.log((2 * q[n]!) / (x + q[n]!))) / 2, 0); // prettier-ignore
          const shared = rows[0]!.best.filter((n) => rows[1]!.best.includes(n)).length;
          expected.set([js, dot(p, q) / Math.sqrt(dot(p, p) * dot(q, q)), shared / Math.min(8, keys.length)], ((b * H + h) * S + i) * 3); // prettier-ignore
        }
    const [a, b] = models.map((m) => ({ q: tensor(s, 'bf16', [B, S, H, m.D], m.q, { pad: 1 }), k: tensor(s, 'bf16', [B, T, m.Hk, m.D], m.k, { order: [0, 2, 1, 3] }), scale: m.scale, cap: m.cap })); // prettier-ignore
    const y = attentionCompare(s, a!, b!, { offset, window, lengths: tensor(s, 'i32', [B], lengths) });
    await expectClose(y, expected, 10);
    expect(await bytesOf(attentionCompare(s, a!, b!, { offset, window, lengths: tensor(s, 'i32', [B], lengths) }))).toEqual(await bytesOf(y)); // prettier-ignore
  });

  test('far apart attentions: the divergence ends at ln 2', async () => {
    using s = new Scope(device());
    const q = tensor(s, 'f32', [1, 1, 1, 2], [100, 100]);
    const k = (at: number) => tensor(s, 'f32', [1, 3, 1, 2], [0, 0, at === 1 ? 1 : 0, 0, at === 2 ? 1 : 0, 0]);
    const y = await valuesOf(attentionCompare(s, { q, k: k(1), scale: 1 }, { q, k: k(2), scale: 1 }, { offset: 2 }));
    expect(y[0]).toBeCloseTo(Math.LN2, 6);
    expect(y[1]).toBeLessThan(1e-6);
    expect(y[2]).toBe(1);
  });
});
