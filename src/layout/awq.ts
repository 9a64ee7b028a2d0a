import { bug } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';
import { cast, pack, unpack, type PackOptions } from '../tensor/ops.js';
import type { Scope } from '../tensor/tensor.js';
import { findParts, keyError, PartReader } from './check.js';
import type { LayoutReader, LayoutWriter, QuantizedLinear, Scheme, StoredLinear } from './types.js';

/**
 * AWQ as its "gemm" kernels store it (Lin et al. 2024), 4 bits: X.qweight i32 [K, N/8] and X.qzeros i32 [G, N/8], both
 * packed along N in the order 0 2 4 6 1 3 5 7; X.scales f16 [G, N]; w = (u - z) s with unsigned u.
 */
const half = 8;
const packing: PackOptions = { bits: 4, bias: half, axis: 1, order: 'awq' };

/** Reads `quantization_config` of quant_method "awq". */
export function awqReader(config: Readonly<Record<string, unknown>>, where: string): LayoutReader {
  const at = `${where}: quantization_config`;
  const bits = config.bits ?? config.w_bit;
  const size = config.group_size ?? config.q_group_size;
  if (bits !== 4) throw keyError(at, 'bits', bits, '4');
  if (!Number.isSafeInteger(size) || (size !== -1 && (size as number) < 1)) {
    throw keyError(at, 'group_size', size, 'a positive integer, or -1 for whole rows');
  }
  const version = config.version ?? 'gemm';
  if (typeof version !== 'string' || version.toLowerCase() !== 'gemm') {
    throw keyError(at, 'version', version, 'gemm', 'Convert it with AutoAWQ to version gemm first.');
  }
  const group = size === -1 ? 0 : (size as number);
  return {
    name: 'awq',
    description: `AWQ (gemm), 4 bits, ${group === 0 ? 'one scale a row' : `groups of ${group}`}, asymmetric`,
    notes: [],
    linears: (tensors) => storedLinears(tensors, group),
  };
}

function storedLinears(tensors: ReadonlyMap<string, TensorEntry>, group: number): Map<string, StoredLinear> {
  const linears = new Map<string, StoredLinear>();
  for (const [name, parts] of findParts(tensors, 'qweight', () => ['qzeros', 'scales'], [])) {
    const [k, words] = parts.get('qweight')!.shape as [number, number];
    linears.set(`${name}.weight`, {
      name: `${name}.weight`,
      shape: [words * 8, k],
      parts,
      bits: 4,
      scheme: { bits: 4, group, symmetric: false },
      read: (scope, load, rows, columns) => readLinear(scope, new PartReader(name, parts, load), group, rows, columns),
    });
  }
  return linears;
}

async function readLinear(s: Scope, part: PartReader, group: number, n: number, k: number): Promise<QuantizedLinear> {
  const g = group === 0 ? 1 : Math.ceil(k / group);
  const words = await part.get('qweight', 'i32', [k, Math.ceil(n / 8)]);
  const codes = cast(s, unpack(s, words, k, n, packing).transpose(), 'i8');
  const points = await part.get('qzeros', 'i32', [g, Math.ceil(n / 8)]);
  const zero = cast(s, unpack(s, points, g, n, packing).transpose(), 'f32');
  const scale = cast(s, (await part.get('scales', undefined, [g, n])).transpose(), 'f32');
  return { codes, grid: { scale, zero, low: -half, high: half - 1, group: group === 0 ? k : group } };
}

const groupsOf = (k: number, { group }: Scheme): number => (group === 0 ? 1 : Math.ceil(k / group));

export const awqWriter: LayoutWriter = {
  name: 'awq',
  signedScales: true,
  refuse({ name, inFeatures: k, outFeatures: n }, { bits, group, order }) {
    if (bits !== 4) return `${name}: AWQ stores 4 bits, not ${bits}.`;
    if (order === 'group') return `${name}: AWQ has no column order.`;
    if (group !== 0 && k % group !== 0) return `${name}: K (${k}) must be a multiple of the group (${group}).`;
    if (n % 8 !== 0) return `${name}: N (${n}) must be a multiple of 8.`;
    return undefined;
  },
  plan({ name, inFeatures: k, outFeatures: n }, scheme) {
    const g = groupsOf(k, scheme);
    return [
      { name: `${name}.qweight`, shape: [k, n / 8], dtype: 'i32' },
      { name: `${name}.qzeros`, shape: [g, n / 8], dtype: 'i32' },
      { name: `${name}.scales`, shape: [g, n], dtype: 'f16' },
    ];
  },
  store(s, { name, inFeatures: k, outFeatures: n }, scheme, { codes, grid }) {
    const points = grid.zero ? cast(s, grid.zero.transpose(), 'i8') : s.zeros('i8', [groupsOf(k, scheme), n]);
    return [
      { name: `${name}.qweight`, tensor: pack(s, cast(s, codes.transpose(), 'i8'), packing) },
      { name: `${name}.qzeros`, tensor: pack(s, points, packing) },
      { name: `${name}.scales`, tensor: cast(s, grid.scale.transpose(), 'f16') },
    ];
  },
  config({ groups, ignore }) {
    const scheme = groups[0]!.scheme;
    if (groups.length > 1) throw bug('AWQ with several schemes');
    return {
      bits: 4,
      group_size: scheme.group === 0 ? -1 : scheme.group,
      modules_to_not_convert: [...ignore],
      quant_method: 'awq',
      version: 'gemm',
      // Zero points are always stored; a symmetric scheme has them in the middle.
      zero_point: true,
    };
  },
};
