import { attention, groupedGemm, int4Matmul, matmulT, route } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Call, Calls, ForwardContext } from './calls.js';

/** Answers one call with the weights as they are. */
export function answer(call: Call, ctx: ForwardContext): unknown {
  const { scope, weights } = ctx;
  switch (call.kind) {
    case 'linear':
      return call.linears.map((linear): Tensor => {
        const bias = linear.bias ? weights.get(`${linear.name}.bias`) : undefined;
        // Choices and probabilities are made from fp32 scores, whatever the precision of the hidden states.
        const precise = linear.role === 'router' || linear.role === 'head';
        const options = { ...(bias && { bias }), ...(precise && { dtype: 'f32' as const }) };
        const name = `${linear.name}.weight`;
        const packed = weights.packed?.(name);
        return packed ? int4Matmul(scope, call.x, packed, options) : matmulT(scope, call.x, weights.get(name), options);
      });
    case 'attention':
      return attention(scope, call.q, call.k, call.v, call.options);
    case 'route':
      return route(scope, call.logits, call.options);
    case 'experts':
      return call.linears.map((linears) => groupedGemm(scope, call.x, weights.stack(linears), call.order.offsets));
  }
}

/** Runs a forward pass to its end. `watch` sees every call and may answer it in place of the plain answer. */
export function run<R>(calls: Calls<R>, ctx: ForwardContext, watch?: (call: Call) => unknown): R {
  let step = calls.next();
  while (!step.done) {
    const answered = watch?.(step.value);
    step = calls.next(answered ?? answer(step.value, ctx));
  }
  return step.value;
}
