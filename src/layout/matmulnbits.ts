import { dtypeSize } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';
import { cast, copyInto, unpack, type PackOptions } from '../tensor/ops.js';
import { Tensor, type Scope } from '../tensor/tensor.js';
import { keyError, PartReader, record, storedDType } from './check.js';
import type { LayoutReader, QuantizedLinear, Scheme, StoredLinear } from './types.js';

interface Linear {
  readonly bits: 2 | 4 | 8;
  readonly blockSize: number;
  readonly inFeatures: number;
  readonly outFeatures: number;
  /** Its rows among those of the stored tensors, where several linears take turns. */
  readonly rows?: { readonly first: number; readonly step: number };
}

/**
 * ONNX com.microsoft.MatMulNBits, as checkpoint/onnx-model.ts names its tensors: X.weight_nbits u8
 * [N, K / block, block * bits / 8], low bits first; X.weight_scales [N, K / block]; X.weight_zero_points packed u8 or
 * float [N, K / block], default 2^(bits-1); X.weight_g_idx i32 [K, or padded to blocks]: the block that a column's scale
 * is in, where columns were reordered. w = (code - zero) scale.
 */
export function matMulNBitsReader(config: Readonly<Record<string, unknown>>, where: string): LayoutReader {
  const given = Object.entries(record(config.linears, where, 'linears'));
  const linears = new Map(given.map(([name, value]) => [name, readLinear(value, `${where}: ${name}`)]));
  const [first] = linears.values();
  return {
    name: 'matmulnbits',
    description: first ? `ONNX MatMulNBits, ${first.bits} bits, blocks of ${first.blockSize}` : 'ONNX MatMulNBits',
    notes: [],
    linears: (tensors) => new Map([...linears].map(([name, linear]) => [name, stored(name, linear, tensors, where)])),
  };
}

function readLinear(value: unknown, at: string): Linear {
  const { bits, blockSize, inFeatures, outFeatures, rows } = record(value, at, 'linear');
  const count = (key: string, given: unknown, least = 1): number => {
    if (Number.isSafeInteger(given) && (given as number) >= least && (given as number) < 2 ** 31)
      return given as number;
    throw keyError(at, key, given, `a whole number from ${least} on`);
  };
  if (bits !== 2 && bits !== 4 && bits !== 8) throw keyError(at, 'bits', bits, '2, 4 or 8');
  const size = count('block_size', blockSize);
  if ((size * bits) % 32 !== 0) throw keyError(at, 'block_size', size, 'whole words');
  const linear: Linear = {
    bits,
    blockSize: size,
    inFeatures: count('inFeatures', inFeatures),
    outFeatures: count('outFeatures', outFeatures),
  };
  if (rows === undefined) return linear;
  const turns = record(rows, at, 'rows');
  const step = count('step', turns.step);
  const first = count('first', turns.first, 0);
  if (first >= step) throw keyError(at, 'first', first, `less than ${step}`);
  return { ...linear, rows: { first, step } };
}

function stored(name: string, linear: Linear, tensors: ReadonlyMap<string, TensorEntry>, where: string): StoredLinear {
  const module = name.slice(0, -'.weight'.length);
  const suffixes = ['weight_nbits', 'weight_scales', 'weight_zero_points', 'weight_g_idx'];
  const parts = new Map(
    suffixes.flatMap((suffix) => {
      const entry = tensors.get(`${module}.${suffix}`);
      return entry ? [[suffix, entry] as const] : [];
    }),
  );
  for (const suffix of ['weight_nbits', 'weight_scales']) {
    if (!parts.has(suffix)) throw badInput('A quantized linear is incomplete', { where, expected: `${module}.${suffix}`, got: 'no such tensor' }); // prettier-ignore
  }
  return {
    name,
    shape: [linear.outFeatures, linear.inFeatures],
    parts,
    bits: linear.bits,
    ...schemeOf(linear, parts),
    read: (scope, load, n, k) => read(scope, new PartReader(module, parts, load), linear, n, k),
  };
}

