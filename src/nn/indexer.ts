import { binary, gather, gemm, layernorm, reduce, route, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { turn } from './attention.js';
import type { ForwardContext, LinearSpec } from './calls.js';
import { drop, linearTensors, type TensorSpec } from './layer.js';
import type { RopeSpec } from './rope.js';

/**
 * DeepSeek-V3.2's sparse attention: a small scorer says for each query which `topK` keys it sees. Sequences that are
 * not longer than `topK` see all of them.
 */
export interface IndexerSpec {
  /** Query latent -> heads of the scorer [heads width]. */
  readonly q: LinearSpec;
  /** Input -> one key of the scorer a token [width]. */
  readonly k: LinearSpec;
  /** Input -> weight of each head [heads]. */
  readonly weights: LinearSpec;
  /** Layer norm of keys: name of `.weight` and `.bias`. */
  readonly norm: string;
  readonly heads: number;
  readonly width: number;
  readonly topK: number;
  /** Turns the first channels, by halves. */
  readonly rope: RopeSpec;
}

export const indexerTensors = (i: IndexerSpec): TensorSpec[] => [
  ...linearTensors([i.q, i.k, i.weights]),
  { name: `${i.norm}.weight`, shape: [i.width] },
  { name: `${i.norm}.bias`, shape: [i.width] },
];

/** Keys of the scorer [B S, width] from the answer to its linear. */
export function indexKeys(i: IndexerSpec, k: Tensor, ctx: ForwardContext): Tensor {
  const { scope, weights, batch, length } = ctx;
  const normed = layernorm(scope, k, weights.get(`${i.norm}.weight`), weights.get(`${i.norm}.bias`), 1e-6);
  const turned = turn(ctx, i.rope, normed.view(batch, length, 1, i.width));
  drop(scope, [normed]);
  return turned.view(batch * length, i.width);
}

/** What the scorer knows of the queries. */
export interface IndexQueries {
  /** [B, S, heads, width], turned. */
  readonly q: Tensor;
  /** [B S, heads]. */
  readonly weights: Tensor;
}

export function indexQueries(i: IndexerSpec, q: Tensor, weights: Tensor, ctx: ForwardContext): IndexQueries {
  const turned = turn(ctx, i.rope, q.view(ctx.batch, ctx.length, i.heads, i.width));
  drop(ctx.scope, [q]);
  return { q: turned, weights };
}

/** Queries [from, to) of row `b`; query s sees the first visible(s) keys. */
export interface Queries {
  readonly b: number;
  readonly from: number;
  readonly to: number;
  readonly visible: (s: number) => number;
}

/**
 * The keys that some queries see: idx i32 [to - from, topK], best first; those that are not visible come last and are
 * to be masked. `keys` [T, width] are the row's.
 */
export function chooseKeys(
  i: Pick<IndexerSpec, 'heads' | 'width' | 'topK'>,
  { q, weights }: IndexQueries,
  keys: Tensor,
  { b, from, to, visible }: Queries,
  scope: Scope,
): Tensor {
  const n = to - from;
  const total = keys.dim(0);
  const length = q.dim(1);
  using inner = new Scope(scope.device);
  const queries = q
    .at(b)
    .slice(0, from, to)
    .view(n * i.heads, i.width);
  const perHead = gemm(inner, queries, keys.transpose(), { alpha: i.width ** -0.5, dtype: 'f32' });
  unary(inner, 'relu', perHead, 0, 0, perHead);
  const w = weights.slice(0, b * length + from, b * length + to).view(n, 1, i.heads);
  const scores = gemm(inner, w, perHead.view(n, i.heads, total), { alpha: i.heads ** -0.5, dtype: 'f32' }).view(
    n,
    total,
  );

  // The router picks by softmax: scores are brought to a range that it resolves, hidden keys far below it.
  const largest = reduce(inner, 'absmax', scores, 1).view(n, 1);
  unary(inner, 'clamp', largest, 1e-30, 3e38, largest);
  binary(inner, 'div', scores, largest, { out: scores });
  unary(inner, 'affine', scores, 40, 0, scores);
  const mask = new Float32Array(n * total);
  for (let s = 0; s < n; s++) mask.fill(-1e9, s * total + visible(from + s), (s + 1) * total);
  binary(inner, 'add', scores, inner.from('f32', [n, total], mask), { out: scores });
  return inner.move(route(inner, scores, { topK: i.topK, scoring: 'softmax' }).idx, scope);
}

/** Rows of `rows` [T, D] by idx [n, k]: [n, k, 1, D]. */
export const chosenRows = (scope: Scope, rows: Tensor, idx: Tensor): Tensor =>
  gather(scope, rows, idx.view(-1)).view(idx.dim(0), idx.dim(1), 1, rows.dim(1));
