import { add } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import type { ForwardContext } from './calls.js';
import { drop, type TensorSpec } from './layer.js';

/** How a layer's input is taken from the state of a block, and how its output goes back. */
export interface Residual {
  readonly tensors: readonly TensorSpec[];
  /** State [B S, W] -> what goes into the layer [B S, C], and how its output [B S, C] makes the next state. */
  enter(state: Tensor, ctx: ForwardContext): { x: Tensor; leave: (y: Tensor) => Tensor };
}

/** The ordinary one: the state is the hidden state, outputs are added to it. */
export const plainResidual: Residual = {
  tensors: [],
  enter: (state, { scope }) => ({
    x: state,
    leave: (y) => {
      const next = add(scope, state, y);
      drop(scope, [y]);
      return next;
    },
  }),
};
