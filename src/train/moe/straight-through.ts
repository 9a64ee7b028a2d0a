import { choose } from '../../moe/choose.js';
import { groupValues } from '../../moe/groups.js';
import { maskOf } from '../../moe/masks.js';
import { normalQuantile } from '../../moe/quantile.js';
import type { Choice, GroupLimit } from '../../moe/shape.js';
import type { ForwardContext } from '../../nn/calls.js';
import type { MoeSpec } from '../../nn/moe.js';
import { binary, cast, reduce, unary } from '../../tensor/ops.js';
import { constant } from '../../tensor/tape.js';
import type { Scope, Tensor } from '../../tensor/tensor.js';

/** Of the soft choice that a router learns by, in standard deviations of a token's scores. */
const temperature = 0.25;
/** Farther apart than scores ever are. */
const far = 1e30;

/**
 * `weights` f32 [T, E] as they are, whose gradients also reach the scores that the experts were chosen by, as if the choice
 * were soft: sigmoid((score - threshold) / temperature), in standard deviations of a token's scores (straight-through,
 * Bengio et al. 2013). In a unit-weight container the weights themselves hardly depend on the router.
 */
export function straightThrough(weights: Tensor, logits: Tensor, spec: MoeSpec, ctx: ForwardContext): Tensor {
  const { scope } = ctx;
  const { active, layer } = spec;
  const { groups = 1, topGroups = groups } = layer.route;
  const scores = layer.routeBias ? binary(scope, 'add', unary(scope, 'sigmoid', logits), ctx.weights.get(layer.routeBias)) : logits; // prettier-ignore
  const soft =
    topGroups < groups
      ? limited(scope, scores, { active, limit: { groups, topGroups } })
      : softly(scope, scores, barOf(scope, scores, active / scores.dim(1)));
  const value = constant(scope.device, () => cast(scope, soft, 'f32'));
  return binary(scope, 'add', weights, binary(scope, 'sub', soft, value));
}

/**
 * The soft choice under a limit, o p with o the choice of groups and p that among the experts of open groups, has two
 * gradients: o dp, where o is 0 or 1 as routed, and do p, with o as soft as p, through the two scores that a group's value is
 * the sum of. (What comes out is their sum: only its gradients mean something.)
 */
function limited(
  scope: Scope,
  scores: Tensor,
  { active, limit: { groups, topGroups } }: Choice & { readonly limit: GroupLimit },
): Tensor {
  const { device } = scope;
  const [tokens, experts] = scores.shape as [number, number];
  const size = experts / groups;
  const { best, open, groupBar } = constant(device, () => {
    const { value, best } = groupValues(scope, scores, groups);
    const mask = maskOf(scope, choose(scope, value, { active: topGroups }), groups);
    const closed = unary(scope, 'affine', mask, -1, 1);
    // Of few groups no normal distribution says where the choice is: halfway between the last open one and the next.
    const last = reduce(scope, 'min', binary(scope, 'add', value, closed, { alpha: far }), 1);
    const next = reduce(scope, 'max', binary(scope, 'sub', value, mask, { alpha: far }), 1);
    const { deviation } = barOf(scope, scores, active / experts);
    const groupBar = {
      threshold: binary(scope, 'add', unary(scope, 'affine', last, 0.5, 0), next, { alpha: 0.5 }),
      deviation: unary(scope, 'affine', deviation, Math.SQRT2, 0), // of a sum of two
    };
    const spread = mask.view(tokens, groups, 1).expand(tokens, groups, size);
    return { best, open: cast(scope, spread, 'f32').view(tokens, experts), groupBar };
  });
  const chosen = softly(scope, scores, barOf(scope, scores, active / (topGroups * size), open), open);
  const worth = constant(device, () => cast(scope, chosen, 'f32'));
  const pairs = binary(scope, 'mul', best, scores).view(tokens * groups, size);
  const opened = softly(scope, reduce(scope, 'sum', pairs, 1).view(tokens, groups), groupBar);
  const ofGroups = binary(scope, 'mul', worth.view(tokens, groups, size), opened.view(tokens, groups, 1));
  return binary(scope, 'add', binary(scope, 'mul', open, chosen), ofGroups.view(tokens, experts));
}

/** What a token's values are chosen by: f32 [T] each. */
interface Bar {
  readonly threshold: Tensor;
  readonly deviation: Tensor;
}

const column = (x: Tensor) => x.view(-1, 1);

/**
 * The threshold that `share` of a normal distribution lies above, with mean and deviation of a row of x f32 [T, n], or of
 * what is 1 in `among` f32 [T, n]. Without gradients.
 */
function barOf(scope: Scope, x: Tensor, share: number, among?: Tensor): Bar {
  return constant(scope.device, () => {
    const of = (values: Tensor) => (among ? binary(scope, 'mul', values, among) : values);
    const counted = among && reduce(scope, 'sum', among, 1);
    const mean = counted ? binary(scope, 'div', reduce(scope, 'sum', of(x), 1), counted) : reduce(scope, 'mean', x, 1);
    const squares = reduce(scope, 'sumsq', of(binary(scope, 'sub', x, column(mean))), 1);
    const variance = counted ? binary(scope, 'div', squares, counted) : unary(scope, 'affine', squares, 1 / x.dim(1), 0); // prettier-ignore
    const deviation = unary(scope, 'sqrt', unary(scope, 'affine', variance, 1, 1e-16));
    return { threshold: binary(scope, 'add', mean, deviation, { alpha: normalQuantile(1 - share) }), deviation };
  });
}

/**
 * sigmoid((x - threshold) / temperature) f32 [T, n]. The threshold moves with x as it must for the sum of a row (of what is
 * 1 in `among` f32 [T, n]) to stay, the number of what is chosen: who rises takes another one's place.
 */
function softly(scope: Scope, x: Tensor, { threshold, deviation }: Bar, among?: Tensor): Tensor {
  const { rest, slope, shares } = constant(scope.device, () => {
    const slope = column(unary(scope, 'reciprocal', unary(scope, 'affine', deviation, temperature, 0)));
    const p = unary(scope, 'sigmoid', binary(scope, 'mul', binary(scope, 'sub', x, column(threshold)), slope));
    const rises = binary(scope, 'mul', p, unary(scope, 'affine', p, -1, 1));
    const steep = among ? binary(scope, 'mul', rises, among) : rises;
    const sum = unary(scope, 'affine', reduce(scope, 'sum', steep, 1), 1, 1e-30);
    const shares = binary(scope, 'div', steep, column(sum));
    const rest = binary(scope, 'sub', threshold, reduce(scope, 'sum', binary(scope, 'mul', shares, x), 1));
    return { rest, slope, shares };
  });
  const moving = binary(scope, 'add', rest, reduce(scope, 'sum', binary(scope, 'mul', shares, x), 1));
  return unary(scope, 'sigmoid', binary(scope, 'mul', binary(scope, 'sub', x, column(moving)), slope));
}
