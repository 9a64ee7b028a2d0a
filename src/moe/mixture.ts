import { expertCombine, expertSort, fill, gather, groupedGemm, matmulT, swiglu } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { FfnSpec } from '../nn/mlp.js';
import { choose, scoresOf, type Router } from './router.js';
import { applyMask, routingMask } from './refit.js';
import type { FfnWeights } from './sample.js';
import { pieces, type MoeShape } from './shape.js';
import type { Experts } from './split.js';

/**
 * Output of a mixture with unit weights on x [T, C]: the chosen K experts and the shared ones. `experts` carry plain
 * weights here (no container's factors). In x's precision.
 */
export function mixtureOutput(
  s: Scope,
  x: Tensor,
  router: Router,
  experts: Experts,
  active: number,
  activation: FfnSpec['activation'],
): Tensor {
  using work = new Scope(s.device);
  const idx = choose(work, scoresOf(work, x, router), active);
  const order = expertSort(work, idx, router.weight.dim(0));
  const rows = gather(work, x, order.tokens);
  const gate = groupedGemm(work, rows, experts.gate, order.offsets);
  const up = groupedGemm(work, rows, experts.up, order.offsets);
  const y = groupedGemm(work, swiglu(work, gate, up, activation), experts.down, order.offsets);
  const ones = work.empty('f32', idx.shape);
  fill(ones, 1);
  const { shared } = experts;
  const base = shared && matmulT(work, swiglu(work, matmulT(work, x, shared.gate), matmulT(work, x, shared.up), activation), shared.down); // prettier-ignore
  return expertCombine(s, y, order.place, ones, base);
}

/** A larger share of the neurons than this is computed faster all at once than gathered by expert. */
const mostOn = 0.5;
export const runsWhole = (shape: MoeShape): boolean => shape.active + shape.shared > mostOn * pieces(shape);

/** The same from weights in the order of the split and in x's precision: all neurons, those of other experts set to zero. */
export function maskedOutput(
  s: Scope,
  x: Tensor,
  router: Router,
  w: FfnWeights,
  shape: MoeShape,
  activation: FfnSpec['activation'],
): Tensor {
  using work = new Scope(s.device);
  const h = swiglu(work, matmulT(work, x, w.gate), matmulT(work, x, w.up), activation);
  return matmulT(s, applyMask(work, h, routingMask(work, x, router, shape), shape), w.down);
}
