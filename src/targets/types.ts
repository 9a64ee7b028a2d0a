import type { PlannedTensor, TensorEntry } from '../checkpoint/types.js';

/** Where the bytes of one output tensor come from. */
export type Origin =
  /** As they lie in the source. */
  | { readonly kind: 'copy'; readonly entry: TensorEntry }
  /** Read as values (decoded, unfused, padded with zeros) and written in the planned precision; [K, N] if transposed. */
  | { readonly kind: 'values'; readonly name: string; readonly transposed?: boolean }
  /** Made when the linear is quantized. */
  | { readonly kind: 'linear'; readonly name: string }
  /** Follows from the config; written in the planned precision. */
  | { readonly kind: 'computed'; readonly values: () => Float32Array };

export interface OutputTensor {
  readonly planned: PlannedTensor;
  readonly origin: Origin;
}
