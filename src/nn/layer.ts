import type { Scope, Tensor } from '../tensor/tensor.js';
import type { Calls, ForwardContext, LinearSpec } from './calls.js';

/** One tensor that an architecture expects. */
export interface TensorSpec {
  readonly name: string;
  readonly shape: readonly number[];
  /** Missing is fine (tied head, optional bias). */
  readonly optional?: boolean;
  /** Held in fp32 whatever the run's precision (router biases). */
  readonly f32?: boolean;
  /** A table of integers 0 .. below - 1 (see Weights.table), held in fp32 beside that. */
  readonly below?: number;
}

/** A part of a block: attention, or a feed-forward network. */
export interface Layer {
  readonly tensors: readonly TensorSpec[];
  /** In the order in which forward calls them; inner arrays share an input. Experts stand one by one. */
  readonly linears: readonly (readonly LinearSpec[])[];
  /** Attention only: values that the cache of one sequence holds after `tokens` tokens. */
  readonly cached?: (tokens: number) => number;
  /**
   * x [B S, C], already normalised -> [B S, C], without the residual. `used` may be called when x is used up: what is then
   * still to come can be the larger part of the memory.
   */
  forward(x: Tensor, ctx: ForwardContext, used?: () => void): Calls<Tensor>;
}

export function linearSpec(
  name: string,
  inFeatures: number,
  outFeatures: number,
  role: LinearSpec['role'],
  bias = false,
): LinearSpec {
  return bias ? { name, inFeatures, outFeatures, role, bias } : { name, inFeatures, outFeatures, role };
}

/** The tensors of linears: weight [N, K], bias [N]. */
export function linearTensors(linears: readonly LinearSpec[]): TensorSpec[] {
  const tensors: TensorSpec[] = [];
  for (const { name, inFeatures, outFeatures, bias } of linears) {
    tensors.push({ name: `${name}.weight`, shape: [outFeatures, inFeatures] });
    if (bias) tensors.push({ name: `${name}.bias`, shape: [outFeatures] });
  }
  return tensors;
}

/**
 * Frees intermediates of `scope` as soon as they are used up; what belongs to somebody else, or shares its memory with
 * a tensor of `keep`, stays.
 */
export function drop(scope: Scope, tensors: readonly (Tensor | undefined)[], keep: readonly Tensor[] = []): void {
  for (const tensor of tensors) {
    if (tensor && scope.owns(tensor) && !keep.some((k) => k.storage === tensor.storage)) scope.free(tensor);
  }
}
