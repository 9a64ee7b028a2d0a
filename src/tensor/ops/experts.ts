import { Scope, type Tensor } from '../tensor.js';
import { ensure, ensureDType, ensureFloat, ensureShape } from './check.js';
import { binary, gather, reduce, unary } from './math.js';
import { softmax } from './layers.js';

/** Numbers of the native op's `scoring`. */
export const scorings = { softmax: 0, sigmoid: 1, sqrtsoftplus: 2 } as const;

export interface RouteOptions {
  topK: number;
  scoring: keyof typeof scorings;
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
  /** The experts of each token, [T k]: nothing is selected, they are only weighted. */
  chosen?: Int32Array;
}

/** logits [T,E] -> w f32 [T,k], idx i32 [T,k], best first. */
export function route(s: Scope, logits: Tensor, o: RouteOptions): { w: Tensor; idx: Tensor } {
  const t = logits.dim(0);
  ensureDType('route', 'f32', o.bias);
  if (o.chosen) return weigh(s, logits, o, o.chosen);
  const w = s.empty('f32', [t, o.topK]);
  const idx = s.empty('i32', [t, o.topK]);
  const ints = [scorings[o.scoring], o.groups ?? 1, o.topGroups ?? 1, o.groupScore === 'top2' ? 1 : 0, +!!o.normalize];
  w.device.run('route', [w, idx, logits, o.bias], ints, [o.scale ?? 1]);
  return { w, idx };
}

/** What `route` gives for experts that are known beforehand, in their order. */
function weigh(s: Scope, logits: Tensor, o: RouteOptions, chosen: Int32Array): { w: Tensor; idx: Tensor } {
  const [t, experts] = [logits.dim(0), logits.dim(1)];
  const k = o.topK;
  ensure(chosen.length === t * k, 'route', `${chosen.length} chosen experts for ${t} tokens`, logits);
  ensure(t * experts < 2 ** 31, 'route', 'too many scores to index', logits);
  using work = new Scope(s.device);
  const scores = scoresOf(work, logits, o.scoring);
  const places = work.from(
    'i32',
    [t * k],
    chosen.map((e, i) => Math.floor(i / k) * experts + e),
  );
  const w = gather(s, scores.view(t * experts, 1), places).view(t, k);
  if (o.normalize) {
    const sum = reduce(work, 'sum', w, 1).view(t, 1);
    unary(work, 'affine', sum, 1, 1e-20, sum);
    binary(work, 'div', w, sum, { out: w });
  }
  unary(work, 'affine', w, o.scale ?? 1, 0, w);
  return { w, idx: s.from('i32', [t, k], chosen) };
}

function scoresOf(s: Scope, logits: Tensor, scoring: RouteOptions['scoring']): Tensor {
  const x = s.empty('f32', logits.shape);
  if (scoring === 'sigmoid') return unary(s, 'sigmoid', logits, 0, 0, x);
  if (scoring === 'sqrtsoftplus') return unary(s, 'sqrt', unary(s, 'softplus', logits, 0, 0, x), 0, 0, x);
  unary(s, 'affine', logits, 1, 0, x);
  return softmax(s, x);
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

/** dB f32 [E,N,K] += dC_e' A_e over the rows of each expert: the weights' gradient of `groupedGemm`. */
export function groupedOuter(db: Tensor, dc: Tensor, a: Tensor, offsets: Tensor): void {
  ensureShape('grouped_outer', 'dB', db, offsets.dim(0) - 1, dc.dim(1), a.dim(1));
  ensure(dc.dim(0) === a.dim(0), 'grouped_outer', 'rows', dc, a);
  ensureDType('grouped_outer', 'f32', db);
  db.device.run('grouped_outer', [db, dc, a, offsets], [], []);
}

/** Gradients of `expertCombine` for y [T k, C] and w f32 [T, k]; that of `base` is dout itself. */
export function expertCombineBackward(
  s: Scope,
  dout: Tensor,
  { y, place, w }: { y: Tensor; place: Tensor; w: Tensor },
): { dy: Tensor; dw: Tensor } {
  ensureShape('expert_combine_backward', 'dout', dout, place.dim(0), y.dim(1));
  ensureDType('expert_combine_backward', 'f32', w);
  const dy = s.empty(dout.dtype, y.shape);
  const dw = s.empty('f32', w.shape);
  dy.device.run('expert_combine_backward', [dy, dw, dout, y, place, w], [], []);
  return { dy, dw };
}

/** Gradient of `route` for the logits [T, E] from that of the weights, dw f32 [T, k]; the choice has none. */
export function routeBackward(
  s: Scope,
  dw: Tensor,
  { logits, idx }: { logits: Tensor; idx: Tensor },
  o: Pick<RouteOptions, 'scoring' | 'normalize' | 'scale'>,
): Tensor {
  ensureShape('route_backward', 'dw', dw, ...idx.shape);
  ensureDType('route_backward', 'f32', dw);
  const d = s.empty('f32', logits.shape);
  d.device.run('route_backward', [d, dw, logits, idx], [scorings[o.scoring], +!!o.normalize], [o.scale ?? 1]);
  return d;
}

/**
 * Gradient for scores [T, E] of `scale` times the sum of p c, where a soft choice p = sigmoid((s - tau) / temperature)
 * has tau such that `active` of a token's E are chosen in all: f32 [T, E]. `c` [T, E]: what choosing is worth.
 */
export function choiceGradient(
  s: Scope,
  scores: Tensor,
  c: Tensor,
  { active, temperature, scale }: { active: number; temperature: number; scale: number },
): Tensor {
  ensureFloat('choice_gradient', scores, c);
  ensureShape('choice_gradient', 'c', c, ...scores.shape);
  ensure(active > 0 && active < scores.dim(1), 'choice_gradient', `${active} chosen`, scores);
  const d = s.empty('f32', scores.shape);
  d.device.run('choice_gradient', [d, scores, c], [active], [temperature, scale]);
  return d;
}

/**
 * Assigns n items to E places with `capacities` (their sum is n) so that the sum of scores f32 [n, E] is within n `epsilon`
 * deviations of the scores of the largest: the place of each item. `prices`, one a place, from an assignment with like
 * scores (zeros: from none): this one starts there and leaves its own.
 * An auction with epsilon-scaling (Bertsekas & Castanon 1989), on a thread of the host: the device goes on with what is
 * enqueued. Scores that are not finite are refused.
 */
export async function assign(
  scores: Tensor,
  capacities: Int32Array,
  prices: Float64Array,
  epsilon = 1e-3,
): Promise<Int32Array> {
  ensureShape('assign', 'scores', scores, -1, -1);
  for (const { length } of [capacities, prices]) {
    ensure(length === scores.dim(1), 'assign', `${length} places`, scores);
  }
  return await scores.device.assign(await scores.float32(), capacities, prices, epsilon);
}
