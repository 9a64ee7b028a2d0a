import { bug } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';
import { cast, pack, unary, unpack, type PackOptions } from '../tensor/ops.js';
import type { Scope } from '../tensor/tensor.js';
import { findParts, keyError, PartReader, record } from './check.js';
import type { LayoutReader, LayoutWriter, QuantizedLinear, Scheme, StoredLinear } from './types.js';

/**
 * GPTQ as AutoGPTQ and GPTQModel store it: X.qweight i32 [K bits / 32, N], packed along K; X.qzeros i32
 * [G, N bits / 32], packed along N; X.scales f16 [G, N]; X.g_idx i32 [K], the group of each column; w = (u - z) s with
 * unsigned u. Checkpoint format "gptq" (v1) stores z - 1, "gptq_v2" stores z.
 */
const packing = (bits: number, axis: 0 | 1, bias: number): PackOptions => ({
  bits: bits as PackOptions['bits'],
  bias,
  axis,
  order: bits === 3 ? 'dense' : 'linear',
});

interface Settings {
  readonly bits: 2 | 3 | 4 | 8;
  /** 0: one group a row. */
  readonly group: number;
  readonly v2: boolean;
  /** Columns may be in any group. */
  readonly ordered: boolean;
}

/** Reads `quantization_config` of quant_method "gptq". */
export function gptqReader(config: Readonly<Record<string, unknown>>, where: string): LayoutReader {
  const at = `${where}: quantization_config`;
  const { bits, group_size: size } = config;
  if (bits !== 2 && bits !== 3 && bits !== 4 && bits !== 8) throw keyError(at, 'bits', bits, '2, 3, 4 or 8');
  if (!Number.isSafeInteger(size) || (size !== -1 && (size as number) < 1)) {
    throw keyError(at, 'group_size', size, 'a positive integer, or -1 for whole rows');
  }
  const format = config.checkpoint_format ?? 'gptq';
  if (format !== 'gptq' && format !== 'gptq_v2') throw keyError(at, 'checkpoint_format', format, 'gptq or gptq_v2');
  if ((config.pack_dtype ?? 'int32') !== 'int32') throw keyError(at, 'pack_dtype', config.pack_dtype, 'int32');
  // `-:pattern` leaves modules alone, which their tensors show; anything else gives them other settings.
  const dynamic = Object.keys(record(config.dynamic ?? {}, at, 'dynamic')).filter((key) => !key.startsWith('-:'));
  if (dynamic.length > 0) {
    throw keyError(at, 'dynamic', dynamic, 'the same settings for all modules');
  }
  if (config.is_marlin_format === true)
    throw keyError(at, 'is_marlin_format', true, 'false', 'Repack it as GPTQ first.');
  const settings: Settings = { bits, group: size === -1 ? 0 : (size as number), v2: format === 'gptq_v2', ordered: config.desc_act === true }; // prettier-ignore
  const groups = settings.group === 0 ? 'one scale a row' : `groups of ${settings.group}`;
  const order = config.desc_act === true ? ', activation order' : '';
  return {
    name: 'gptq',
    description: `GPTQ (${format}), ${bits} bits, ${groups}, ${config.sym === false ? 'asymmetric' : 'symmetric'}${order}`,
    notes: [],
    linears: (tensors) => storedLinears(tensors, settings),
  };
}

function storedLinears(tensors: ReadonlyMap<string, TensorEntry>, settings: Settings): Map<string, StoredLinear> {
  const linears = new Map<string, StoredLinear>();
  for (const [name, parts] of findParts(tensors, 'qweight', () => ['qzeros', 'scales'], ['g_idx'])) {
    const [words, n] = parts.get('qweight')!.shape as [number, number];
    linears.set(`${name}.weight`, {
      name: `${name}.weight`,
      shape: [n, Math.floor((words * 32) / settings.bits)],
      parts,
      bits: settings.bits,
      // Zero points are always stored, symmetric or not.
      scheme: {
        bits: settings.bits,
        group: settings.group,
        symmetric: false,
        ...(settings.ordered && { order: 'group' }),
      },
      read: (scope, load, rows, columns) =>
        readLinear(scope, new PartReader(name, parts, load), settings, rows, columns),
    });
  }
  return linears;
}

