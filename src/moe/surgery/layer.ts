import type { MoeLayerSpec } from '../../nn/moe.js';
import type { Weights } from '../../nn/calls.js';
import { cast, expertCombine, expertSort, gather, groupedGemm, matmulT, route, swiglu, type ExpertOrder } from '../../tensor/ops.js'; // prettier-ignore
import { Scope, type Tensor } from '../../tensor/tensor.js';

/** The routed part of one layer, in the stream's precision. */
export interface RoutedWeights {
  /** [E, C] */
  readonly router: Tensor;
  /** f32 [E] */
  readonly bias: Tensor | undefined;
  /** [E, w, C], [E, w, C], [E, C, w] */
  readonly gate: Tensor;
  readonly up: Tensor;
  readonly down: Tensor;
}

export const routedWeights = (m: MoeLayerSpec, weights: Weights): RoutedWeights => ({
  router: weights.get(`${m.router.name}.weight`),
  bias: m.routeBias === undefined ? undefined : weights.get(m.routeBias),
  gate: weights.stack(m.experts.map(({ gate }) => gate)),
  up: weights.stack(m.experts.map(({ up }) => up)),
  down: weights.stack(m.experts.map(({ down }) => down)),
});

/** Rows at a time: outputs of K experts for each are held at once. */
const rowsAtOnce = 4096;

/** x [T, C] in parts, in the precision of the weights. */
export async function eachPart(
  x: Tensor,
  { gate }: RoutedWeights,
  visit: (s: Scope, part: Tensor, from: number) => void | Promise<void>,
  rows = rowsAtOnce,
): Promise<void> {
  for (let from = 0; from < x.dim(0); from += rows) {
    using s = new Scope(x.device);
    await visit(s, cast(s, x.slice(0, from, Math.min(from + rows, x.dim(0))), gate.dtype), from);
    await x.device.sync();
  }
}

export interface Choice {
  /** f32 [T, K], i32 [T, K] */
  readonly w: Tensor;
  readonly idx: Tensor;
  readonly order: ExpertOrder;
}

/** Which experts the rows of x [T, C] go to. */
export function chooseExperts(s: Scope, m: MoeLayerSpec, { router, bias }: RoutedWeights, x: Tensor): Choice {
  const logits = matmulT(s, x, router, { dtype: 'f32' });
  const { w, idx } = route(s, logits, { ...m.route, ...(bias && { bias }) });
  return { w, idx, order: expertSort(s, idx, router.dim(0)) };
}

/** Outputs of the chosen experts, [T K, C], sorted by expert. */
export function expertOutputs(s: Scope, m: MoeLayerSpec, w: RoutedWeights, x: Tensor, order: ExpertOrder): Tensor {
  const rows = gather(s, x, order.tokens);
  const gate = groupedGemm(s, rows, w.gate, order.offsets);
  const up = groupedGemm(s, rows, w.up, order.offsets);
  const { activation, limit } = m.experts[0]!;
  const h = swiglu(s, gate, up, activation, limit);
  const y = groupedGemm(s, h, w.down, order.offsets);
  s.free(rows, gate, up, h);
  return y;
}

/** Output of the routed experts for x [T, C], without shared ones. */
export function routedOutput(s: Scope, m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Tensor {
  using work = new Scope(s.device);
  const choice = chooseExperts(work, m, w, x);
  return expertCombine(s, expertOutputs(work, m, w, x, choice.order), choice.order.place, choice.w);
}

/** Values of all experts' outputs held at once. */
const outputsAtOnce = 64e6;

/** Rows whose outputs of all experts fit. */
export const rowsFor = (experts: number, channels: number): number =>
  Math.max(1, Math.floor(outputsAtOnce / (experts * channels)));

/** Every expert on every row of x [T, C]: f32 [E, T, C]. */
export function allOutputs(s: Scope, m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Tensor {
  const experts = m.experts.length;
  const { activation, limit } = m.experts[0]!;
  const outputs = s.empty('f32', [experts, ...x.shape]);
  for (let e = 0; e < experts; e++) {
    using work = new Scope(s.device);
    const h = swiglu(work, matmulT(work, x, w.gate.at(e)), matmulT(work, x, w.up.at(e)), activation, limit);
    matmulT(work, h, w.down.at(e), { out: outputs.at(e) });
  }
  return outputs;
}
