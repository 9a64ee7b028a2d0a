import { binary, cast, copyInto, gemm, matmulT, reduce, rmsnorm, softmax, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { ForwardContext } from './calls.js';
import { drop, type TensorSpec } from './layer.js';
import type { Residual } from './residual.js';

/**
 * Manifold-constrained hyper-connections (Xie et al. 2025, after Zhu et al. 2024): the state of a token is `streams`
 * hidden states side by side. A small map of the whole state says how they flow into a layer (`pre`), how its output
 * flows back (`post`), and how they mix meanwhile (`comb`, brought close to a doubly stochastic matrix by Sinkhorn's
 * iterations).
 */
export interface HyperSpec {
  /** Names of the map [(2 + n) n, n C], its offsets [(2 + n) n], and its three factors (pre, post, comb), all f32. */
  readonly fn: string;
  readonly base: string;
  readonly scale: string;
  /** n */
  readonly streams: number;
  /** C */
  readonly hidden: number;
  /** Of the norm in front of the map. */
  readonly normEps: number;
  /** Added to weights and sums, so that none is 0. */
  readonly eps: number;
  readonly iterations: number;
}

type Names = Pick<HyperSpec, 'fn' | 'base' | 'scale' | 'streams' | 'hidden'>;

const tensorsOf = ({ fn, base, scale, streams, hidden }: Names, rows: number, scales: number): TensorSpec[] => [
  { name: fn, shape: [rows, streams * hidden], f32: true },
  { name: base, shape: [rows], f32: true },
  { name: scale, shape: [scales], f32: true },
];

/** Hidden states [T, C] as the states of `streams` equal streams [T, n C]. */
export function spread(scope: Scope, x: Tensor, streams: number): Tensor {
  const [tokens, hidden] = [x.dim(0), x.dim(1)];
  const state = scope.empty(x.dtype, [tokens, streams * hidden]);
  copyInto(state.view(tokens, streams, hidden), x.view(tokens, 1, hidden).expand(tokens, streams, hidden));
  return state;
}

export function hyperConnection(h: HyperSpec): Residual {
  const n = h.streams;
  return {
    tensors: tensorsOf(h, (2 + n) * n, 3),
    enter: (state, ctx) => {
      const { scope } = ctx;
      const streams = state.view(-1, n, h.hidden);
      const { pre, post, comb } = weigh(h, state, ctx);
      const x = mix(scope, pre, streams);
      drop(scope, [pre]);
      return {
        x,
        leave: (y) => {
          const next = gemm(scope, comb.transpose(), streams);
          gemm(scope, post, y.view(-1, 1, h.hidden), { out: next, beta: 1 });
          drop(scope, [post, comb, y]);
          return next.view(...state.shape);
        },
      };
    },
  };
}

/** What is left of the streams in front of the head: their weighted sum. */
export function hyperHead(h: Omit<HyperSpec, 'iterations'>): {
  readonly tensors: readonly TensorSpec[];
  /** [T, n C] -> [T, C] */
  collapse(state: Tensor, ctx: ForwardContext): Tensor;
} {
  const n = h.streams;
  return {
    tensors: tensorsOf(h, n, 1),
    collapse: (state, ctx) => {
      using work = new Scope(ctx.scope.device);
      const map = mapped(h, state, ctx, work);
      const pre = part(work, map, h, ctx, { from: 0, to: n, factor: 0 });
      gate(pre, 1, h.eps);
      return mix(ctx.scope, cast(work, pre, state.dtype).view(-1, 1, n), state.view(-1, n, h.hidden));
    },
  };
}

/** pre [T, 1, n], post [T, n, 1] and comb [T, n, n] of states [T, n C]: computed in fp32, given in the states' dtype. */
function weigh(h: HyperSpec, state: Tensor, ctx: ForwardContext): { pre: Tensor; post: Tensor; comb: Tensor } {
  const n = h.streams;
  using work = new Scope(ctx.scope.device);
  const map = mapped(h, state, ctx, work);
  const pre = part(work, map, h, ctx, { from: 0, to: n, factor: 0 });
  const post = part(work, map, h, ctx, { from: n, to: 2 * n, factor: 1 });
  const raw = part(work, map, h, ctx, { from: 2 * n, to: (2 + n) * n, factor: 2 });
  gate(pre, 1, h.eps);
  gate(post, 2, 0);
  const comb = softmax(work, raw.view(-1, n, n));
  unary(work, 'affine', comb, 1, h.eps, comb);
  divideBySums(comb, 1, h.eps);
  for (let i = 1; i < h.iterations; i++) {
    divideBySums(comb, 2, h.eps);
    divideBySums(comb, 1, h.eps);
  }
  const given = (x: Tensor) => cast(ctx.scope, x, state.dtype);
  return { pre: given(pre).view(-1, 1, n), post: given(post).view(-1, n, 1), comb: given(comb) };
}

/** The map of the normed state, f32 [T, rows]. */
function mapped(h: Pick<HyperSpec, 'fn' | 'normEps'>, state: Tensor, { weights }: ForwardContext, work: Scope): Tensor {
  const normed = rmsnorm(work, state, undefined, h.normEps, { dtype: 'f32' });
  return matmulT(work, normed, weights.get(h.fn));
}

/** Columns [from, to) of the map, times their factor, plus their offsets. */
function part(
  scope: Scope,
  map: Tensor,
  { base, scale }: Pick<HyperSpec, 'base' | 'scale'>,
  { weights }: ForwardContext,
  { from, to, factor }: { from: number; to: number; factor: number },
): Tensor {
  const out = scope.empty('f32', [map.dim(0), to - from]);
  const factors = weights.get(scale).slice(0, factor, factor + 1);
  binary(scope, 'mul', map.slice(1, from, to), factors, { out });
  return binary(scope, 'add', out, weights.get(base).slice(0, from, to), { out });
}

/** x = factor sigmoid(x) + offset, in place. */
function gate(x: Tensor, factor: number, offset: number): void {
  using work = new Scope(x.device);
  unary(work, 'sigmoid', x, 0, 0, x);
  unary(work, 'affine', x, factor, offset, x);
}

/** Divides matrices [T, n, n] by their sums over `axis` (1: of columns, 2: of rows), in place. */
function divideBySums(x: Tensor, axis: 1 | 2, eps: number): void {
  using work = new Scope(x.device);
  const sums = reduce(work, 'sum', x, axis);
  unary(work, 'affine', sums, 1, eps, sums);
  const [tokens, n] = [x.dim(0), x.dim(2)];
  binary(work, 'div', x, axis === 1 ? sums.view(tokens, 1, n) : sums.view(tokens, n, 1), { out: x });
}

/** Weights [T, 1, n] times streams [T, n, C]: [T, C]. */
function mix(scope: Scope, weights: Tensor, streams: Tensor): Tensor {
  const x = gemm(scope, weights, streams);
  return x.view(streams.dim(0), streams.dim(2));
}
