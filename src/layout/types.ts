import type { DType } from '../base/dtype.js';
import type { TensorEntry } from '../formats/types.js';
import type { PlannedTensor } from '../checkpoint/types.js';
import type { Grid } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';

/** Integer codes of a linear and what turns them into weights: w = (code - zero) scale. */
export interface QuantizedLinear {
  /** i8 [N, K]. */
  readonly codes: Tensor;
  readonly grid: Grid;
}

/** Brings a stored tensor to the device as it is on disk, under its own shape. */
export type Load = (entry: TensorEntry, dtype: DType) => Promise<Tensor>;

/** A linear that a checkpoint holds quantized, in place of its `X.weight`. */
export interface StoredLinear {
  /** `X.weight`: the tensor that the architecture asks for. */
  readonly name: string;
  /** As far as the stored shapes tell: K may be rounded up to whole words. */
  readonly shape: readonly [n: number, k: number];
  /** The stored tensors, by the suffix of their names. */
  readonly parts: ReadonlyMap<string, TensorEntry>;
  readonly bits: number;
  /** How it was rounded, where the settings tell: for writing the codes in another layout. */
  readonly scheme?: Scheme;
  /** Codes and grid in `scope` for the shape that the architecture expects. */
  read(scope: Scope, load: Load, n: number, k: number): Promise<QuantizedLinear>;
}

/** A quantized storage layout, as one checkpoint uses it. */
export interface LayoutReader {
  readonly name: LayoutName | 'matmulnbits';
  /** `compressed-tensors pack-quantized, 4 bits, groups of 128, symmetric`. */
  readonly description: string;
  /** What its config asks for beyond the weights and we leave out, one sentence each. */
  readonly notes: readonly string[];
  /** All quantized linears, by `X.weight`. Errors: parts missing, of wrong shape or type. */
  linears(tensors: ReadonlyMap<string, TensorEntry>): Map<string, StoredLinear>;
}

export const layoutNames = ['compressed-tensors', 'gptq', 'awq'] as const;
export type LayoutName = (typeof layoutNames)[number];

/** How a linear's weights are rounded, as far as storage is concerned. */
export interface Scheme {
  readonly bits: 2 | 3 | 4 | 8;
  /** Columns a scale; 0: one scale for a whole row. */
  readonly group: number;
  readonly symmetric: boolean;
  /**
   * Columns were quantized by falling activation energy. `static`: groups are still runs of neighbouring columns;
   * `group`: `columnGroup` says which group each column has.
   */
  readonly order?: 'static' | 'group';
}

export interface LinearShape {
  /** Tensor name without `.weight`. */
  readonly name: string;
  readonly inFeatures: number;
  readonly outFeatures: number;
}

export interface StoredTensor {
  readonly name: string;
  readonly tensor: Tensor;
}

/** Writes quantized linears in one layout. */
export interface LayoutWriter {
  readonly name: LayoutName;
  /** Scales can be negative. */
  readonly signedScales: boolean;
  /** Why the layout cannot hold this linear with this scheme, as a sentence; undefined when it can. */
  refuse(linear: LinearShape, scheme: Scheme): string | undefined;
  /** The tensors that take the place of `X.weight`; `dtype` is the model's. */
  plan(linear: LinearShape, scheme: Scheme, dtype: 'bf16' | 'f16' | 'f32'): PlannedTensor[];
  /** The planned tensors, in `scope`. Codes are signed: -2^(bits-1) .. 2^(bits-1) - 1, as are zero points. */
  store(scope: Scope, linear: LinearShape, scheme: Scheme, values: QuantizedLinear, dtype: 'bf16' | 'f16' | 'f32'): StoredTensor[]; // prettier-ignore
  /** Goes into config.json as quantization_config. */
  config(use: LayoutUse): Record<string, unknown>;
}

export interface LayoutUse {
  /** Which linears have which scheme; the first is the rule, the others are listed as exceptions. */
  readonly groups: readonly { readonly scheme: Scheme; readonly linears: readonly string[] }[];
  /** Linears left in high precision, by module name (`lm_head`). */
  readonly ignore: readonly string[];
}
