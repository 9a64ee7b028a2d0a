import { dtypeSize } from '../base/dtype.js';
import type { DType } from '../base/dtype.js';
import type { Encoding, GgmlType } from './types.js';

export interface GgmlBlock {
  /** The type's number in GGUF files. */
  readonly id: number;
  /** Values per block, along a row. */
  readonly values: number;
  readonly bytes: number;
}

/** Block formats that are read by dequantization (ggml-common.h). */
export const ggmlBlocks: Readonly<Record<GgmlType, GgmlBlock>> = {
  q4_0: { id: 2, values: 32, bytes: 18 },
  q4_1: { id: 3, values: 32, bytes: 20 },
  q5_0: { id: 6, values: 32, bytes: 22 },
  q5_1: { id: 7, values: 32, bytes: 24 },
  q8_0: { id: 8, values: 32, bytes: 34 },
  q2_k: { id: 10, values: 256, bytes: 84 },
  q3_k: { id: 11, values: 256, bytes: 110 },
  q4_k: { id: 12, values: 256, bytes: 144 },
  q5_k: { id: 13, values: 256, bytes: 176 },
  q6_k: { id: 14, values: 256, bytes: 210 },
  iq4_nl: { id: 20, values: 32, bytes: 18 },
  mxfp4: { id: 39, values: 32, bytes: 17 },
};

/** Plain element types of GGUF. */
export const ggmlPlain: readonly (readonly [id: number, dtype: DType])[] = [
  [0, 'f32'],
  [1, 'f16'],
  [24, 'i8'],
  [25, 'i16'],
  [26, 'i32'],
  [27, 'i64'],
  [28, 'f64'],
  [30, 'bf16'],
];

/** Types that exist but that nobody here decodes: their names, for the refusal. */
export const ggmlOthers: ReadonlyMap<number, string> = new Map([
  [9, 'Q8_1'],
  [15, 'Q8_K'],
  [16, 'IQ2_XXS'],
  [17, 'IQ2_XS'],
  [18, 'IQ3_XXS'],
  [19, 'IQ1_S'],
  [21, 'IQ3_S'],
  [22, 'IQ2_S'],
  [23, 'IQ4_XS'],
  [29, 'IQ1_M'],
  [34, 'TQ1_0'],
  [35, 'TQ2_0'],
  [40, 'NVFP4'],
]);

/**
 * Bytes that a tensor takes in its encoding; NaN where the shape does not fit it (a row that is no whole number of
 * blocks, sub-byte elements that end inside a byte). The scale of a scaled tensor is not counted; an assembled tensor
 * or a product counts what is read of its parts.
 */
export function encodedBytes(shape: readonly number[], encoding: Encoding): number {
  const count = shape.reduce((n, d) => n * d, 1);
  switch (encoding.kind) {
    case 'plain':
      return count * dtypeSize(encoding.dtype);
    case 'opaque':
      return (count * encoding.bits) % 8 === 0 ? (count * encoding.bits) / 8 : NaN;
    case 'scaled':
      return encoding.element === 'f8_e4m3' ? count : count % 2 === 0 ? count / 2 : NaN;
    case 'assembled':
      return encoding.parts.reduce((sum, { entry }) => sum + entry.span.bytes, 0);
    case 'rotated':
      return encoding.of.span.bytes;
    case 'product':
      return encoding.factors.reduce((sum, { weight, bias }) => sum + weight.span.bytes + (bias?.span.bytes ?? 0), 0);
    case 'ggml': {
      const { values, bytes } = ggmlBlocks[encoding.type];
      return (shape.at(-1) ?? 1) % values === 0 ? (count / values) * bytes : NaN;
    }
  }
}

/** `bf16`, `q4_k`, `f8_e4m3 x f32 [128, 128]`: for listings and errors. */
export function encodingName(encoding: Encoding): string {
  switch (encoding.kind) {
    case 'plain':
      return encoding.dtype;
    case 'ggml':
      return encoding.type;
    case 'opaque':
      return encoding.name;
    case 'assembled':
      return encodingName(encoding.parts[0]!.entry.encoding);
    case 'rotated':
      return encodingName(encoding.of.encoding);
    case 'product':
      return encodingName(encoding.factors[0]!.weight.encoding);
    case 'scaled':
      return `${encoding.element} x ${encoding.scaleElement} [${encoding.block.join(', ')}]`;
  }
}
