import type { DType, FloatDType } from '../../base/dtype.js';
import type { Scope, Tensor } from '../tensor.js';
import { ensure, ensureContiguous, ensureDType, ensureFloat, ensureShape } from './check.js';

/** Element-wise copy with conversion, between any strides; `counts` i64 [2] += {saturated, non-finite}. */
export function copyInto(dst: Tensor, src: Tensor, counts?: Tensor): void {
  ensureShape('copy', 'src', src, ...dst.shape);
  dst.device.run('copy', [dst, src, counts], [], []);
}

/** A contiguous copy of `x` as `dtype`, round to nearest even. */
export function cast(s: Scope, x: Tensor, dtype: DType, counts?: Tensor): Tensor {
  const y = s.empty(dtype, x.shape);
  copyInto(y, x, counts);
  return y;
}

export function fill(x: Tensor, value: number): void {
  x.device.run('fill', [x], [], [value]);
}

/** Philox by element index: uniform [a, b) or normal(a, b), in place. */
export function random(x: Tensor, kind: 'uniform' | 'normal', seed: number, a: number, b: number): void {
  const high = Math.floor(seed / 2 ** 32) >>> 0;
  x.device.run('random', [x], [kind === 'uniform' ? 0 : 1, seed >>> 0, high], [a, b]);
}

/** Rows (axis 0) or columns (axis 1) of a matrix by idx i32 [n]; -1 gives zeros. */
export function gather(s: Scope, x: Tensor, idx: Tensor, axis: 0 | 1 = 0, dtype: DType = x.dtype): Tensor {
  ensureShape('gather', 'x', x, -1, -1);
  ensureShape('gather', 'idx', idx, -1);
  ensureDType('gather', 'i32', idx);
  const n = idx.dim(0);
  const y = s.empty(dtype, axis === 0 ? [n, x.dim(1)] : [x.dim(0), n]);
  x.device.run('gather', [y, x, idx], [axis], []);
  return y;
}

/** dst[idx[j]] += w[j] src[j], in order of j. */
export function scatterAdd(dst: Tensor, src: Tensor, idx: Tensor, w?: Tensor): void {
  ensureShape('scatter_add', 'src', src, idx.dim(0), dst.dim(1));
  dst.device.run('scatter_add', [dst, src, idx, w], [], []);
}

export interface GemmOptions {
  bias?: Tensor;
  alpha?: number;
  beta?: number;
  /** Output to write into (needed when beta is not 0). */
  out?: Tensor;
  dtype?: FloatDType;
  /** For fp32 inputs: TF32 products allowed, or three bf16 products each (2^-16) where that is faster. */
  fast?: boolean | 'split';
}

/** C = alpha A B + beta C + bias: A [M,K], B [K,N] (or batched rank 3), any strides with one of the two 1. */
export function gemm(s: Scope, a: Tensor, b: Tensor, options: GemmOptions = {}): Tensor {
  const { alpha = 1, beta = 0, bias } = options;
  ensureFloat('gemm', a, b, options.out);
  ensure(a.shape.length === b.shape.length && a.shape.length >= 2, 'gemm', 'ranks', a, b);
  ensure(a.dim(-1) === b.dim(-2), 'gemm', 'inner dimensions', a, b);
  const shape = [...a.shape.slice(0, -1), b.dim(-1)];
  if (shape.length === 3) {
    shape[0] = Math.max(a.dim(0), b.dim(0));
    if (a.dim(0) !== shape[0]) a = a.expand(shape[0], a.dim(1), a.dim(2));
    if (b.dim(0) !== shape[0]) b = b.expand(shape[0], b.dim(1), b.dim(2));
  }
  if (bias) ensureShape('gemm', 'bias', bias, b.dim(-1));
  ensure(beta === 0 || options.out !== undefined, 'gemm', 'beta needs an output');
  const c = options.out ?? s.empty(options.dtype ?? a.dtype, shape);
  ensureShape('gemm', 'out', c, ...shape);
  c.device.run('gemm', [c, a, b, bias], [precisionOf(options.fast)], [alpha, beta]);
  return c;
}
const precisionOf = (fast: boolean | 'split' | undefined): number => (fast === 'split' ? 2 : fast ? 1 : 0);

