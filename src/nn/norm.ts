import { rmsnorm } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import type { ForwardContext } from './calls.js';
import type { TensorSpec } from './layer.js';

/** Root-mean-square norm over the last dimension (Zhang & Sennrich 2019). */
export interface NormSpec {
  /** Tensor name without `.weight`. */
  readonly name: string;
  readonly width: number;
  readonly eps: number;
}

export const normTensor = ({ name, width }: NormSpec): TensorSpec => ({ name: `${name}.weight`, shape: [width] });

export const normalise = (norm: NormSpec, x: Tensor, ctx: ForwardContext): Tensor =>
  rmsnorm(ctx.scope, x, ctx.weights.get(`${norm.name}.weight`), norm.eps);
