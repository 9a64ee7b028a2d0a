import { binary, matmulT, reduce, route, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Choice } from './shape.js';

/** Scores of experts: x W' + b, with a deviation of about 1. */
export interface Router {
  /** f32 [R, C] */
  readonly weight: Tensor;
  /** f32 [R]; zero where the container has no selection bias. */
  readonly bias: Tensor;
}

/** Scores of the sample's tokens: f32 [T, R]. */
export const scoresOf = (s: Scope, x: Tensor, { weight, bias }: Router): Tensor =>
  matmulT(s, x, weight, { bias, dtype: 'f32' });

/** Times this, a sigmoid of scores is a line to what fp32 resolves, as it is of the tiny logits that are stored. */
const inLine = 1e-3;

/**
 * The K experts with the largest scores (ties to the lower index), of the best groups where there is a limit: i32 [T, K],
 * best first.
 */
export function choose(s: Scope, scores: Tensor, { active, limit }: Choice): Tensor {
  using work = new Scope(s.device);
  const { w, idx } = limit
    ? route(s, small(work, scores), { topK: active, scoring: 'sigmoid', ...limit, groupScore: 'top2' })
    : route(s, scores, { topK: active, scoring: 'softmax' });
  s.free(w);
  return idx;
}

/** Less what a token's experts have in common, which must not push sums of two scores out of the line. */
function small(s: Scope, scores: Tensor): Tensor {
  const own = binary(s, 'sub', scores, reduce(s, 'mean', scores, 1).view(-1, 1));
  return unary(s, 'affine', own, inLine, 0, own);
}
