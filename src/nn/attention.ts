import { rope, unary } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import { attend, linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
import { drop, linearTensors, type Layer } from './layer.js';
import { normalise, normTensor, type NormSpec } from './norm.js';
import type { RopeSpec } from './rope.js';

/** Attention with grouped key/value heads (Ainslie et al. 2023). */
export interface AttentionSpec {
  readonly layer: number;
  readonly q: LinearSpec;
  readonly k: LinearSpec;
  readonly v: LinearSpec;
  readonly o: LinearSpec;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  /** Of scores; default headDim^-0.5. */
  readonly scale?: number;
  /** Only the last `window` keys; absent or 0: all. */
  readonly window?: number | undefined;
  readonly rope: RopeSpec;
  /** Norms of q and k before they turn: per head (width headDim), or over all heads at once. */
  readonly qNorm?: NormSpec | undefined;
  readonly kNorm?: NormSpec | undefined;
  /** q, k and v are clamped to [-clip, clip]. */
  readonly clip?: number | undefined;
  /** Soft cap on scores: cap tanh(score / cap). */
  readonly cap?: number | undefined;
}

/** Turns x [B,S,H,D] to the context's positions. */
export function turn(ctx: ForwardContext, spec: RopeSpec, x: Tensor): Tensor {
  const { cos, sin } = ctx.rope.get(spec, ctx.end);
  return rope(ctx.scope, x, cos, sin, ctx.positions, { interleaved: spec.interleaved, fromEnd: spec.fromEnd });
}

export function selfAttention(a: AttentionSpec): Layer & { readonly grouped: AttentionSpec } {
  const norms = [a.qNorm, a.kNorm].filter((n) => n !== undefined);
  return {
    grouped: a,
    tensors: [...linearTensors([a.q, a.k, a.v, a.o]), ...norms.map(normTensor)],
    linears: [[a.q, a.k, a.v], [a.o]],
    cached: (tokens) => 2 * a.kvHeads * a.headDim * Math.min(tokens, a.window ?? tokens),
    forward: (x, ctx, used) => forward(a, x, ctx, used),
  };
}

function* forward(a: AttentionSpec, x: Tensor, ctx: ForwardContext, used?: () => void): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const [qRaw, kRaw, v] = (yield* linear([a.q, a.k, a.v], x)) as [Tensor, Tensor, Tensor];
  used?.();

  const renorm = (norm: NormSpec | undefined, y: Tensor, others: Tensor[]): Tensor => {
    if (!norm) return y;
    const normed = normalise(norm, y.view(-1, norm.width), ctx).view(...y.shape);
    drop(scope, [y], others);
    return normed;
  };
  const q = renorm(a.qNorm, qRaw, [kRaw, v]);
  const k = renorm(a.kNorm, kRaw, [qRaw, v]);
  if (a.clip !== undefined) for (const y of [q, k, v]) unary(scope, 'clamp', y, -a.clip, a.clip, y);

  const qTurned = turn(ctx, a.rope, q.view(batch, length, a.heads, a.headDim));
  const kTurned = turn(ctx, a.rope, k.view(batch, length, a.kvHeads, a.headDim));
  drop(scope, [q, k], [v]);
  const vHeads = v.view(batch, length, a.kvHeads, a.headDim);
  const kv = ctx.cache ? ctx.cache.append(kTurned, vHeads, a.window) : { k: kTurned, v: vHeads, offset: 0 };
  const o = yield* attend({
    layer: a.layer,
    q: qTurned,
    k: kv.k,
    v: kv.v,
    options: {
      causal: true,
      window: a.window ?? 0,
      offset: kv.offset,
      scale: a.scale ?? a.headDim ** -0.5,
      ...(a.cap !== undefined && { cap: a.cap }),
      ...(ctx.lengths && { lengths: ctx.lengths }),
    },
  });
  drop(scope, [qTurned, kTurned, v]);
  const [y] = yield* linear([a.o], o.view(batch * length, a.heads * a.headDim));
  drop(scope, [o]);
  return y!;
}
