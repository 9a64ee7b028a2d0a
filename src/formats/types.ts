import type { FileSpan } from '../base/bytes.js';
import type { DType } from '../base/dtype.js';
import type { Places } from '../base/scanner.js';

/** Block formats of GGML/GGUF. Bytes and values per block: ggml.ts. */
export type GgmlType =
  | 'q4_0' | 'q4_1' | 'q5_0' | 'q5_1' | 'q8_0'
  | 'q2_k' | 'q3_k' | 'q4_k' | 'q5_k' | 'q6_k'
  | 'iq4_nl' | 'mxfp4'; // prettier-ignore

/** How a tensor's values are stored. Decoding happens in native code (op `decode`). */
export type Encoding =
  | { readonly kind: 'plain'; readonly dtype: DType }
  | { readonly kind: 'ggml'; readonly type: GgmlType }
  /** FP8 E4M3, or two FP4 E2M1 a byte (low nibble first), times one scale per block of rows x columns. */
  | {
      readonly kind: 'scaled';
      readonly element: 'f8_e4m3' | 'f4_e2m1';
      readonly block: readonly [rows: number, columns: number];
      readonly scale: TensorEntry;
      readonly scaleElement: 'f32' | 'f8_e8m0' | 'bf16';
    }
  /** Put together from other tensors; the parts joined along `axis`, then read under the tensor's own shape. */
  | { readonly kind: 'assembled'; readonly axis: number; readonly parts: readonly AssembledPart[] }
  /** Linears in a row, the first applied first, as one: its matrix W2 W1, or its bias W2 b1 + b2. */
  | { readonly kind: 'product'; readonly part: 'weight' | 'bias'; readonly factors: readonly LinearFactor[] }
  /** Another tensor with rotations folded into it, computed in fp32. */
  | { readonly kind: 'rotated'; readonly of: TensorEntry; readonly turns: readonly Turn[] }
  /** Carried through as bytes; never computed with (C64, F8_E8M0 without a partner ...). */
  | { readonly kind: 'opaque'; readonly name: string; readonly bits: number };

export interface LinearFactor {
  readonly weight: TensorEntry;
  readonly bias?: TensorEntry | undefined;
}

/** An orthogonal matrix Q = D B: D random signs, B blocks of an orthonormal Hadamard matrix of `order` (see arch/hadamard). */
export interface Rotation {
  readonly size: number;
  /** Divides `size`. */
  readonly order: number;
  readonly seed: number;
  /** Tells apart the signs of rotations of one seed. */
  readonly stream: number;
}

/** What rotating hidden states makes of a tensor. */
export type Turn =
  /** The matrix W [N, K] of a linear whose inputs come rotated, Q repeated along K: W diag(gain) (I x Q). */
  | { readonly side: 'inputs'; readonly rotation: Rotation; readonly gain?: TensorEntry }
  /** W or bias [N] of a linear whose outputs are to be rotated: of each `width` rows those from `from` on become Q' W. */
  | { readonly side: 'outputs'; readonly rotation: Rotation; readonly width: number; readonly from: number }
  /** A norm whose weights are the gain of the linears behind it now: ones. */
  | { readonly side: 'norm' };

/**
 * How one stored tensor contributes to another: its decoded values as an array of shape `view` (rank <= 4), cut along
 * one axis, then transposed by `axes` as numpy does. Rows of rotary heads in another order, transposed weights, shards
 * of one matrix: all are this.
 */
export interface Arrangement {
  readonly view: readonly number[];
  readonly cut?: { readonly axis: number; readonly from: number; readonly to: number };
  readonly axes: readonly number[];
}

export interface AssembledPart extends Arrangement {
  readonly entry: TensorEntry;
}

export interface TensorEntry {
  readonly name: string;
  /** Logical shape: what the decoded tensor has. */
  readonly shape: readonly number[];
  readonly encoding: Encoding;
  /** Raw bytes on disk, in row-major order unless `strides` says otherwise; of an assembled tensor the first part's. */
  readonly span: FileSpan;
  /** In elements; only where the file stores a view that is not contiguous (PyTorch). */
  readonly strides?: readonly number[];
}

/** Names as they stand in a file, without strings made of them. */
export interface NamesInFile {
  readonly bytes: Buffer;
  readonly places: Places;
}

/** What a format's parser gives: headers understood, no weight read. */
export interface ParsedFile {
  readonly tensors: readonly TensorEntry[];
  /** Where the names of `tensors` stand, for one that the scanner has read. */
  readonly names?: NamesInFile;
  /** What was ignored or assumed, one sentence each. */
  readonly notes: readonly string[];
  /** SHA-256 (hex) of the header bytes and the file's size. */
  readonly headerHash: string;
}
