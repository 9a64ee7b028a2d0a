import { expertCombine, expertSort, fill, gather, groupedGemm, matmulT, swiglu } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { FfnSpec } from '../nn/mlp.js';
import { choose, scoresOf, type Router } from './choose.js';
import { applyMask, routingMask } from './masks.js';
import type { FfnWeights } from './sample.js';
import { pieces, type Choice, type MoeShape } from './shape.js';
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
  choice: Choice,
  activation: FfnSpec['activation'],
): Tensor {
  using work = new Scope(s.device);
  const idx = choose(work, scoresOf(work, x, router), choice);
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

/** A larger share of the neurons than this is computed faster all at once and masked than gathered by expert. */
const mostOn = 0.5;
export const runsWhole = (shape: MoeShape): boolean => shape.active + shape.shared > mostOn * pieces(shape);

/** The neurons of a layer on its inputs, in the order of the split and in the inputs' precision. */
export class Activations {
  readonly #scope: Scope;
  readonly #kept = new Map<Tensor, Tensor>();

  /** `w`: in the order of the split, in the inputs' precision. What is kept lives in `scope`. */
  constructor(
    scope: Scope,
    readonly w: Pick<FfnWeights, 'gate' | 'up'>,
    readonly router: Router,
    readonly shape: MoeShape,
    readonly activation: FfnSpec['activation'],
  ) {
    this.#scope = scope;
  }

  /** For x [T, C]: all neurons, and the same with those of experts that are off set to zero; [T, capacity]. */
  of(s: Scope, x: Tensor): { readonly whole: Tensor; readonly masked: Tensor } {
    const { w, router, shape, activation } = this;
    const [gate, up] = [matmulT(s, x, w.gate), matmulT(s, x, w.up)];
    const whole = swiglu(s, gate, up, activation);
    s.free(gate, up);
    return { whole, masked: applyMask(s, whole, routingMask(s, x, router, shape), shape) };
  }

  /** `masked` of x, made in the scope `from`, is there when x comes again. */
  keep(x: Tensor, masked: Tensor, from: Scope): void {
    this.#kept.set(x, from.move(masked, this.#scope));
  }

  /** `masked` of x for the last time, computed unless it was kept: the same values. It lives in `s`. */
  take(s: Scope, x: Tensor): Tensor {
    const kept = this.#kept.get(x);
    if (!kept) return this.of(s, x).masked;
    this.#kept.delete(x);
    return this.#scope.move(kept, s);
  }
}
