import type { FloatDType } from '../../base/dtype.js';
import type { Scope, Tensor } from '../tensor.js';
import { ensure, ensureDType, ensureFloat, ensureRows, ensureShape } from './check.js';
import { unaryKinds, type UnaryKind } from './math.js';

/** y = x rsqrt(mean(x^2) + eps) (w + offset) over the last dimension; rows of any leading shape. */
export function rmsnorm(
  s: Scope,
  x: Tensor,
  w: Tensor | undefined,
  eps: number,
  { offset = 0, rstd, dtype }: { offset?: number; rstd?: Tensor; dtype?: FloatDType } = {},
): Tensor {
  const c = x.dim(-1);
  if (w) ensureShape('rmsnorm', 'w', w, c);
  ensureFloat('rmsnorm', x, w);
  const y = s.empty(dtype ?? x.dtype, x.shape);
  const rows = x.contiguous ? x.view(-1, c) : x;
  ensure(rows.shape.length === 2, 'rmsnorm', 'contiguous or rank 2', x);
  ensureRows('rmsnorm', rows);
  y.device.run('rmsnorm', [y.view(-1, c), rows, w, rstd], [], [eps, offset]);
  return y;
}

export function layernorm(s: Scope, x: Tensor, w: Tensor | undefined, b: Tensor | undefined, eps: number): Tensor {
  const c = x.dim(-1);
  const y = s.empty(x.dtype, x.shape);
  y.device.run('layernorm', [y.view(-1, c), x.view(-1, c), w, b], [], [eps]);
  return y;
}

/** act(gate) up, element by element; `limit` > 0 clamps gate from above and up to [-limit, limit]. */
export function swiglu(s: Scope, gate: Tensor, up: Tensor, activation: UnaryKind = 'silu', limit = 0): Tensor {
  ensureShape('swiglu', 'up', up, ...gate.shape);
  const y = s.empty(gate.dtype, gate.shape);
  y.device.run('swiglu', [y, gate, up], [unaryKinds[activation]], [limit]);
  return y;
}

/** softmax(scale x) over the last dimension. */
export function softmax(s: Scope, x: Tensor, scale = 1): Tensor {
  const y = s.empty(x.dtype, x.shape);
  y.device.run('softmax', [y.view(-1, x.dim(-1)), x.view(-1, x.dim(-1))], [], [scale]);
  return y;
}

export interface RopeOptions {
  /** Pairs (2i, 2i+1) instead of halves (i, i + R/2). */
  interleaved?: boolean;
  /** Rotates the last R channels instead of the first. */
  fromEnd?: boolean;
  inverse?: boolean;
}

/** Rotary embedding: x [B,S,H,D]; cos, sin f32 [P, R/2]; positions i32 [B,S]. */
export function rope(s: Scope, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, o: RopeOptions = {}): Tensor {
  ensureShape('rope', 'x', x, -1, -1, -1, -1);
  ensureShape('rope', 'positions', positions, x.dim(0), x.dim(1));
  ensureDType('rope', 'i32', positions);
  ensureDType('rope', 'f32', cos, sin);
  ensure(cos.dim(1) * 2 <= x.dim(3), 'rope', 'rotated width', x, cos);
  const y = s.empty(x.dtype, x.shape);
  y.device.run('rope', [y, x, cos, sin, positions], [+!!o.interleaved, +!!o.fromEnd, +!!o.inverse], []);
  return y;
}

/** Per row of logits [T,V]: loss f32 [T] = lse - logits[target] (target -1: 0). */
export function crossEntropy(s: Scope, logits: Tensor, targets: Tensor, extra: { lse?: Tensor; top?: Tensor } = {}) {
  ensureShape('cross_entropy', 'targets', targets, logits.dim(0));
  ensureDType('cross_entropy', 'i32', targets, extra.top);
  const loss = s.empty('f32', [logits.dim(0)]);
  loss.device.run('cross_entropy', [loss, logits, targets, extra.lse, extra.top], [], []);
  return loss;
}

/** kl f32 [T]: KL(softmax(p) || softmax(q)) per row, nats; same f32 [T]: 1 where both have the same argmax. */
export function klRows(s: Scope, p: Tensor, q: Tensor): { kl: Tensor; same: Tensor } {
  ensureShape('kl', 'q', q, ...p.shape);
  const kl = s.empty('f32', [p.dim(0)]);
  const same = s.empty('f32', [p.dim(0)]);
  kl.device.run('kl', [kl, p, q, same], [], []);
  return { kl, same };
}

export interface AttentionOptions {
  causal?: boolean;
  /** Only the last `window` keys; 0: all. */
  window?: number;
  /** Key position of the first query. */
  offset?: number;
  scale: number;
  /** Soft cap on scores: cap tanh(x / cap); 0: none. */
  cap?: number;
  /** Keys at and beyond lengths[b] are masked; i32 [B]. */
  lengths?: Tensor;
  /** f32 [Hq]: an extra score in the denominator. */
  sinks?: Tensor;
  /** f32 [B,Hq,S]: written with the log-sum-exp of the scores. */
  lse?: Tensor;
}

/** o [B,S,Hq,Dv] of q [B,S,Hq,D], k [B,T,Hkv,D], v [B,T,Hkv,Dv]. */
export function attention(s: Scope, q: Tensor, k: Tensor, v: Tensor, o: AttentionOptions): Tensor {
  ensureShape('attention', 'k', k, q.dim(0), -1, -1, q.dim(3));
  ensureShape('attention', 'v', v, k.dim(0), k.dim(1), k.dim(2), -1);
  ensure(q.dim(2) % k.dim(2) === 0, 'attention', 'query heads over key heads', q, k);
  ensureRows('attention', q, k, v);
  const y = s.empty(q.dtype, [q.dim(0), q.dim(1), q.dim(2), v.dim(3)]);
  const ints = [+(o.causal ?? true), o.window ?? 0, o.offset ?? 0];
  y.device.run('attention', [y, q, k, v, o.lengths, o.sinks, o.lse], ints, [o.scale, o.cap ?? 0]);
  return y;
}

/** f32 [B,Hq,S,3]: Jensen-Shannon divergence, cosine, top-8 overlap of two models' attention rows, sink excluded. */
export function attentionCompare(
  s: Scope,
  a: { q: Tensor; k: Tensor; scale: number },
  b: { q: Tensor; k: Tensor; scale: number },
  o: Pick<AttentionOptions, 'causal' | 'window' | 'offset' | 'lengths'> = {},
): Tensor {
  ensure(a.q.dim(2) === b.q.dim(2), 'attention_compare', 'head counts', a.q, b.q);
  ensureRows('attention_compare', a.q, a.k, b.q, b.k);
  const y = s.empty('f32', [a.q.dim(0), a.q.dim(2), a.q.dim(1), 3]);
  const ints = [+(o.causal ?? true), o.window ?? 0, o.offset ?? 0];
  y.device.run('attention_compare', [y, a.q, a.k, b.q, b.k, o.lengths], ints, [a.scale, b.scale]);
  return y;
}
