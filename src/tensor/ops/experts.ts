import type { Scope, Tensor } from '../tensor.js';
import { ensureDType, ensureShape } from './check.js';

export interface RouteOptions {
  topK: number;
  scoring: 'softmax' | 'sigmoid' | 'sqrtsoftplus';
  /** Added to the scores for the selection only; f32 [E]. */
  bias?: Tensor;
  groups?: number;
  topGroups?: number;
  /** How a group is scored: by its best expert, or by the sum of its two best. */
  groupScore?: 'max' | 'top2';
  /** Divide the chosen weights by their sum. */
  normalize?: boolean;
  /** Multiplies the weights (routed_scaling_factor). */
  scale?: number;
}

/** logits [T,E] -> w f32 [T,k], idx i32 [T,k], best first. */
export function route(s: Scope, logits: Tensor, o: RouteOptions): { w: Tensor; idx: Tensor } {
  const t = logits.dim(0);
  ensureDType('route', 'f32', o.bias);
  const w = s.empty('f32', [t, o.topK]);
  const idx = s.empty('i32', [t, o.topK]);
  const scoring = { softmax: 0, sigmoid: 1, sqrtsoftplus: 2 }[o.scoring];
  const ints = [scoring, o.groups ?? 1, o.topGroups ?? 1, o.groupScore === 'top2' ? 1 : 0, +!!o.normalize];
  w.device.run('route', [w, idx, logits, o.bias], ints, [o.scale ?? 1]);
  return { w, idx };
}

export interface ExpertOrder {
  /** i32 [T k]: slot t k + j of each sorted row; slot / k is its token. */
  slots: Tensor;
  /** i32 [E+1]: expert e owns sorted rows offsets[e]..offsets[e+1]. */
  offsets: Tensor;
  /** i32 [T,k]: the sorted row of slot t k + j. */
  place: Tensor;
  /** i32 [T k]: the token of each sorted row. */
  tokens: Tensor;
}

/** Stable counting sort of the chosen experts idx i32 [T,k]. */
export function expertSort(s: Scope, idx: Tensor, experts: number): ExpertOrder {
  const [t, k] = [idx.dim(0), idx.dim(1)];
  const slots = s.empty('i32', [t * k]);
  const tokens = s.empty('i32', [t * k]);
  const offsets = s.empty('i32', [experts + 1]);
  const place = s.empty('i32', [t, k]);
  slots.device.run('expert_sort', [slots, tokens, offsets, place, idx], [], []);
  return { slots, offsets, place, tokens };
}

/** out[t] = sum_j w[t,j] y[place[t,j]] (+ base[t]). */
export function expertCombine(s: Scope, y: Tensor, place: Tensor, w: Tensor, base?: Tensor): Tensor {
  ensureShape('expert_combine', 'w', w, ...place.shape);
  const out = s.empty(y.dtype, [place.dim(0), y.dim(1)]);
  out.device.run('expert_combine', [out, y, place, w, base], [], []);
  return out;
}
