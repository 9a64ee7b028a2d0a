import { copyInto, gemm } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import { turn } from './attention.js';
import { attend, linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
import {
  chooseKeys,
  chosenRows,
  indexerTensors,
  indexKeys,
  indexQueries,
  type IndexerSpec,
  type IndexQueries,
} from './indexer.js';
import { drop, linearTensors, type Layer } from './layer.js';
import { normalise, normTensor, type NormSpec } from './norm.js';
import type { RopeSpec } from './rope.js';

/**
 * Multi-head latent attention (DeepSeek-V2, Liu et al. 2024): keys and values are projections of one latent of width
 * `rank` a token; beside it one rotated key of width rope.dim serves all heads.
 */
export interface LatentAttentionSpec {
  readonly layer: number;
  readonly heads: number;
  /** Channels of a head's query and key that do not turn, and of its value. */
  readonly nope: number;
  readonly value: number;
  readonly rank: number;
  /** Queries from the input, or by way of a latent of their own. */
  readonly q: LinearSpec | { readonly down: LinearSpec; readonly norm: NormSpec; readonly up: LinearSpec };
  /** Input -> latent and rotated key [rank + rope.dim]. */
  readonly kvDown: LinearSpec;
  readonly kvNorm: NormSpec;
  /** Latent -> per head key part and value [heads (nope + value)]. */
  readonly kvUp: LinearSpec;
  readonly o: LinearSpec;
  /** Turns the last rope.dim channels. */
  readonly rope: RopeSpec;
  readonly scale: number;
  /** Sparse attention; needs queries by way of a latent. */
  readonly indexer?: IndexerSpec | undefined;
}

export function latentAttention(a: LatentAttentionSpec): Layer & { readonly latent: LatentAttentionSpec } {
  const { q, indexer } = a;
  const fromInput = ['down' in q ? q.down : q, a.kvDown, ...(indexer ? [indexer.k, indexer.weights] : [])];
  const fromLatent = 'down' in q ? [[q.up, ...(indexer ? [indexer.q] : [])]] : [];
  return {
    latent: a,
    tensors: [
      ...linearTensors(['down' in q ? [q.down, q.up] : [q], a.kvDown, a.kvUp, a.o].flat()),
      ...('down' in q ? [normTensor(q.norm)] : []),
      normTensor(a.kvNorm),
      ...(indexer ? indexerTensors(indexer) : []),
    ],
    linears: [fromInput, ...fromLatent, [a.kvUp], [a.o]],
    cached: (tokens) => (a.rank + a.rope.dim + (indexer?.width ?? 0)) * tokens,
    forward: (x, ctx) => forward(a, x, ctx),
  };
}

function* forward(a: LatentAttentionSpec, x: Tensor, ctx: ForwardContext): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const { q, kv, index } = yield* project(a, x, ctx);
  const qTurned = turn(ctx, a.rope, q.view(batch, length, a.heads, a.nope + a.rope.dim));
  drop(scope, [q]);

  // One row a token: the normed latent, the rotated key, the scorer's key; this is also what a cache holds.
  const turned = a.rank + a.rope.dim;
  const width = turned + (a.indexer?.width ?? 0);
  const latent = scope.empty(kv.dtype, [batch, length, 1, width]);
  const normed = normalise(a.kvNorm, kv.slice(1, 0, a.rank), ctx);
  copyInto(latent.view(batch * length, width).slice(1, 0, a.rank), normed);
  const key = scope.empty(kv.dtype, [batch * length, a.rope.dim]);
  copyInto(key, kv.slice(1, a.rank, turned));
  const keyTurned = turn(ctx, a.rope, key.view(batch, length, 1, a.rope.dim));
  copyInto(latent.slice(3, a.rank, turned), keyTurned);
  if (index) copyInto(latent.view(batch * length, width).slice(1, turned, width), index.keys);
  drop(scope, [kv, key, keyTurned, index?.keys]);

  const offset = ctx.cache?.length ?? 0;
  const all = ctx.cache ? ctx.cache.append(latent).k : latent;
  const options = { causal: true, offset, scale: a.scale, ...(ctx.lengths && { lengths: ctx.lengths }) };
  // Few queries on many keys: cheaper to bring the queries into the latent space than all keys out of it.
  const absorb = offset > 0 && length * (2 * a.rank - a.nope - a.value) < a.rank * (a.nope + a.value);
  let o: Tensor;
  if (a.indexer && index && ctx.end > a.indexer.topK)
    o = yield* attendChosen(a, a.indexer, qTurned, all, index.queries, ctx);
  else if (absorb) o = yield* attendAbsorbed(a, qTurned, all.slice(3, 0, turned), ctx, options);
  else o = yield* attendExpanded(a, qTurned, all, offset > 0 ? undefined : normed, ctx, options);
  drop(scope, [qTurned, latent, normed, index?.queries.q, index?.queries.weights]);
  const [y] = yield* linear([a.o], o.view(batch * length, a.heads * a.value));
  drop(scope, [o]);
  return y!;
}