async function readLinear(
  s: Scope,
  part: PartReader,
  { bits, group, v2 }: Settings,
  n: number,
  k: number,
): Promise<QuantizedLinear> {
  const half = 2 ** (bits - 1);
  const g = group === 0 ? 1 : Math.ceil(k / group);
  const words = await part.get('qweight', 'i32', [Math.ceil((k * bits) / 32), n]);
  const codes = cast(s, unpack(s, words, k, n, packing(bits, 0, half)).transpose(), 'i8');
  const points = await part.get('qzeros', 'i32', [g, Math.ceil((n * bits) / 32)]);
  const zero = cast(s, unpack(s, points, g, n, packing(bits, 1, half)).transpose(), 'f32');
  if (!v2) unary(s, 'affine', zero, 1, 1, zero);
  const scale = cast(s, (await part.get('scales', undefined, [g, n])).transpose(), 'f32');
  const columnGroup = part.has('g_idx') ? await part.columnGroups('g_idx', k, g) : undefined;
  return { codes, grid: { scale, zero, low: -half, high: half - 1, group: group === 0 ? k : group, columnGroup } };
}

const groupsOf = (k: number, { group }: Scheme): number => (group === 0 ? 1 : Math.ceil(k / group));

export const gptqWriter: LayoutWriter = {
  name: 'gptq',
  signedScales: true,
  refuse({ name, inFeatures: k, outFeatures: n }, { bits, group }) {
    if (group !== 0 && k % group !== 0) return `${name}: K (${k}) must be a multiple of the group (${group}).`;
    if ((k * bits) % 32 !== 0 || (n * bits) % 32 !== 0) {
      return `${name}: K (${k}) and N (${n}) must fill whole 32-bit words at ${bits} bits.`;
    }
    return undefined;
  },
  plan({ name, inFeatures: k, outFeatures: n }, scheme) {
    const g = groupsOf(k, scheme);
    return [
      { name: `${name}.qweight`, shape: [(k * scheme.bits) / 32, n], dtype: 'i32' },
      { name: `${name}.qzeros`, shape: [g, (n * scheme.bits) / 32], dtype: 'i32' },
      { name: `${name}.scales`, shape: [g, n], dtype: 'f16' },
      { name: `${name}.g_idx`, shape: [k], dtype: 'i32' },
    ];
  },
  store(s, { name, inFeatures: k, outFeatures: n }, scheme, { codes, grid }) {
    const { bits, group, order } = scheme;
    if (order === 'group' && !grid.columnGroup) throw bug(`${name}: order "group" without column groups`);
    const half = 2 ** (bits - 1);
    const g = groupsOf(k, scheme);
    const words = pack(s, cast(s, codes.transpose(), 'i8'), packing(bits, 0, half));
    const points = grid.zero ? cast(s, grid.zero.transpose(), 'i8') : s.zeros('i8', [g, n]);
    // v1 (symmetric) stores z - 1: one less before the fields are made.
    const zeros = pack(s, points, packing(bits, 1, scheme.symmetric ? half - 1 : half));
    const own = Int32Array.from({ length: k }, (_, j) => (group === 0 ? 0 : Math.floor(j / group)));
    return [
      { name: `${name}.qweight`, tensor: words },
      { name: `${name}.qzeros`, tensor: zeros },
      { name: `${name}.scales`, tensor: cast(s, grid.scale.transpose(), 'f16') },
      { name: `${name}.g_idx`, tensor: order === 'group' ? grid.columnGroup! : s.from('i32', [k], own) },
    ];
  },
  config({ groups, ignore }) {
    const scheme = groups[0]!.scheme;
    if (groups.length > 1) throw bug('GPTQ with several schemes');
    return {
      bits: scheme.bits,
      checkpoint_format: scheme.symmetric ? 'gptq' : 'gptq_v2',
      desc_act: scheme.order === 'group',
      // GPTQModel's readers leave a module alone whose pattern stands here with a minus.
      dynamic: Object.fromEntries(skipped(ignore)),
      group_size: scheme.group === 0 ? -1 : scheme.group,
      lm_head: false,
      meta: {},
      pack_dtype: 'int32',
      quant_method: 'gptq',
      sym: scheme.symmetric,
    };
  },
};

const skipped = (ignore: readonly string[]): [string, Record<string, never>][] =>
  ignore.filter((name) => name !== 'lm_head').map((name) => [`-:^${name.replaceAll('.', '\\.')}$`, {}]);