/** y [T,N] = x [T,K] W' for W [N,K] as checkpoints store it. */
export const matmulT = (s: Scope, x: Tensor, w: Tensor, options: GemmOptions = {}): Tensor =>
  gemm(s, x, w.transpose(), options);

/** Rows of x [T,K] sorted by expert times W [E,N,K]': y [T,N]; offsets i32 [E+1]. */
export function groupedGemm(s: Scope, x: Tensor, w: Tensor, offsets: Tensor, dtype?: FloatDType): Tensor {
  ensureShape('grouped_gemm', 'w', w, offsets.dim(0) - 1, -1, x.dim(1));
  const y = s.empty(dtype ?? x.dtype, [x.dim(0), w.dim(1)]);
  y.device.run('grouped_gemm', [y, x, w, offsets], [], []);
  return y;
}

export const unaryKinds = {
  neg: 0,
  abs: 1,
  square: 2,
  sqrt: 3,
  rsqrt: 4,
  exp: 5,
  log: 6,
  sigmoid: 7,
  silu: 8,
  gelu: 9,
  gelu_tanh: 10,
  relu: 11,
  tanh: 12,
  softplus: 13,
  /** a tanh(x / a) */
  softcap: 14,
  /** a x + b */
  affine: 15,
  reciprocal: 16,
  relu2: 17,
  /** to [a, b] */
  clamp: 18,
  is_nonfinite: 19,
} as const;
export type UnaryKind = keyof typeof unaryKinds;

export function unary(s: Scope, kind: UnaryKind, x: Tensor, a = 0, b = 0, out?: Tensor): Tensor {
  const y = out ?? s.empty(x.dtype, x.shape);
  y.device.run('unary', [y, x], [unaryKinds[kind]], [a, b]);
  return y;
}

export const binaryKinds = { add: 0, sub: 1, mul: 2, div: 3, max: 4, min: 5, equal: 6 } as const;

/** a (kind) alpha b; b broadcasts to a's shape. */
export function binary(
  s: Scope,
  kind: keyof typeof binaryKinds,
  a: Tensor,
  b: Tensor,
  { alpha = 1, out }: { alpha?: number; out?: Tensor } = {},
): Tensor {
  const y = out ?? s.empty(a.dtype, a.shape);
  y.device.run('binary', [y, a.expand(...y.shape), b.expand(...y.shape)], [binaryKinds[kind]], [alpha]);
  return y;
}

export const add = (s: Scope, a: Tensor, b: Tensor, out?: Tensor): Tensor => binary(s, 'add', a, b, out ? { out } : {});

export const reduceKinds = { sum: 0, mean: 1, max: 2, min: 3, absmax: 4, sumsq: 5, argmax: 6, argmin: 7 } as const;

/** Over dimension `axis`, which goes away; fp32 out, i32 for argmax and argmin. */
export function reduce(s: Scope, kind: keyof typeof reduceKinds, x: Tensor, axis: number): Tensor {
  ensureContiguous('reduce', x);
  const d = axis < 0 ? axis + x.shape.length : axis;
  const outer = x.shape.slice(0, d).reduce((n, v) => n * v, 1);
  const inner = x.shape.slice(d + 1).reduce((n, v) => n * v, 1);
  const y = s.empty(kind.startsWith('arg') ? 'i32' : 'f32', [outer, inner]);
  y.device.run('reduce', [y, x.view(outer, x.dim(d), inner)], [reduceKinds[kind]], []);
  return y.view(...x.shape.toSpliced(d, 1));
}

/** out f32 [2] += {sum of squares of the finite values, count of non-finite values}. */
export function normAdd(out: Tensor, x: Tensor): void {
  ensureShape('norm_add', 'out', out, 2);
  out.device.run('norm_add', [out, x], [], []);
}