interface Projected {
  q: Tensor;
  /** [B S, rank + rope.dim], neither normed nor turned. */
  kv: Tensor;
  index?: { keys: Tensor; queries: IndexQueries };
}

function* project(a: LatentAttentionSpec, x: Tensor, ctx: ForwardContext): Calls<Projected> {
  const { q, indexer } = a;
  if (!('down' in q)) {
    const [direct, kv] = yield* linear([q, a.kvDown], x);
    return { q: direct!, kv: kv! };
  }
  const scorer = indexer ? [indexer.k, indexer.weights] : [];
  const [down, kv, k, weights] = yield* linear([q.down, a.kvDown, ...scorer], x);
  const normed = normalise(q.norm, down!, ctx);
  drop(ctx.scope, [down], [kv!]);
  const [up, indexQ] = yield* linear([q.up, ...(indexer ? [indexer.q] : [])], normed);
  drop(ctx.scope, [normed]);
  if (!indexer) return { q: up!, kv: kv! };
  const keys = indexKeys(indexer, k!, ctx);
  drop(ctx.scope, [k]);
  return { q: up!, kv: kv!, index: { keys, queries: indexQueries(indexer, indexQ!, weights!, ctx) } };
}

interface Options {
  causal: boolean;
  offset: number;
  scale: number;
  lengths?: Tensor;
}

/** Attention with keys and values of every head brought out of the latents; `normed` [B T, rank] where it is at hand. */
function* attendExpanded(
  a: LatentAttentionSpec,
  q: Tensor,
  all: Tensor,
  normed: Tensor | undefined,
  ctx: ForwardContext,
  options: Options,
): Calls<Tensor> {
  const { scope, batch } = ctx;
  const rows = all.dim(1);
  const latents = normed ?? contiguousLatents(a, all, ctx);
  const [up] = yield* linear([a.kvUp], latents);
  if (latents !== normed) drop(scope, [latents]);
  const perHead = up!.view(batch, rows, a.heads, a.nope + a.value);
  const k = scope.empty(up!.dtype, [batch, rows, a.heads, a.nope + a.rope.dim]);
  copyInto(k.slice(3, 0, a.nope), perHead.slice(3, 0, a.nope));
  const turned = all.slice(3, a.rank, a.rank + a.rope.dim);
  copyInto(k.slice(3, a.nope, a.nope + a.rope.dim), turned.expand(batch, rows, a.heads, a.rope.dim));
  const v = perHead.slice(3, a.nope, a.nope + a.value);
  const o = yield* attend({ layer: a.layer, q, k, v, options });
  drop(scope, [up, k]);
  return o;
}

/** The latents of all cached tokens as rows [B T, rank]. */
function contiguousLatents(a: LatentAttentionSpec, all: Tensor, { scope, batch }: ForwardContext): Tensor {
  const rows = scope.empty(all.dtype, [batch, all.dim(1), 1, a.rank]);
  copyInto(rows, all.slice(3, 0, a.rank));
  return rows.view(-1, a.rank);
}

/**
 * Attention in the latent space: with W_k and W_v the parts of kvUp of one head, q' k = (q W_k)' latent, and
 * o = W_v (weighted sum of latents).
 */
