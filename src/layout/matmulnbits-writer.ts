import { dtypeSize } from '../base/dtype.js';
import { cast, copyInto, pack } from '../tensor/ops.js';
import { Tensor, type Scope } from '../tensor/tensor.js';
import type { LinearShape, QuantizedLinear, Scheme, StoredTensor } from './types.js';

/** Block sizes of MatMulNBits are powers of two in this range. */
const [smallest, largest] = [16, 256];

/** Columns a block: a scheme's group, or a part of it that the operator can say. Undefined: none divides. */
export function nBitsBlock(k: number, { group }: Pick<Scheme, 'group'>): number | undefined {
  for (let block = largest; block >= smallest; block /= 2) {
    if (k % block === 0 && (group === 0 || group % block === 0)) return block;
  }
  return undefined;
}

/**
 * ONNX com.microsoft.MatMulNBits: X.weight_nbits u8 [N, K / block, block bits / 8], low bits first, unsigned;
 * X.weight_scales [N, K / block] in the graph's precision; asymmetric: X.weight_zero_points packed u8
 * [N, ceil(K / block bits / 8)]. Groups larger than the largest block repeat their scale.
 */
export const matMulNBitsWriter = {
  signedScales: true,
  refuse({ name, inFeatures: k }: LinearShape, scheme: Scheme): string | undefined {
    if (scheme.bits !== 4 && scheme.bits !== 8) return `${name}: MatMulNBits stores 4 or 8 bits, not ${scheme.bits}.`;
    if (scheme.order === 'group') return `${name}: MatMulNBits has no column order.`;
    if (nBitsBlock(k, scheme) === undefined) {
      return `${name}: no power of two from ${smallest} to ${largest} divides K (${k}) and its groups.`;
    }
    return undefined;
  },
  /** `block`: columns of a block, where several linears have to agree on it. */
  plan(
    { name, inFeatures: k, outFeatures: n }: LinearShape,
    scheme: Scheme,
    dtype: 'f16' | 'f32',
    block = nBitsBlock(k, scheme)!,
  ) {
    const blocks = k / block;
    const zeros = { name: `${name}.weight_zero_points`, shape: [n, Math.ceil((blocks * scheme.bits) / 8)], dtype: 'u8' as const }; // prettier-ignore
    return [
      { name: `${name}.weight_nbits`, shape: [n, blocks, (block * scheme.bits) / 8], dtype: 'u8' as const },
      { name: `${name}.weight_scales`, shape: [n, blocks], dtype },
      ...(scheme.symmetric ? [] : [zeros]),
    ];
  },
  store(
    s: Scope,
    { name, inFeatures: k }: LinearShape,
    scheme: Scheme,
    { codes, grid }: QuantizedLinear,
    dtype: 'f16' | 'f32',
    block = nBitsBlock(k, scheme)!,
  ): StoredTensor[] {
    const { bits } = scheme;
    const packing = { bits, bias: 2 ** (bits - 1), axis: 1 } as const;
    const each = (x: Tensor): Tensor => repeated(s, x, k / block / x.dim(1));
    const stored = [
      { name: `${name}.weight_nbits`, tensor: bytesOf(pack(s, codes, packing)) },
      { name: `${name}.weight_scales`, tensor: cast(s, each(grid.scale), dtype) },
    ];
    if (grid.zero) {
      const bytes = bytesOf(pack(s, cast(s, each(grid.zero), 'i8'), packing));
      const width = Math.ceil(((k / block) * bits) / 8);
      const points = s.empty('u8', [bytes.dim(0), width]);
      copyInto(points, bytes.slice(1, 0, width));
      stored.push({ name: `${name}.weight_zero_points`, tensor: points });
    }
    return stored;
  },
};

/** Rows of a shared tensor that one linear fills: `at`, `at + step`, ... */
export interface RowPlace {
  readonly linear: LinearShape;
  readonly at: number;
  readonly step: number;
}

/** Copies a linear's tensor [N, ...] to its rows of a contiguous one [rows, ...]. */
export function placeRows(
  into: Tensor,
  rows: number,
  part: Tensor,
  { linear: { outFeatures: n }, at, step }: RowPlace,
): void {
  const width = into.count / rows;
  const size = dtypeSize(into.dtype);
  const own = new Tensor(into.storage, into.byteOffset + at * width * size, into.dtype, [n, width], [step * width, 1]);
  copyInto(own, part.view(n, width));
}

/** i32 words [N, W] as the bytes that they are, [N, 4 W]. */
const bytesOf = (words: Tensor): Tensor => {
  const width = 4 * words.dim(1);
  return new Tensor(words.storage, words.byteOffset, 'u8', [words.dim(0), width], [width, 1]);
};

/** Each column of x [N, G] `times` over. */
function repeated(s: Scope, x: Tensor, times: number): Tensor {
  if (times === 1) return x;
  const [n, g] = [x.dim(0), x.dim(1)];
  const out = s.empty(x.dtype, [n, g, times]);
  const column = new Tensor(x.storage, x.byteOffset, x.dtype, [n, g, 1], [x.strides[0]!, x.strides[1]!, 0]);
  copyInto(out, column.expand(n, g, times));
  return out.view(n, g * times);
}
