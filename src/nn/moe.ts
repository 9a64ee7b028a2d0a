import { add, binary, cast, expertCombine, expertSort, gather, gemm, matmulT, swiglu, unary, type RouteOptions } from '../tensor/ops.js'; // prettier-ignore
import type { Tensor } from '../tensor/tensor.js';
import { bug } from '../base/errors.js';
import { choose, experts, linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
import { drop, linearTensors, type Layer } from './layer.js';
import { gatedMlp, type FfnSpec } from './mlp.js';

/** A mixture of gated feed-forward experts (Shazeer et al. 2017; shared experts: Dai et al. 2024). */
export interface MoeLayerSpec {
  readonly layer: number;
  /** [experts, C]. */
  readonly router: LinearSpec;
  readonly route: Omit<RouteOptions, 'bias'>;
  /** Tensor name of the selection bias f32 [experts]. */
  readonly routeBias?: string | undefined;
  /** A table [vocab, active] that names the experts of each token: they are looked up, only weighted by the router. */
  readonly byToken?: { readonly name: string; readonly vocab: number } | undefined;
  readonly experts: readonly FfnSpec[];
  /** Shared experts, stored as one network. */
  readonly shared?: FfnSpec | undefined;
  /** How many experts `shared` stands for. */
  readonly sharedCount?: number | undefined;
  /** [1, C]: the shared network's output is multiplied by sigmoid of this. */
  readonly sharedGate?: LinearSpec | undefined;
}

export interface MoeSpec {
  /** Everything that decides the layer's function. */
  readonly layer: MoeLayerSpec;
  readonly experts: number;
  readonly active: number;
  readonly shared: number;
  readonly width: number;
  readonly router: LinearSpec;
  readonly expertLinears: readonly FfnSpec[];
}

/** How the routed experts' outputs are made and added up: x [T, C], base the shared ones' output. */
type Mix = (m: MoeLayerSpec, x: Tensor, routed: Routed, base: Tensor | undefined, ctx: ForwardContext) => Calls<Tensor>;

/** logits [T, E], and of what was chosen: w f32 [T, K], idx i32 [T, K]. */
interface Routed {
  readonly logits: Tensor;
  readonly w: Tensor;
  readonly idx: Tensor;
}

export function moeLayer(m: MoeLayerSpec, mix: Mix = sparse): Layer & { readonly moe: MoeSpec } {
  const shared = m.shared && gatedMlp(m.shared);
  const gate = m.sharedGate ? [m.sharedGate] : [];
  return {
    moe: {
      layer: m,
      experts: m.experts.length,
      active: m.route.topK,
      shared: m.shared ? (m.sharedCount ?? 1) : 0,
      width: m.experts[0]!.gate.outFeatures,
      router: m.router,
      expertLinears: m.experts,
    },
    // Made when asked for: of 256 experts in 58 layers there are 45,000.
    get tensors() {
      const routed: LinearSpec[] = [];
      for (const e of m.experts) routed.push(e.gate, e.up, e.down);
      return [
        ...linearTensors([m.router, ...gate]),
        ...(m.routeBias ? [{ name: m.routeBias, shape: [m.experts.length], f32: true }] : []),
        ...(m.byToken
          ? [{ name: m.byToken.name, shape: [m.byToken.vocab, m.route.topK], below: m.experts.length }]
          : []),
        ...linearTensors(routed),
        ...(shared?.tensors ?? []),
      ];
    },
    linears: [
      [m.router],
      ...(shared?.linears ?? []),
      ...(m.sharedGate ? [[m.sharedGate]] : []),
      ...m.experts.map((e) => [e.gate, e.up]),
      ...m.experts.map((e) => [e.down]),
    ],
    forward: (x, ctx) => forward(m, shared, mix, x, ctx),
  };
}

function* forward(m: MoeLayerSpec, shared: Layer | undefined, mix: Mix, x: Tensor, ctx: ForwardContext): Calls<Tensor> {
  const { scope, weights } = ctx;
  const [logits] = yield* linear([m.router], x);
  const options = {
    ...m.route,
    ...(m.routeBias && { bias: weights.get(m.routeBias) }),
    ...(m.byToken && { chosen: lookUp(weights.table(m.byToken.name), m.route.topK, ctx) }),
  };
  const { w, idx } = yield* choose({ layer: m.layer, logits: logits!, options });

  let base: Tensor | undefined;
  if (shared) base = yield* shared.forward(x, ctx);
  if (base && m.sharedGate) {
    const [g] = yield* linear([m.sharedGate], x);
    unary(scope, 'sigmoid', g!, 0, 0, g);
    binary(scope, 'mul', base, g!, { out: base });
    drop(scope, [g]);
  }
  const out = yield* mix(m, x, { logits: logits!, w, idx }, base, ctx);
  drop(scope, [base, logits, w, idx]);
  return out;
}

/** Every expert computes the tokens that chose it. */
function* sparse(
  m: MoeLayerSpec,
  x: Tensor,
  { w, idx }: Routed,
  base: Tensor | undefined,
  { scope }: ForwardContext,
): Calls<Tensor> {
  const order = expertSort(scope, idx, m.experts.length);
  const rows = gather(scope, x, order.tokens);
  const both = { layer: m.layer, order };
  const [gate, up] = yield* experts({
    ...both,
    x: rows,
    linears: [m.experts.map((e) => e.gate), m.experts.map((e) => e.up)],
  });
  drop(scope, [rows]);
  const h = swiglu(scope, gate!, up!, m.experts[0]!.activation, m.experts[0]!.limit);
  drop(scope, [gate, up]);
  const [y] = yield* experts({ ...both, x: h, linears: [m.experts.map((e) => e.down)] });
  drop(scope, [h]);
  const out = expertCombine(scope, y!, order.place, w, base);
  drop(scope, [y, order.slots, order.offsets, order.place, order.tokens]);
  return out;
}

/**
 * Every expert computes every token, and its neurons are multiplied by the weight that it has there, zero where it was not
 * chosen: the sums of `sparse` without sorting rows, which is faster where most experts are on. Wherever the weights
 * [T, E] come to stand, `weigh` may put something else in their place.
 */
export const whole = (weigh: (weights: Tensor, logits: Tensor, ctx: ForwardContext) => Tensor): Mix =>
  function* (m, x, { logits, w, idx }, base, ctx) {
    const { scope } = ctx;
    const [tokens, count] = [x.dim(0), m.experts.length];
    const identity = new Float32Array(count * count);
    for (let e = 0; e < count; e++) identity[e * (count + 1)] = 1;
    const rows = scope.from('f32', [count, count], identity);
    const weights = weigh(expertCombine(scope, rows, idx, w), logits, ctx);
    const weightsOf = (part: 'gate' | 'up') => {
      const all = ctx.weights.stack(m.experts.map((e) => e[part]));
      return all.view(-1, all.dim(2));
    };
    const gate = matmulT(scope, x, weightsOf('gate'));
    const up = matmulT(scope, x, weightsOf('up'));
    const h = swiglu(scope, gate, up, m.experts[0]!.activation, m.experts[0]!.limit);
    drop(scope, [gate, up]);
    const each = h.view(tokens, count, -1);
    const on = binary(scope, 'mul', each, weights.view(tokens, count, 1));
    // [E, C, N] as one matrix [E N, C].
    const down = cast(scope, ctx.weights.stack(m.experts.map((e) => e.down)).transpose(), x.dtype);
    const y = gemm(scope, on.view(tokens, -1), down.view(-1, down.dim(2)));
    drop(scope, [h, on, down, rows, weights]);
    return base ? add(scope, y, base, y) : y;
  };

/** The rows of a table [vocab, k] for the tokens at hand: [T k]. */
function lookUp(table: Int32Array, k: number, { tokens }: ForwardContext): Int32Array {
  if (!tokens) throw bug('a layer looks tokens up that its context does not have');
  const chosen = new Int32Array(tokens.length * k);
  tokens.forEach((token, t) => chosen.set(table.subarray(token * k, (token + 1) * k), t * k));
  return chosen;
}
