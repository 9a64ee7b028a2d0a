import type { LinearShape } from '../layout/types.js';
import { blockFormats, type BlockFormatName } from '../tensor/ops.js';
import { fittingType, type GgufType } from '../targets/gguf-mixture.js';
import type { Bits, Scheme } from './scheme.js';

/** The scheme of a linear of K columns in blocks of `wanted`, or of what fits in its place; undefined: nothing fits. */
export function blockScheme(k: number, wanted: BlockFormatName): Scheme | undefined {
  const type = fittingType(k, wanted);
  if (type === undefined) return undefined;
  const { group, low, high, minima } = blockFormats[type];
  const bits = Math.log2(high + 1 - low);
  return { bits: (bits > 4 ? 8 : Math.ceil(bits)) as Scheme['bits'], group, symmetric: !minima, blocks: type };
}

/** llama.cpp keeps kv_b apart, k_b transposed: rows that were quantized together would be torn apart. */
export const refuseInGguf = ({ name }: LinearShape): string | undefined =>
  name.endsWith('.kv_b_proj') ? 'GGUF stores it in two parts, one of them transposed' : undefined;

/** The type that an override or a measured choice of bits means. */
export const typeOfBits: Readonly<Record<Bits, GgufType>> = { 2: 'q2_k', 3: 'q3_k', 4: 'q4_k', 8: 'q8_0' };
