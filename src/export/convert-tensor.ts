import { badInput } from '../base/errors.js';
import { dtypeSize, elementCount, type DType, type FloatDType } from '../base/dtype.js';
import type { PlannedTensor, TensorEntry } from '../checkpoint/types.js';
import { elementType } from '../formats/assembly.js';
import { encodedBytes, encodingName } from '../formats/ggml.js';
import type { Importance } from '../targets/imatrix.js';
import type { SharedRows } from '../targets/types.js';

/** What an adapter does to one weight. */
export type Merge =
  /** W + scale B A (Hu et al. 2022): names of A [r, K] and B [N, r] among `StoredWeight`s. */
  | { readonly kind: 'add'; readonly a: string; readonly b: string; readonly scale: number }
  /** The adapter brings the weight itself (modules_to_save, trained biases). */
  | { readonly kind: 'replace'; readonly by: string };

/** What happens to one tensor. */
export interface PlannedConversion {
  readonly name: string;
  readonly shape: readonly number[];
  /** `copy`: the bytes as they are; `cast`: element by element; `decode`: from blocks, codes or a view; `encode`: to blocks; `repack`: codes as they are, otherwise arranged. */
  readonly action: 'copy' | 'cast' | 'decode' | 'encode' | 'repack';
  readonly from: string;
  readonly to: string;
  /** Bytes read and written. */
  readonly reads: number;
  readonly writes: number;
  readonly entry: TensorEntry;
  readonly output: PlannedTensor;
  /** `encode`: what each column counts for when scales are searched. */
  readonly importance?: Importance;
  /** `decode`: what an adapter adds. */
  readonly merge?: Merge;
  /** Written as [K, N]. */
  readonly transposed?: boolean;
  /** Codes that go into another layout: of one linear, or of several. */
  readonly repack?: SharedRows;
}

const floats: ReadonlySet<DType> = new Set(['f32', 'bf16', 'f16', 'f64', 'f8_e4m3', 'f8_e5m2']);

/** Small tensors whose fp32 decides something: rounding the router's selection biases changes which experts are used. */
const keepsPrecision = /\.e_score_correction_bias$/;

/** One tensor in `dtype`; undefined: as it is, blocks as bf16. */
export function planTensor(entry: TensorEntry, dtype: FloatDType | undefined): PlannedConversion {
  const { name, shape, encoding, span, strides } = entry;
  const from = encodingName(encoding);
  const fixed = dtype === undefined || keepsPrecision.test(name);
  const plan = (action: PlannedConversion['action'], to: DType): PlannedConversion => {
    const writes = elementCount(shape) * dtypeSize(to);
    return { name, shape, action, from, to, reads: span.bytes, writes, entry, output: { name, shape, dtype: to } };
  };
  switch (encoding.kind) {
    case 'plain': {
      const to = floats.has(encoding.dtype) && !fixed ? dtype : encoding.dtype;
      if (strides) return plan('decode', to);
      return plan(to === encoding.dtype ? 'copy' : 'cast', to);
    }
    case 'ggml':
    case 'scaled':
      return plan('decode', dtype ?? 'bf16');
    case 'product':
    case 'rotated':
    case 'assembled': {
      const own = elementType(entry) ?? 'bf16';
      return plan('decode', floats.has(own) && !fixed ? dtype : own);
    }
    case 'opaque': {
      if (strides) {
        throw badInput('A tensor is a view of elements that cannot be computed with', {
          where: `${span.path}, tensor ${name}`,
          got: from,
        });
      }
      const output = { name, shape, dtype: 'u8' as const, encoding };
      const writes = encodedBytes(shape, encoding);
      return { name, shape, action: 'copy', from, to: from, reads: span.bytes, writes, entry, output };
    }
  }
}
