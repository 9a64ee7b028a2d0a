import type { PlannedTensor, TensorEntry } from '../checkpoint/types.js';
import type { RowPlace } from '../layout/matmulnbits-writer.js';
import type { Scheme } from '../layout/types.js';

/** Where the bytes of one output tensor come from. */
export type Origin =
  /** As they lie in the source. */
  | { readonly kind: 'copy'; readonly entry: TensorEntry }
  /** Read as values (decoded, unfused, padded with zeros) and written in the planned precision; [K, N] if transposed. */
  | { readonly kind: 'values'; readonly name: string; readonly transposed?: boolean }
  /** The values of several tensors, one below the other; [K, N] if transposed. */
  | { readonly kind: 'joined'; readonly names: readonly string[]; readonly transposed?: boolean }
  /** Made when the linear is quantized. */
  | { readonly kind: 'linear'; readonly name: string }
  /** The same of a tensor that the codes of several linears share. */
  | { readonly kind: 'rows'; readonly rows: SharedRows }
  /** Follows from the config; written in the planned precision. */
  | { readonly kind: 'computed'; readonly values: () => Float32Array };

/** Several linears of one scheme whose codes are MatMulNBits tensors [N, ...] together. */
export interface SharedRows {
  /** The tensors are called X.weight_nbits, X.weight_scales, X.weight_zero_points. */
  readonly module: string;
  readonly scheme: Scheme;
  /** Columns of a block. */
  readonly block: number;
  readonly parts: readonly RowPlace[];
}

export interface OutputTensor {
  readonly planned: PlannedTensor;
  readonly origin: Origin;
}
