import { copyInto, gemm } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import { turn } from './attention.js';
import { attend, linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
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
}

export function latentAttention(a: LatentAttentionSpec): Layer {
  const { q } = a;
  const [first, second] = 'down' in q ? [q.down, [[q.up]]] : [q, []];
  const linears = [[first, a.kvDown], ...second, [a.kvUp], [a.o]];
  return {
    tensors: [...linearTensors(linears.flat()), ...('down' in q ? [normTensor(q.norm)] : []), normTensor(a.kvNorm)],
    linears,
    forward: (x, ctx) => forward(a, x, ctx),
  };
}

function* forward(a: LatentAttentionSpec, x: Tensor, ctx: ForwardContext): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const [q, kv] = yield* queriesAndLatents(a, x, ctx);
  const qTurned = turn(ctx, a.rope, q.view(batch, length, a.heads, a.nope + a.rope.dim));
  drop(scope, [q]);

  // One row a token: the normed latent, then the rotated key; this is also what a cache holds.
  const width = a.rank + a.rope.dim;
  const latent = scope.empty(kv.dtype, [batch, length, 1, width]);
  const normed = normalise(a.kvNorm, kv.slice(1, 0, a.rank), ctx);
  copyInto(latent.view(batch * length, width).slice(1, 0, a.rank), normed);
  const key = scope.empty(kv.dtype, [batch * length, a.rope.dim]);
  copyInto(key, kv.slice(1, a.rank, width));
  const keyTurned = turn(ctx, a.rope, key.view(batch, length, 1, a.rope.dim));
  copyInto(latent.slice(3, a.rank, width), keyTurned);
  drop(scope, [kv, key, keyTurned]);

  const offset = ctx.cache?.length ?? 0;
  const all = ctx.cache ? ctx.cache.append(latent).k : latent;
  const options = { causal: true, offset, scale: a.scale, ...(ctx.lengths && { lengths: ctx.lengths }) };
  // Few queries on many keys: cheaper to bring the queries into the latent space than all keys out of it.
  const absorb = ctx.cache !== undefined && length * (2 * a.rank - a.nope - a.value) < a.rank * (a.nope + a.value) && offset > 0; // prettier-ignore
  let o: Tensor;
  if (absorb) {
    o = yield* attendAbsorbed(a, qTurned, all, ctx, options);
  } else {
    const rows = all.dim(1);
    const latents = offset > 0 ? contiguousLatents(a, all, ctx) : normed;
    const [up] = yield* linear([a.kvUp], latents);
    if (latents !== normed) drop(scope, [latents]);
    const perHead = up!.view(batch, rows, a.heads, a.nope + a.value);
    const k = scope.empty(up!.dtype, [batch, rows, a.heads, a.nope + a.rope.dim]);
    copyInto(k.slice(3, 0, a.nope), perHead.slice(3, 0, a.nope));
    const turned = all.slice(3, a.rank, width);
    copyInto(k.slice(3, a.nope, a.nope + a.rope.dim), turned.expand(batch, rows, a.heads, a.rope.dim));
    const v = perHead.slice(3, a.nope, a.nope + a.value);
    o = yield* attend({ layer: a.layer, q: qTurned, k, v, options });
    drop(scope, [up, k]);
  }
  drop(scope, [qTurned, latent, normed]);
  const [y] = yield* linear([a.o], o.view(batch * length, a.heads * a.value));
  drop(scope, [o]);
  return y!;
}

function* queriesAndLatents(a: LatentAttentionSpec, x: Tensor, ctx: ForwardContext): Calls<[Tensor, Tensor]> {
  const { q } = a;
  if (!('down' in q)) return (yield* linear([q, a.kvDown], x)) as [Tensor, Tensor];
  const [down, kv] = yield* linear([q.down, a.kvDown], x);
  const normed = normalise(q.norm, down!, ctx);
  drop(ctx.scope, [down], [kv!]);
  const [up] = yield* linear([q.up], normed);
  drop(ctx.scope, [normed]);
  return [up!, kv!];
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
  options: { causal: boolean; offset: number; scale: number; lengths?: Tensor },
): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const rows = batch * length;
  const width = a.rank + a.rope.dim;
  const perHead = (x: Tensor) => x.view(rows, a.heads, x.dim(3)).transpose(0, 1);
  const up = ctx.weights.get(`${a.kvUp.name}.weight`).view(a.heads, a.nope + a.value, a.rank);

  const qLatent = scope.empty(q.dtype, [batch, length, a.heads, width]);
  const qHeads = perHead(q);
  gemm(scope, qHeads.slice(2, 0, a.nope), up.slice(1, 0, a.nope), { out: perHead(qLatent).slice(2, 0, a.rank) });
  copyInto(qLatent.slice(3, a.rank, width), q.slice(3, a.nope, a.nope + a.rope.dim));
  const mixed = yield* attend({ layer: a.layer, q: qLatent, k: latents, v: latents.slice(3, 0, a.rank), options });
  const o = scope.empty(q.dtype, [batch, length, a.heads, a.value]);
  gemm(scope, perHead(mixed), up.slice(1, a.nope, a.nope + a.value).transpose(), { out: perHead(o) });
  drop(scope, [qLatent, mixed]);
  return o;
}
