import type { DType, FloatDType } from '../../src/base/dtype.js';
import * as ops from '../../src/tensor/ops.js';
import type { Scope, Tensor } from '../../src/tensor/tensor.js';
import { Random } from './random.js';
import { gradientCases } from './gradients.js';

/** What one op gives on one device, for the same inputs on both. */
export interface Case {
  readonly name: string;
  /** Bound of the normalised mean squared error against the CPU; integers: fraction that may differ. */
  readonly bound: number;
  run(in_: Inputs): Tensor[] | Promise<Tensor[]>;
}

/** Draws the same inputs on every device: one stream of numbers a case. */
export class Inputs {
  readonly #random: Random;
  constructor(
    readonly s: Scope,
    seed: number,
  ) {
    this.#random = new Random(seed);
  }
  normal(dtype: FloatDType, shape: number[], deviation = 1): Tensor {
    const n = shape.reduce((a, b) => a * b, 1);
    const values = Float32Array.from({ length: n }, () => deviation * this.#random.normal());
    const t = this.s.from('f32', shape, values);
    return dtype === 'f32' ? t : ops.cast(this.s, t, dtype);
  }
  integers(shape: number[], low: number, high: number): Tensor {
    const n = shape.reduce((a, b) => a * b, 1);
    return this.s.from(
      'i32',
      shape,
      Int32Array.from({ length: n }, () => this.#random.integer(low, high)),
    );
  }
  codes(shape: number[], low: number, high: number): Tensor {
    const n = shape.reduce((a, b) => a * b, 1);
    return this.s.from(
      'i8',
      shape,
      Int8Array.from({ length: n }, () => this.#random.integer(low, high)),
    );
  }
  /** A well-conditioned Hessian [K, K] (or batched) as calibration gives it. */
  hessian(k: number, batch = 0): Tensor {
    const h = this.s.zeros('f32', batch ? [batch, k, k] : [k, k]);
    for (let e = 0; e < Math.max(batch, 1); e++) {
      ops.hessianAdd(batch ? h.at(e) : h, this.normal('f32', [2 * k + 7, k]), { alpha: 1 / k });
    }
    return h;
  }
}

const floatBound: Record<FloatDType, number> = { f32: 1e-9, bf16: 2e-5, f16: 2e-6 };
const floats: FloatDType[] = ['f32', 'bf16', 'f16'];
const cases: Case[] = [];
const add = (name: string, bound: number, run: Case['run']): void => void cases.push({ name, bound, run });
const forFloats = (name: string, run: (in_: Inputs, dtype: FloatDType) => Tensor[] | Promise<Tensor[]>, loose = 1) => {
  for (const dtype of floats) add(`${name} ${dtype}`, floatBound[dtype] * loose, (in_) => run(in_, dtype));
};

// --- movement ---
const types: DType[] = ['f32', 'bf16', 'f16', 'f64', 'i8', 'u8', 'i32', 'i64', 'f8_e4m3', 'f8_e5m2'];
for (const from of types)
  for (const to of types)
    add(`copy ${from} -> ${to}`, 0, (in_) => {
      const x = ops.cast(in_.s, in_.normal('f32', [33, 65], 40), from);
      return [ops.cast(in_.s, x, to)];
    });
forFloats('copy transposed', (in_, d) => [ops.cast(in_.s, in_.normal(d, [70, 131]).transpose(), 'f32')]);
forFloats('copy strided', (in_, d) => [ops.cast(in_.s, in_.normal(d, [5, 9, 70]).slice(2, 3, 50), 'bf16')]);
add('fill', 0, (in_) => {
  const t = in_.s.empty('bf16', [37, 3]);
  ops.fill(t, 1.5);
  return [t];
});
for (const kind of ['uniform', 'normal'] as const)
  add(`random ${kind}`, kind === 'uniform' ? 0 : 1e-10, (in_) => {
    const t = in_.s.empty('f32', [1001]);
    ops.random(t, kind, 12345678901, -1, 2);
    return [t];
  });
for (const axis of [0, 1] as const)
  forFloats(`gather axis ${axis}`, (in_, d) => [
    ops.gather(in_.s, in_.normal(d, [40, 72]), in_.integers([51], -1, 39), axis),
  ]);
forFloats('scatter_add', (in_, d) => {
  const y = in_.normal(d, [10, 33]);
  ops.scatterAdd(y, in_.normal(d, [40, 33]), in_.integers([40], -1, 9), in_.normal('f32', [40]));
  return [y];
});

const blocks: [ops.EncodingName, number, number][] = [
  ['q4_0', 32, 18], ['q4_1', 32, 20], ['q5_0', 32, 22], ['q5_1', 32, 24], ['q8_0', 32, 34], ['q2_k', 256, 84],
  ['q3_k', 256, 110], ['q4_k', 256, 144], ['q5_k', 256, 176], ['q6_k', 256, 210], ['iq4_nl', 32, 18], ['mxfp4', 32, 17],
]; // prettier-ignore
for (const [name, values, bytes] of blocks)
  add(`decode ${name}`, 0, (in_) => {
    const stored = ops.cast(in_.s, in_.integers([5 * 2 * bytes], 0, 200), 'u8');
    return [ops.decode(in_.s, stored, name, [5, 2 * values], 'f32')];
  });
for (const element of ['f8_e4m3', 'f4_e2m1'] as const)
  add(`decode ${element} with block scales`, 0, (in_) => {
    const stored = ops.cast(in_.s, in_.integers([130 * (element === 'f8_e4m3' ? 200 : 100)], 0, 120), 'u8');
    const scale = ops.cast(in_.s, in_.integers([2, 2], 120, 130), 'u8');
    return [ops.decode(in_.s, stored, element, [130, 200], 'bf16', { scale, block: [128, 128] })];
  });

// --- mathematics ---
for (const [m, n, k] of [[1, 1, 1], [7, 5, 3], [64, 130, 257], [200, 96, 512], [1, 300, 64]] as const) {
  forFloats(`gemm ${m}x${n}x${k}`, (in_, d) => [ops.gemm(in_.s, in_.normal(d, [m, k]), in_.normal(d, [k, n]))], 4);
  forFloats(`matmulT ${m}x${n}x${k} bias`, (in_, d) => [ops.matmulT(in_.s, in_.normal(d, [m, k]), in_.normal(d, [n, k]), { bias: in_.normal(d, [n]) })], 4);
} // prettier-ignore
add('gemm f32 as three bf16 products', 1e-9, (in_) => [
  ops.gemm(in_.s, in_.normal('f32', [130, 2500]), in_.normal('f32', [2500, 200]), { fast: 'split' }),
]);
add('gemm mixed f32 bf16 -> f32', 1e-9, (in_) => [
  ops.gemm(in_.s, in_.normal('f32', [33, 65]), in_.normal('bf16', [65, 40])),
]);
add('gemm bf16 -> f32 alpha beta', 1e-8, (in_) => {
  const out = in_.normal('f32', [33, 40]);
  return [ops.gemm(in_.s, in_.normal('bf16', [33, 65]), in_.normal('bf16', [65, 40]), { out, alpha: 0.5, beta: 2 })];
});
forFloats('gemm batched A\' B', (in_, d) => [ops.gemm(in_.s, in_.normal(d, [3, 31, 20]).transpose(), in_.normal(d, [3, 31, 17]))], 4); // prettier-ignore
for (const [t, n, k] of [[300, 200, 96], [5, 33, 17]] as const)
  forFloats(`grouped_gemm ${t}x${n}x${k}`, (in_, d) => {
    const offsets = in_.s.from('i32', [5], new Int32Array([0, 0, Math.floor(t / 2), t - 1, t]));
    return [ops.groupedGemm(in_.s, in_.normal(d, [t, k]), in_.normal(d, [4, n, k]), offsets)];
  }, 4); // prettier-ignore
for (const kind of Object.keys(ops.unaryKinds) as ops.UnaryKind[])
  forFloats(`unary ${kind}`, (in_, d) => [ops.unary(in_.s, kind, in_.normal(d, [37, 41]), 1.5, 2)], 2);
for (const kind of ['add', 'sub', 'mul', 'div', 'max', 'min', 'equal'] as const)
  forFloats(`binary ${kind}`, (in_, d) => [
    ops.binary(in_.s, kind, in_.normal(d, [37, 41]), in_.normal(d, [41]), { alpha: 1.25 }),
  ]);
for (const kind of ['sum', 'mean', 'max', 'min', 'absmax', 'sumsq', 'argmax', 'argmin'] as const)
  for (const axis of [0, 1, 2])
    forFloats(`reduce ${kind} ${axis}`, (in_, d) => [ops.reduce(in_.s, kind, in_.normal(d, [7, 130, 33]), axis)]);

// --- layers ---
for (const c of [1, 65, 4096]) {
  forFloats(`rmsnorm ${c}`, (in_, d) => [ops.rmsnorm(in_.s, in_.normal(d, [19, c]), in_.normal(d, [c]), 1e-6)]);
  forFloats(`layernorm ${c}`, (in_, d) => [
    ops.layernorm(in_.s, in_.normal(d, [19, c]), in_.normal(d, [c]), in_.normal(d, [c]), 1e-5),
  ]);
  forFloats(`softmax ${c}`, (in_, d) => [ops.softmax(in_.s, in_.normal(d, [19, c], 3), 0.7)]);
}
for (const activation of ['silu', 'gelu', 'gelu_tanh'] as const)
  forFloats(`swiglu ${activation}`, (in_, d) => [
    ops.swiglu(in_.s, in_.normal(d, [19, 130]), in_.normal(d, [19, 130]), activation),
  ]);
for (const interleaved of [false, true])
  for (const fromEnd of [false, true])
    for (const inverse of [false, true])
      forFloats(`rope ${interleaved ? 'pairs' : 'halves'}${fromEnd ? ' end' : ''}${inverse ? ' inverse' : ''}`, (in_, d) => {
        const angles = [in_.normal('f32', [50, 8]), in_.normal('f32', [50, 8])] as const;
        return [ops.rope(in_.s, in_.normal(d, [2, 9, 3, 24]), ...angles, in_.integers([2, 9], 0, 49), { interleaved, fromEnd, inverse })];
      }); // prettier-ignore
forFloats('cross_entropy', (in_, d) => {
  const extra = { lse: in_.s.empty('f32', [23]), top: in_.s.empty('i32', [23]) };
  return [
    ops.crossEntropy(in_.s, in_.normal(d, [23, 3001], 4), in_.integers([23], -1, 3000), extra),
    extra.lse,
    extra.top,
  ];
});
forFloats('kl', (in_, d) => {
  const p = in_.normal(d, [23, 3001], 4);
  const { kl, same } = ops.klRows(in_.s, p, ops.cast(in_.s, ops.add(in_.s, p, in_.normal(d, [23, 3001], 0.3)), d));
  return [kl, same];
}, 10); // prettier-ignore
add('norm_add', 1e-10, (in_) => {
  const out = in_.s.zeros('f32', [2]);
  ops.normAdd(out, in_.normal('f32', [100, 333]));
  return [out];
});
// Rows of a multiple of four values: dense, halves of wider rows, one operand for all rows, mixed types.
for (const kind of ['sub', 'max', 'div'] as const)
  forFloats(`binary rows of four ${kind}`, (in_, d) => {
    const [x, y, row] = [in_.normal(d, [37, 88]), in_.normal(d, [37, 88]), in_.normal(d, [44])];
    const [left, right] = [x.slice(1, 0, 44), y.slice(1, 44, 88)];
    const out = in_.s.empty('f32', [37, 88]);
    return [
      ops.binary(in_.s, kind, x, y, { out }),
      ops.binary(in_.s, kind, left, right, { alpha: 1.25 }),
      ops.binary(in_.s, kind, left, row, { alpha: 0.75 }),
      ops.binary(in_.s, kind, x.slice(1, 2, 46), right),
    ];
  });
forFloats('swiglu halves', (in_, d) => {
  const both = in_.normal(d, [19, 264]);
  const [gate, up] = [both.slice(1, 0, 132), both.slice(1, 132, 264)];
  return [ops.swiglu(in_.s, gate, up, 'silu'), ops.swiglu(in_.s, in_.normal(d, [19, 132]), up, 'silu')];
});
for (const shape of [
  [1000, 1332],
  [7, 3],
  [1000, 1333],
])
  // prettier-ignore
  forFloats(`norm_add ${shape.join('x')}`, (in_, d) => {
    const [all, part] = [in_.s.zeros('f32', [2]), in_.s.zeros('f32', [2])];
    const x = in_.normal(d, shape);
    ops.fill(x.slice(0, 1, 2).slice(1, 1, 2), Infinity);
    ops.normAdd(all, x);
    ops.normAdd(part, x.slice(1, 0, Math.max(1, (shape[1]! - 1) & ~3)));
    return [all, part];
  });

// --- attention ---
const attentionShapes = [
  { b: 1, s: 1, t: 1, h: 1, kv: 1, d: 8, dv: 8 },
  { b: 2, s: 70, t: 70, h: 4, kv: 2, d: 64, dv: 64 },
  { b: 1, s: 200, t: 200, h: 4, kv: 1, d: 128, dv: 128 },
  { b: 1, s: 130, t: 130, h: 2, kv: 2, d: 192, dv: 128 },
  { b: 1, s: 65, t: 65, h: 2, kv: 2, d: 48, dv: 32 },
  { b: 2, s: 5, t: 90, h: 2, kv: 1, d: 96, dv: 96 },
  { b: 1, s: 40, t: 40, h: 2, kv: 1, d: 256, dv: 256 },
  { b: 1, s: 17, t: 17, h: 2, kv: 2, d: 20, dv: 12 },
];
const qkv = (in_: Inputs, d: FloatDType, { b, s, t, h, kv, d: dk, dv }: (typeof attentionShapes)[number]) =>
  [in_.normal(d, [b, s, h, dk]), in_.normal(d, [b, t, kv, dk]), in_.normal(d, [b, t, kv, dv])] as const;
for (const shape of attentionShapes) {
  const label = `B${shape.b} S${shape.s} T${shape.t} H${shape.h}/${shape.kv} D${shape.d}/${shape.dv}`;
  const offset = shape.t - shape.s;
  const scale = shape.d ** -0.5;
  forFloats(`attention causal ${label}`, (in_, d) => {
    const lse = in_.s.empty('f32', [shape.b, shape.h, shape.s]);
    return [ops.attention(in_.s, ...qkv(in_, d, shape), { offset, scale, lse }), lse];
  }, 4); // prettier-ignore
  forFloats(`attention window, cap, sinks, lengths ${label}`, (in_, d) => {
    const lengths = in_.s.from('i32', [shape.b], Int32Array.from({ length: shape.b }, (_, i) => shape.t - i));
    const sinks = in_.normal('f32', [shape.h]);
    return [ops.attention(in_.s, ...qkv(in_, d, shape), { offset, scale, window: 20, cap: 5, lengths, sinks })];
  }, 4); // prettier-ignore
  forFloats(`attention full ${label}`, (in_, d) => [ops.attention(in_.s, ...qkv(in_, d, shape), { causal: false, scale })], 4); // prettier-ignore
  forFloats(`attention_compare ${label}`, (in_, d) => {
    const [q, k] = qkv(in_, d, shape);
    const near = (x: Tensor) => ops.add(in_.s, x, in_.normal(d, [...x.shape], 0.1));
    return [ops.attentionCompare(in_.s, { q, k, scale }, { q: near(q), k: near(k), scale }, { offset })];
  }, 1e3); // prettier-ignore
  forFloats(`attention_compare soft caps ${label}`, (in_, d) => {
    const [q, k] = qkv(in_, d, shape);
    const near = (x: Tensor) => ops.add(in_.s, x, in_.normal(d, [...x.shape], 0.1));
    return [ops.attentionCompare(in_.s, { q, k, scale, cap: 3 }, { q: near(q), k: near(k), scale, cap: 4 }, { offset, window: 20 })];
  }, 1e3); // prettier-ignore
}
// Two models whose heads differ, rows without keys, more than one tile of queries and of keys.
const comparisons = [
  { label: 'GQA D64 S257', b: 2, s: 257, t: 257, h: 8, a: { kv: 2, d: 64 }, other: { kv: 2, d: 64 } },
  { label: 'GQA D128 S257', b: 1, s: 257, t: 257, h: 4, a: { kv: 1, d: 128 }, other: { kv: 1, d: 128 } },
  { label: 'D192 S257', b: 1, s: 257, t: 257, h: 2, a: { kv: 2, d: 192 }, other: { kv: 2, d: 192 } },
  { label: 'D128/1 against D64/4', b: 1, s: 257, t: 257, h: 4, a: { kv: 1, d: 128 }, other: { kv: 4, d: 64 } },
  { label: 'D192/2 against D72/1', b: 2, s: 100, t: 300, h: 2, a: { kv: 2, d: 192 }, other: { kv: 1, d: 72 } },
];
for (const { label, b, s, t, h, a, other } of comparisons) {
  const model = (in_: Inputs, d: FloatDType, { kv, d: width }: typeof a) => ({
    q: in_.normal(d, [b, s, h, width]),
    k: in_.normal(d, [b, t, kv, width]),
    scale: width ** -0.5,
  });
  const options = {
    causal: {},
    'window 100': { window: 100 },
    'full, window 20': { causal: false, window: 20 },
    'offset -50': { offset: -50 },
  };
  for (const [kind, extra] of Object.entries(options))
    forFloats(`attention_compare ${label} ${kind}`, (in_, d) =>
      [ops.attentionCompare(in_.s, model(in_, d, a), model(in_, d, other), { offset: t - s, ...extra })], 1e3); // prettier-ignore
  forFloats(`attention_compare ${label} lengths, caps`, (in_, d) => {
    const lengths = in_.s.from('i32', [b], Int32Array.from({ length: b }, (_, i) => (i === 0 ? t - 37 : 1)));
    const [x, y] = [model(in_, d, a), model(in_, d, other)];
    return [ops.attentionCompare(in_.s, { ...x, cap: 3 }, { ...y, cap: 50 }, { offset: t - s, lengths })];
  }, 1e3); // prettier-ignore
}
// Scores with many ties, exact in every order of summation: positions decide who is among the eight greatest.
for (const dtype of floats)
  add(`attention_compare ties ${dtype}`, 1e-8, (in_) => {
    const small = (shape: number[]) => ops.cast(in_.s, in_.integers(shape, -1, 1), dtype);
    const side = () => ({ q: small([1, 300, 4, 16]), k: small([1, 300, 2, 16]), scale: 0.125 });
    return [ops.attentionCompare(in_.s, side(), side())];
  });

// --- experts ---
for (const scoring of ['softmax', 'sigmoid', 'sqrtsoftplus'] as const)
  for (const groups of [1, 4])
    add(`route ${scoring}, ${groups} groups`, 1e-10, (in_) => {
      const bias = in_.normal('f32', [64], 0.1);
      const options = { topK: 6, scoring, groups, topGroups: 2, groupScore: 'top2', normalize: true, scale: 2.5 } as const; // prettier-ignore
      const { w, idx } = ops.route(in_.s, in_.normal('f32', [77, 64]), { ...options, bias });
      return [w, idx];
    });
add('route all experts', 1e-10, (in_) => {
  const { w, idx } = ops.route(in_.s, in_.normal('f32', [9, 8]), { topK: 8, scoring: 'softmax' });
  return [w, idx];
});
add('expert_sort and combine', 1e-10, (in_) => {
  const { w, idx } = ops.route(in_.s, in_.normal('f32', [700, 16]), { topK: 3, scoring: 'softmax' });
  const order = ops.expertSort(in_.s, idx, 16);
  const y = in_.normal('f32', [2100, 40]);
  const combined = ops.expertCombine(in_.s, y, order.place, w, in_.normal('f32', [700, 40]));
  return [order.slots, order.tokens, order.offsets, order.place, combined];
});

// --- linear algebra, quantization ---
for (const k of [1, 5, 64, 100, 300, 700]) {
  forFloats(`hessian_add ${k}`, (in_, d) => {
    const h = in_.s.zeros('f32', [k, k]);
    ops.hessianAdd(h, in_.normal(d, [301, k]), { alpha: 0.5 });
    ops.hessianAdd(h, in_.normal(d, [40, k]), { rowWeight: ops.unary(in_.s, 'abs', in_.normal('f32', [40])) });
    ops.symmetrize(h);
    return [h];
  });
  for (const reversed of [false, true])
    add(`cholesky ${k}${reversed ? ' reversed' : ''}, solve`, 1e-8, (in_) => {
      const { factor, info } = ops.cholesky(in_.s, in_.hessian(k), 0.01, reversed);
      return [factor, info, ops.choleskySolve(in_.s, factor, in_.normal('f32', [k, 9]), reversed)];
    });
}
add('cholesky 1100, solve of many columns', 1e-8, (in_) => {
  const { factor } = ops.cholesky(in_.s, in_.hessian(1100), 0.01);
  return [ops.choleskySolve(in_.s, factor, in_.normal('f32', [1100, 300]))];
});
add('cholesky batched, one singular', 1e-8, (in_) => {
  const h = in_.hessian(130, 3);
  const good = ops.cholesky(in_.s, h, 0.01, true);
  ops.fill(h.at(1), -1);
  const bad = ops.cholesky(in_.s, h, 0.01, true).info;
  return [good.factor, good.info, ops.unary(in_.s, 'clamp', ops.cast(in_.s, bad, 'f32'), 0, 1)];
});
add('hessian_add experts', 1e-9, (in_) => {
  const h = in_.s.zeros('f32', [3, 70, 70]);
  ops.hessianAdd(h, in_.normal('bf16', [200, 70]), { offsets: in_.s.from('i32', [4], new Int32Array([0, 90, 90, 200])) }); // prettier-ignore
  ops.symmetrize(h);
  return [h];
});
add('hessian_add experts, many rows', 1e-9, (in_) => {
  const h = in_.s.zeros('f32', [3, 200, 200]);
  const x = in_.normal('bf16', [900, 200]);
  const offsets = in_.s.from('i32', [4], new Int32Array([0, 300, 300, 893]));
  ops.hessianAdd(h, x, { offsets, alpha: 0.5 });
  ops.hessianAdd(h, x, { offsets, rowWeight: ops.unary(in_.s, 'abs', in_.normal('f32', [900])) });
  ops.symmetrize(h);
  return [h];
});
for (const group of [32, 128])
  for (const asymmetric of [false, true])
    add(`scale_search g${group}${asymmetric ? ' asymmetric' : ' free sign'}`, 1e-4, (in_) => {
      const weight = ops.unary(in_.s, 'square', in_.normal('f32', [300]));
      const w = in_.normal('f32', [45, 300]);
      const grid = ops.scaleSearch(in_.s, w, { low: -8, high: 7, group, weight, asymmetric, points: 28, from: 0.55, to: 1.06, freeSign: !asymmetric }); // prettier-ignore
      // Two grids may be equally good: what counts is the weighted error of each row.
      const miss = ops.binary(in_.s, 'sub', w, ops.dequantize(in_.s, ops.quantize(in_.s, w, grid), grid));
      return [ops.reduce(in_.s, 'sum', ops.binary(in_.s, 'mul', ops.unary(in_.s, 'square', miss), weight), 1)];
    });
for (const [n, k, e] of [[3, 5, 0], [70, 128, 0], [65, 300, 0], [130, 1300, 0], [33, 260, 3]] as const)
  add(`ldlq ${n}x${k}${e ? ` x ${e} experts` : ''}`, 2e-3, (in_) => {
    const w = in_.normal('f32', e ? [e, n, k] : [n, k]);
    const { factor } = ops.cholesky(in_.s, in_.hessian(k, e), 0.01, true);
    const grid = ops.scaleSearch(in_.s, w, { low: -8, high: 7, group: 128, points: 10, from: 0.6, to: 1, freeSign: true }); // prettier-ignore
    const { q, error } = ops.ldlq(in_.s, w, factor, grid);
    return [q, error];
  }); // prettier-ignore
add('quantize, dequantize', 0, (in_) => {
  const w = in_.normal('f32', [45, 300]);
  const grid = ops.scaleSearch(in_.s, w, { low: -8, high: 7, group: 64 });
  const codes = ops.quantize(in_.s, w, grid);
  return [codes, ops.dequantize(in_.s, codes, grid, 'bf16')];
});
for (const bits of [2, 3, 4, 8] as const)
  for (const axis of [0, 1] as const)
    add(`pack ${bits} bits, axis ${axis}`, 0, (in_) => {
      const half = 2 ** (bits - 1);
      const codes = in_.codes([45, 67], -half, half - 1);
      const words = ops.pack(in_.s, codes, { bits, bias: half, axis });
      return [words, ops.unpack(in_.s, words, 45, 67, { bits, bias: half, axis })];
    });
add('pack awq', 0, (in_) => [ops.pack(in_.s, in_.codes([40, 64], -8, 7), { bits: 4, bias: 8, axis: 1, order: 'awq' })]);
for (const m of [1, 3, 8, 13, 40])
  for (const group of [32, 128])
    forFloats(`int4_matmul M${m} g${group}`, (in_, d) => {
      const words = ops.pack(in_.s, in_.codes([100, 512], -8, 7), { bits: 4, bias: 8, axis: 1 });
      return [ops.int4Matmul(in_.s, in_.normal(d, [m, 512]), { words, scale: in_.normal(d, [100, 512 / group]), group })];
    }, 4); // prettier-ignore
// Many tiles of short rows, and rows longer than what a block brings in at once.
for (const [n, k] of [[9000, 96], [70, 14336]] as const)
  forFloats(`int4_matmul ${n} x ${k}`, (in_, d) => {
    const words = ops.pack(in_.s, in_.codes([n, k], -8, 7), { bits: 4, bias: 8, axis: 1 });
    return [ops.int4Matmul(in_.s, in_.normal(d, [1, k]), { words, scale: in_.normal(d, [n, k / 32]), group: 32 })];
  }, 4); // prettier-ignore

gradientCases(forFloats);

export { cases };
