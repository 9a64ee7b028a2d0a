import { expertCombine, expertSort, fill, gather, groupedGemm, matmulT, swiglu } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { FfnSpec } from '../nn/mlp.js';
import { choose, scoresOf, type Router } from './router.js';
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
