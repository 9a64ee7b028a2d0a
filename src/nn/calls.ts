import type { Scope, Tensor } from '../tensor/tensor.js';
import type { AttentionOptions, ExpertOrder, PackedInt4, RouteOptions } from '../tensor/ops.js';
import type { RopeTables } from './rope.js';

/**
 * Tensors of a call live until it is answered; answers are contiguous, live in the context's scope and are freed by
 * the forward pass that asked.
 *
 * A block's forward pass is a generator that yields a call wherever somebody may want to look or step in: linears,
 * attention, routing, experts. Whoever drives it answers each call. Plain inference answers at once; calibration keeps
 * one suspended generator per batch, gathers statistics of all batches at a call, quantizes, and answers with the new
 * weights (one pass, errors propagate); validation steps two models side by side.
 */
export type Calls<R> = Generator<Call, R, unknown>;
export type Call = LinearCall | AttentionCall | RouteCall | ExpertsCall;

/** One weight matrix [outFeatures, inFeatures] of the checkpoint. */
export interface LinearSpec {
  /** Tensor name without `.weight`: `model.layers.3.self_attn.q_proj`. */
  readonly name: string;
  readonly inFeatures: number;
  readonly outFeatures: number;
  readonly bias?: boolean;
  /** Routers and heads stay in high precision unless asked otherwise; `other` always does: engines have no place for it. */
  readonly role: 'attention' | 'mlp' | 'expert' | 'shared-expert' | 'router' | 'head' | 'other';
}

/** Linears that share one input (q/k/v; gate/up): one Hessian, one scheme. Answer: y [T, N] for each. */
export interface LinearCall {
  readonly kind: 'linear';
  readonly linears: readonly LinearSpec[];
  /** [T, K], contiguous rows. */
  readonly x: Tensor;
}

/** Answer: o [B, S, Hq, Dv]; `options.lse`, where there is one, is written too. q and k come rotated. */
export interface AttentionCall {
  readonly kind: 'attention';
  readonly layer: number;
  readonly q: Tensor;
  readonly k: Tensor;
  readonly v: Tensor;
  readonly options: AttentionOptions;
}

/** Answer: { w, idx } as `ops.route` gives. */
export interface RouteCall {
  readonly kind: 'route';
  readonly layer: number;
  /** [T, E] */
  readonly logits: Tensor;
  readonly options: RouteOptions;
}

/** The same one or two linears of every expert on rows sorted by expert. Answer: y [R, N] for each name. */
export interface ExpertsCall {
  readonly kind: 'experts';
  readonly layer: number;
  /** linears[j][e]: linear j (gate, up | down) of expert e. */
  readonly linears: readonly (readonly LinearSpec[])[];
  /** [R, K] sorted by expert. */
  readonly x: Tensor;
  readonly order: ExpertOrder;
}

export function* linear(linears: readonly LinearSpec[], x: Tensor): Calls<Tensor[]> {
  return (yield { kind: 'linear', linears, x }) as Tensor[];
}
export function* attend(call: Omit<AttentionCall, 'kind'>): Calls<Tensor> {
  return (yield { kind: 'attention', ...call }) as Tensor;
}
export function* choose(call: Omit<RouteCall, 'kind'>): Calls<{ w: Tensor; idx: Tensor }> {
  return (yield { kind: 'route', ...call }) as { w: Tensor; idx: Tensor };
}
export function* experts(call: Omit<ExpertsCall, 'kind'>): Calls<Tensor[]> {
  return (yield { kind: 'experts', ...call }) as Tensor[];
}

/** Weights of one block (or of the head) on the device, by full checkpoint name. */
export interface Weights {
  /** A tensor by its full name; throws when it was not loaded. */
  get(name: string): Tensor;
  has(name: string): boolean;
  /** The 4-bit codes of `X.weight`, where they are held in its place: then `get` knows no such tensor. */
  packed?(name: string): PackedInt4 | undefined;
  /** [E, N, K]: the weights of linear j of all experts, stacked. */
  stack(linears: readonly LinearSpec[]): Tensor;
  /** Replaces a linear's weight (calibration puts the quantized one here). */
  set(name: string, weight: Tensor): void;
  /** A table of integers (TensorSpec.below), row by row. */
  table(name: string): Int32Array;
}

/** Keys and values of earlier tokens, one layer: appended to by attention, which then sees all of them. */
export interface KvCache {
  /** Tokens that went through it. */
  readonly length: number;
  /**
   * [B,S,H,D] each -> all so far, [B,T,H,D]. Without `v` (compressed latents), the values are the keys. With `window`
   * older ones than a window needs may be gone; `offset` is where the first of the new ones stands.
   */
  append(k: Tensor, v?: Tensor, window?: number): { k: Tensor; v: Tensor; offset: number };
  /** Another sequence that the layer keeps: of entries that stand for several tokens, for example. */
  part(name: string): KvCache;
}

/** What a forward pass runs in. Tokens are [B, S]; hidden states [B S, C]. */
export interface ForwardContext {
  /** Intermediates live here; free early what is large. */
  readonly scope: Scope;
  readonly weights: Weights;
  readonly batch: number;
  readonly length: number;
  /** The tokens [B S] themselves, for layers that look them up; absent where only hidden states are at hand. */
  readonly tokens?: Int32Array;
  /** i32 [B, S]. */
  readonly positions: Tensor;
  /** One more than the largest position. */
  readonly end: number;
  readonly rope: RopeTables;
  /** i32 [B]: number of real tokens of each row when rows are padded on the right. */
  readonly lengths?: Tensor;
  readonly cache?: KvCache;
}