function schemeOf({ bits, blockSize }: Linear, parts: ReadonlyMap<string, TensorEntry>): { scheme?: Scheme } {
  if (bits === 2 || parts.has('weight_g_idx')) return {};
  const points = parts.get('weight_zero_points');
  // Zero points between the codes are of no other layout.
  if (points && storedDType(points) !== 'u8') return {};
  return { scheme: { bits, group: blockSize, symmetric: points === undefined } };
}

async function read(s: Scope, part: PartReader, linear: Linear, n: number, k: number): Promise<QuantizedLinear> {
  const { rows } = linear;
  if (rows === undefined) return await readAll(s, part, linear, n, k);
  const { codes, grid } = await readAll(s, part, linear, n * rows.step, k);
  const own = (x: Tensor): Tensor => {
    const stride = x.strides[0]!;
    const turn = new Tensor(x.storage, x.byteOffset + rows.first * stride * dtypeSize(x.dtype), x.dtype, [n, x.dim(1)], [rows.step * stride, 1]); // prettier-ignore
    const out = s.empty(x.dtype, [n, x.dim(1)]);
    copyInto(out, turn);
    return out;
  };
  return { codes: own(codes), grid: { ...grid, scale: own(grid.scale), zero: grid.zero && own(grid.zero) } };
}

async function readAll(
  s: Scope,
  part: PartReader,
  { bits, blockSize }: Linear,
  n: number,
  k: number,
): Promise<QuantizedLinear> {
  const groups = Math.ceil(k / blockSize);
  const bias = 2 ** (bits - 1);
  const bytes = await part.get('weight_nbits', 'u8', [n, (groups * blockSize * bits) / 8]);
  const words = new Tensor(bytes.storage, bytes.byteOffset, 'i32', [n, bytes.dim(1) / 4], [bytes.dim(1) / 4, 1]);
  const packing: PackOptions = { bits, bias, axis: 1 };
  const padded = unpack(s, words, n, groups * blockSize, packing);
  let codes = padded;
  if (k < groups * blockSize) {
    codes = s.empty('i8', [n, k]);
    copyInto(codes, padded.slice(1, 0, k));
  }
  const scale = cast(s, await part.get('weight_scales', undefined, [n, groups]), 'f32');
  const zero = part.has('weight_zero_points') ? await zeros(s, part, bits, bias, n, groups) : undefined;
  const order = part.parts.get('weight_g_idx');
  const indices = order && (await part.columnGroups('weight_g_idx', order.shape[0]!, groups));
  const columnGroup = indices?.slice(0, 0, k);
  return { codes, grid: { scale, zero, low: -bias, high: bias - 1, group: blockSize, columnGroup } };
}

/** Zero points, less the bias that the codes lost too. Small enough to unpack here: one for each block. */
async function zeros(
  s: Scope,
  part: PartReader,
  bits: 2 | 4 | 8,
  bias: number,
  n: number,
  groups: number,
): Promise<Tensor> {
  const values = new Float32Array(n * groups);
  if (storedDType(part.parts.get('weight_zero_points')!) === 'u8') {
    const [perByte, row] = [8 / bits, Math.ceil((groups * bits) / 8)];
    const packed = await (await part.get('weight_zero_points', 'u8', [n, row])).bytesOut();
    for (let i = 0; i < values.length; i++) {
      const [r, g] = [Math.floor(i / groups), i % groups];
      const byte = packed[r * row + Math.floor(g / perByte)]!;
      values[i] = ((byte >> (bits * (g % perByte))) & (2 ** bits - 1)) - bias;
    }
  } else {
    const points = await cast(s, await part.get('weight_zero_points', undefined, [n, groups]), 'f32').float32();
    for (let i = 0; i < values.length; i++) values[i] = points[i]! - bias;
  }
  return s.from('f32', [n, groups], values);
}
