import { swiglu } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import { linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
import { drop, linearTensors, type Layer } from './layer.js';

/** Gated feed-forward network (Shazeer 2020): down(act(gate(x)) up(x)). */
export interface FfnSpec {
  readonly gate: LinearSpec;
  readonly up: LinearSpec;
  readonly down: LinearSpec;
  readonly activation: 'silu' | 'gelu' | 'gelu_tanh';
  /** gate is cut off above this, up at both sides. */
  readonly limit?: number | undefined;
}

export function gatedMlp(ffn: FfnSpec): Layer & { readonly ffn: FfnSpec } {
  return {
    ffn,
    tensors: linearTensors([ffn.gate, ffn.up, ffn.down]),
    linears: [[ffn.gate, ffn.up], [ffn.down]],
    forward: (x, ctx, used) => forward(ffn, x, ctx, used),
  };
}

function* forward(ffn: FfnSpec, x: Tensor, ctx: ForwardContext, used?: () => void): Calls<Tensor> {
  const [gate, up] = yield* linear([ffn.gate, ffn.up], x);
  used?.();
  const h = swiglu(ctx.scope, gate!, up!, ffn.activation, ffn.limit);
  drop(ctx.scope, [gate, up]);
  const [y] = yield* linear([ffn.down], h);
  drop(ctx.scope, [h]);
  return y!;
}
