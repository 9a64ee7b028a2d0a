import type { FloatDType } from '../../base/dtype.js';
import type { Scope, Tensor } from '../tensor.js';
import { ensure, ensureContiguous, ensureDType, ensureFloat, ensureRows, ensureShape } from './check.js';
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

/**
 * Gradient of `rmsnorm`: returns dx (dtype of dy) and adds to dw f32 [C] where given. rstd is what the forward wrote.
 */
export function rmsnormBackward(
  s: Scope,
  dy: Tensor,
  x: Tensor,
  w: Tensor | undefined,
  rstd: Tensor,
  { offset = 0, dw }: { offset?: number; dw?: Tensor } = {},
): Tensor {
  const c = x.dim(-1);
  ensureShape('rmsnorm_backward', 'dy', dy, ...x.shape);
  if (w) ensureShape('rmsnorm_backward', 'w', w, c);
  if (dw) ensureShape('rmsnorm_backward', 'dw', dw, c);
  ensureDType('rmsnorm_backward', 'f32', rstd, dw);
  ensure(rstd.count === x.count / c, 'rmsnorm_backward', 'one rstd per row', rstd, x);
  const dx = s.empty(dy.dtype, x.shape);
  dx.device.run(
    'rmsnorm_backward',
    [dx.view(-1, c), dw, dy.view(-1, c), x.view(-1, c), w, rstd.view(-1)],
    [],
    [offset],
  );
  return dx;
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

/** Gradients of `swiglu` for gate and up; nothing flows through clamped values. */
export function swigluBackward(
  s: Scope,
  dy: Tensor,
  gate: Tensor,
  up: Tensor,
  activation: UnaryKind = 'silu',
  limit = 0,
): { dgate: Tensor; dup: Tensor } {
  ensureShape('swiglu_backward', 'dy', dy, ...gate.shape);
  ensureShape('swiglu_backward', 'up', up, ...gate.shape);
  const dgate = s.empty(dy.dtype, gate.shape);
  const dup = s.empty(dy.dtype, gate.shape);
  dy.device.run('swiglu_backward', [dgate, dup, dy, gate, up], [unaryKinds[activation]], [limit]);
  return { dgate, dup };
}

/** softmax(scale x) over the last dimension. */
export function softmax(s: Scope, x: Tensor, scale = 1): Tensor {
  const y = s.empty(x.dtype, x.shape);
  y.device.run('softmax', [y.view(-1, x.dim(-1)), x.view(-1, x.dim(-1))], [], [scale]);
  return y;
}

/** Gradient of `softmax` from its output y: scale y (dy - sum(dy y)). */
export function softmaxBackward(s: Scope, dy: Tensor, y: Tensor, scale = 1): Tensor {
  ensureShape('softmax_backward', 'dy', dy, ...y.shape);
  const c = y.dim(-1);
  const dx = s.empty(dy.dtype, y.shape);
  dx.device.run('softmax_backward', [dx.view(-1, c), dy.view(-1, c), y.view(-1, c)], [], [scale]);
  return dx;
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

/** scale (softmax(logits) - onehot(target)) per row [T,V]; zeros where the target is -1. lse f32 [T] as the forward wrote it. */
export function crossEntropyBackward(
  s: Scope,
  logits: Tensor,
  targets: Tensor,
  lse: Tensor,
  scale: number,
  dtype: FloatDType = logits.dtype as FloatDType,
): Tensor {
  ensureShape('cross_entropy_backward', 'targets', targets, logits.dim(0));
  ensureShape('cross_entropy_backward', 'lse', lse, logits.dim(0));
  ensureDType('cross_entropy_backward', 'i32', targets);
  ensureDType('cross_entropy_backward', 'f32', lse);
  const d = s.empty(dtype, logits.shape);
  d.device.run('cross_entropy_backward', [d, logits, targets, lse], [], [scale]);
  return d;
}

/** kl f32 [T]: KL(softmax(p) || softmax(q)) per row, nats; same f32 [T]: 1 where both have the same argmax. */
export function klRows(s: Scope, p: Tensor, q: Tensor): { kl: Tensor; same: Tensor } {
  ensureShape('kl', 'q', q, ...p.shape);
  const kl = s.empty('f32', [p.dim(0)]);
  const same = s.empty('f32', [p.dim(0)]);
  kl.device.run('kl', [kl, p, q, same], [], []);
  return { kl, same };
}

/** Gradient of `klRows` for the logits q: scale (softmax(q) - softmax(p)). */
export function klBackward(
  s: Scope,
  p: Tensor,
  q: Tensor,
  scale: number,
  dtype: FloatDType = q.dtype as FloatDType,
): Tensor {
  ensureShape('kl_backward', 'q', q, ...p.shape);
  const dq = s.empty(dtype, q.shape);
  dq.device.run('kl_backward', [dq, p, q], [], [scale]);
  return dq;
}

export interface SampleOptions {
  /** Divides the logits; 0: the most probable token. Default 1. */
  readonly temperature?: number;
  /** Only the k most probable tokens; 0 (default): all. */
  readonly topK?: number;
  /** Of these the smallest set whose probabilities sum to at least this; default 1 (Holtzman et al. 2020). */
  readonly topP?: number;
  /** Only tokens that have at least this share of the most probable one's probability; default 0 (Nguyen et al. 2024). */
  readonly minP?: number;
}

/**
 * Draws a token i32 [T] from each row of logits float [T,V] with the numbers u f64 [T] in [0, 1). logprob f32 [T], where
 * wanted: log-probability of the token under the logits as they are. Rows with NaN or infinity give -1 and NaN.
 */
export function sample(
  s: Scope,
  logits: Tensor,
  u: Tensor,
  { temperature = 1, topK = 0, topP = 1, minP = 0 }: SampleOptions = {},
  { logprob, out }: { logprob?: Tensor; out?: Tensor } = {},
): Tensor {
  const [rows, vocabulary] = logits.shape as [number, number];
  const tokens = out ?? s.empty('i32', [rows]);
  ensureShape('sample', 'logits', logits, -1, -1);
  ensureFloat('sample', logits);
  ensureRows('sample', logits);
  ensureDType('sample', 'i32', tokens);
  ensureDType('sample', 'f64', u);
  ensureDType('sample', 'f32', logprob);
  for (const each of [tokens, u, logprob]) {
    if (!each) continue;
    ensureShape('sample', 'one value a row', each, rows);
    ensureContiguous('sample', each);
  }
  const sound = vocabulary > 0 && (temperature === 0 || temperature >= 1e-4) && topK >= 0 && topP >= 0 && minP >= 0 && minP <= 1; // prettier-ignore
  ensure(sound, 'sample', `temperature ${temperature}, top-k ${topK}, top-p ${topP}, min-p ${minP}`, logits);
  tokens.device.run('sample', [tokens, logits, u, logprob], [topK], [temperature, topP, minP]);
  return tokens;
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

/** Gradients of `attention` without soft cap; o and lse as the forward wrote them (with sinks, lse holds them too). */
export function attentionBackward(
  s: Scope,
  d: Tensor,
  { o, q, k, v, lse }: { o: Tensor; q: Tensor; k: Tensor; v: Tensor; lse: Tensor },
  options: Pick<AttentionOptions, 'causal' | 'window' | 'offset' | 'scale' | 'lengths'>,
): { dq: Tensor; dk: Tensor; dv: Tensor } {
  ensureShape('attention_backward', 'do', d, ...o.shape);
  ensureShape('attention_backward', 'lse', lse, q.dim(0), q.dim(2), q.dim(1));
  ensureDType('attention_backward', 'f32', lse);
  const dq = s.empty(q.dtype, q.shape);
  const dk = s.empty(k.dtype, k.shape);
  const dv = s.empty(v.dtype, v.shape);
  const ints = [+(options.causal ?? true), options.window ?? 0, options.offset ?? 0];
  q.device.run('attention_backward', [dq, dk, dv, d, o, q, k, v, lse, options.lengths], ints, [options.scale]);
  return { dq, dk, dv };
}

/**
 * f32 [B,Hq,S,3]: Jensen-Shannon divergence, cosine, top-8 overlap of two models' attention rows, the first key excluded.
 * Learned sinks (an extra score in the denominator) cancel out: rows are compared over keys alone.
 */
export function attentionCompare(
  s: Scope,
  a: { q: Tensor; k: Tensor; scale: number; cap?: number },
  b: { q: Tensor; k: Tensor; scale: number; cap?: number },
  o: Pick<AttentionOptions, 'causal' | 'window' | 'offset' | 'lengths'> = {},
): Tensor {
  ensure(a.q.dim(2) === b.q.dim(2), 'attention_compare', 'head counts', a.q, b.q);
  ensureRows('attention_compare', a.q, a.k, b.q, b.k);
  const y = s.empty('f32', [a.q.dim(0), a.q.dim(2), a.q.dim(1), 3]);
  const ints = [+(o.causal ?? true), o.window ?? 0, o.offset ?? 0];
  y.device.run('attention_compare', [y, a.q, a.k, b.q, b.k, o.lengths], ints, [
    a.scale,
    b.scale,
    a.cap ?? 0,
    b.cap ?? 0,
  ]);
  return y;
}