function* attendAbsorbed(
  a: LatentAttentionSpec,
  q: Tensor,
  latents: Tensor,
  ctx: ForwardContext,
  options: Options,
): Calls<Tensor> {
  const qLatent = intoLatents(a, q, ctx);
  const mixed = yield* attend({ layer: a.layer, q: qLatent, k: latents, v: latents.slice(3, 0, a.rank), options });
  const o = outOfLatents(a, mixed, ctx);
  drop(ctx.scope, [qLatent, mixed]);
  return o;
}

/** Latents that are gathered at once, in values: bounds the memory of sparse attention. */
const gatherLimit = 2 ** 26;

/** Attention of each query on the keys that the scorer chose for it, in the latent space, some queries at a time. */
function* attendChosen(
  a: LatentAttentionSpec,
  indexer: IndexerSpec,
  q: Tensor,
  all: Tensor,
  queries: IndexQueries,
  ctx: ForwardContext,
): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const { topK } = indexer;
  const start = ctx.end - length;
  const turned = a.rank + a.rope.dim;
  const qLatent = intoLatents(a, q, ctx);
  const mixed = scope.empty(q.dtype, [batch, length, a.heads, a.rank]);
  const step = Math.max(1, Math.floor(gatherLimit / (topK * turned)));
  for (let b = 0; b < batch; b++) {
    const row = all.at(b).transpose(0, 1).at(0);
    for (let from = 0; from < length; from += step) {
      const to = Math.min(from + step, length);
      const keys = row.slice(1, turned, turned + indexer.width);
      const visible = (s: number) => start + s + 1;
      const idx = chooseKeys(indexer, queries, keys, { b, from, to, visible }, scope);
      const rows = chosenRows(scope, row.slice(1, 0, turned), idx);
      const seen = Int32Array.from({ length: to - from }, (_, s) => Math.min(topK, start + from + s + 1));
      const lengths = scope.from('i32', [to - from], seen);
      const part = qLatent
        .at(b)
        .slice(0, from, to)
        .view(to - from, 1, a.heads, turned);
      const options = { causal: true, offset: topK - 1, scale: a.scale, lengths };
      const o = yield* attend({ layer: a.layer, q: part, k: rows, v: rows.slice(3, 0, a.rank), options });
      copyInto(mixed.at(b).slice(0, from, to), o.view(to - from, a.heads, a.rank));
      drop(scope, [idx, rows, lengths, o]);
    }
  }
  const o = outOfLatents(a, mixed, ctx);
  drop(scope, [qLatent, mixed]);
  return o;
}

/** x [B,S,H,D] -> a view [H, B S, D]: one matrix a head. */
const perHead = (x: Tensor): Tensor => x.view(x.dim(0) * x.dim(1), x.dim(2), x.dim(3)).transpose(0, 1);

const upWeights = (a: LatentAttentionSpec, ctx: ForwardContext): Tensor =>
  ctx.weights.get(`${a.kvUp.name}.weight`).view(a.heads, a.nope + a.value, a.rank);

/** Queries [B,S,H,nope + rope] -> [B,S,H,rank + rope], to be met with latents. */
function intoLatents(a: LatentAttentionSpec, q: Tensor, ctx: ForwardContext): Tensor {
  const width = a.rank + a.rope.dim;
  const latent = ctx.scope.empty(q.dtype, [q.dim(0), q.dim(1), a.heads, width]);
  const keys = upWeights(a, ctx).slice(1, 0, a.nope);
  gemm(ctx.scope, perHead(q).slice(2, 0, a.nope), keys, { out: perHead(latent).slice(2, 0, a.rank) });
  copyInto(latent.slice(3, a.rank, width), q.slice(3, a.nope, a.nope + a.rope.dim));
  return latent;
}

/** Weighted latents [B,S,H,rank] -> values [B,S,H,value]. */
function outOfLatents(a: LatentAttentionSpec, mixed: Tensor, ctx: ForwardContext): Tensor {
  const o = ctx.scope.empty(mixed.dtype, [mixed.dim(0), mixed.dim(1), a.heads, a.value]);
  const values = upWeights(a, ctx).slice(1, a.nope, a.nope + a.value);
  gemm(ctx.scope, perHead(mixed), values.transpose(), { out: perHead(o) });
  return o;
}
