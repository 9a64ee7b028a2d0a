import { binary, matmulT, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Container } from './containers/types.js';
import type { Router } from './choose.js';

/** What the checkpoint holds: logits are tiny, so that all experts' weights come out alike. */
export interface StoredRouter {
  /** f32 [R, C]: 16 bits would blur the ranking of tiny logits. */
  readonly weight: Tensor;
  /** f32 [R] */
  readonly bias: Tensor | undefined;
}

/**
 * Root mean square of the stored logits. An expert's weight is off by half of it (sigmoid) or all of it (softmax),
 * relatively; the container's fp32 scores resolve 6e-8 (relative to 1/R for softmax), some hundredths of it.
 */
const logitSize = { sigmoid: 4e-5, softmax: 1e-5 } as const;

/**
 * The unit-weight form of a router (FORMATS, "Unit weights"): logits times a small number, less what all experts have in
 * common, keep their ranking while every weight becomes the same. `x` f32 [T, C] are hidden states to measure on.
 */
export async function storeRouter(
  scope: Scope,
  { weight, bias }: Router,
  x: Tensor,
  container: Pick<Container, 'scoring' | 'selectionBias'>,
): Promise<StoredRouter> {
  using work = new Scope(scope.device);
  const common = reduce(work, 'mean', weight, 0);
  const own = binary(work, 'sub', weight, common.view(1, -1));
  const logits = matmulT(work, x, own);
  const square = (await reduce(work, 'sumsq', logits.view(1, -1), 1).float32())[0]! / logits.count;
  const epsilon = logitSize[container.scoring] / Math.max(Math.sqrt(square), 1e-20);
  const stored = unary(scope, 'affine', own, epsilon, 0);
  if (!container.selectionBias) return { weight: stored, bias: undefined };
  const middle = (await reduce(work, 'mean', bias.view(1, -1), 1).float32())[0]!;
  // sigmoid(u) = 1/2 + u/4 + O(u^3): what is a quarter of the logit for the score is a quarter of the bias too.
  return { weight: stored, bias: unary(scope, 'affine', bias, epsilon / 4, (-middle * epsilon) / 4) };
}
