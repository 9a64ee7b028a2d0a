import { badInput, bug } from '../base/errors.js';
import { matching } from '../base/patterns.js';
import type { TensorEntry } from '../formats/types.js';
import { cast, pack, unpack, type Grid, type PackOptions } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import { findParts, keyError, PartReader, record } from './check.js';
import type { LayoutReader, LayoutWriter, QuantizedLinear, StoredLinear } from './types.js';

/**
 * compressed-tensors "pack-quantized", schema version 0.18: what llm-compressor writes and vLLM and transformers read.
 * X.weight_packed i32 [N, ceil(K/per)], per = floor(32 / bits) codes a word, each + 2^(bits-1); X.weight_scale [N, G];
 * X.weight_shape i64 [N, K]; asymmetric: X.weight_zero_point i32 [ceil(N/per), G] packed along N; actorder "group":
 * X.weight_g_idx i32 [K].
 */
const version = '0.18.1';

interface WeightArgs {
  readonly bits: 2 | 3 | 4 | 8;
  readonly symmetric: boolean;
  readonly strategy: 'group' | 'channel' | 'tensor';
  readonly group: number;
  readonly actorder: string | null;
  readonly targets: readonly string[];
}

const packing = (bits: number, axis: 0 | 1): PackOptions => ({
  bits: bits as PackOptions['bits'],
  bias: 2 ** (bits - 1),
  axis,
});
const perWord = (bits: number): number => Math.floor(32 / bits);
const range = (bits: number): { low: number; high: number } => ({ low: -(2 ** (bits - 1)), high: 2 ** (bits - 1) - 1 });

/** Reads `quantization_config` of quant_method "compressed-tensors". Errors name the key that is not understood. */
export function compressedTensorsReader(config: Readonly<Record<string, unknown>>, where: string): LayoutReader {
  const at = `${where}: quantization_config`;
  const notes: string[] = [];
  const format = config.format;
  if (format !== undefined && format !== 'pack-quantized' && format !== 'mixed-precision') {
    throw keyError(at, 'format', format, 'pack-quantized', 'Read the model before it was compressed instead.');
  }
  for (const key of ['sparsity_config', 'transform_config']) {
    const value = config[key];
    if (value !== undefined && value !== null && Object.keys(record(value, at, key)).length > 0) {
      const dense = key === 'sparsity_config' && (value as { format?: unknown }).format === 'dense';
      if (!dense) throw keyError(at, key, value, 'nothing: weights that are transformed or sparse are not supported');
    }
  }
  if (config.kv_cache_scheme !== undefined && config.kv_cache_scheme !== null) {
    notes.push('The quantization of the key/value cache that the config asks for is left out.');
  }
  const groups = Object.entries(record(config.config_groups, at, 'config_groups')).map(([name, value]) => {
    const group = record(value, at, name);
    if (group.input_activations || group.output_activations) {
      notes.push(`Activations are kept in high precision; the config rounds them too (${name}).`);
    }
    if (group.format !== undefined && group.format !== null && group.format !== 'pack-quantized') {
      throw keyError(`${at}.${name}`, 'format', group.format, 'pack-quantized');
    }
    return weightArgs(group, `${at}.${name}`);
  });
  const first = groups[0];
  if (!first) throw keyError(at, 'config_groups', config.config_groups, 'at least one group');
  const grid = first.strategy === 'group' ? `groups of ${first.group}` : `one scale a ${first.strategy === 'channel' ? 'row' : 'tensor'}`; // prettier-ignore
  const more = groups.length > 1 ? `, ${groups.length} schemes` : '';
  return {
    name: 'compressed-tensors',
    description: `compressed-tensors pack-quantized, ${first.bits} bits, ${grid}, ${first.symmetric ? 'symmetric' : 'asymmetric'}${more}`,
    notes,
    linears: (tensors) => storedLinears(tensors, groups, at),
  };
}

function weightArgs(group: Readonly<Record<string, unknown>>, at: string): WeightArgs {
  const w = record(group.weights, at, 'weights');
  const where = `${at}.weights`;
  const bits = w.num_bits;
  if (bits !== 2 && bits !== 3 && bits !== 4 && bits !== 8) throw keyError(where, 'num_bits', bits, '2, 3, 4 or 8');
  if (w.type !== 'int') throw keyError(where, 'type', w.type, '"int"');
  if (w.dynamic !== undefined && w.dynamic !== false) throw keyError(where, 'dynamic', w.dynamic, 'false');
  if (typeof w.symmetric !== 'boolean') throw keyError(where, 'symmetric', w.symmetric, 'true or false');
  const actorder = w.actorder ?? null;
  if (actorder !== null && !['static', 'weight', 'group', 'dynamic'].includes(actorder as string)) {
    throw keyError(where, 'actorder', actorder, 'static, weight, group or null');
  }
  const strategy = w.strategy ?? (typeof w.group_size === 'number' && w.group_size > 0 ? 'group' : 'channel');
  if (strategy !== 'group' && strategy !== 'channel' && strategy !== 'tensor') {
    throw keyError(where, 'strategy', strategy, 'group, channel or tensor');
  }
  const size = w.group_size;
  if (strategy === 'group' && !(Number.isSafeInteger(size) && (size as number) > 0)) {
    throw keyError(where, 'group_size', size, 'a positive integer');
  }
  const targets = group.targets;
  if (!Array.isArray(targets) || !targets.every((t) => typeof t === 'string')) {
    throw keyError(at, 'targets', targets, 'a list of module names or classes');
  }
  return {
    bits,
    symmetric: w.symmetric,
    strategy,
    group: strategy === 'group' ? (size as number) : 0,
    actorder: actorder as string | null,
    targets: targets,
  };
}

/** The scheme of each module: a target that names it (or matches: `re:`) goes before one that names its class. */
function schemesOf(
  groups: readonly WeightArgs[],
  names: readonly string[],
  at: string,
): (name: string) => WeightArgs | undefined {
  const targets = groups.flatMap((group) => group.targets.filter((target) => target.startsWith('re:')));
  const found = matching(targets.map((target) => `^(?:${target.slice(3)})`), names, `${at}: targets`); // prettier-ignore
  const matches = new Map(targets.map((target, i) => [target, found[i]!]));
  const fallback = groups.find((g) => g.targets.includes('Linear')) ?? (groups.length === 1 ? groups[0] : undefined);
  return (name) =>
    groups.find((g) => g.targets.some((target) => target === name || matches.get(target)?.has(name))) ?? fallback;
}

function storedLinears(
  tensors: ReadonlyMap<string, TensorEntry>,
  groups: readonly WeightArgs[],
  at: string,
): Map<string, StoredLinear> {
  const key = 'weight_packed';
  const names = [...tensors.keys()].filter((name) => name.endsWith(`.${key}`)).map((name) => name.slice(0, -key.length - 1)); // prettier-ignore
  const schemeOf = schemesOf(groups, names, at);
  const argsOf = (name: string): WeightArgs => {
    const args = schemeOf(name);
    if (!args) throw badInput('No group of the quantization config fits a stored linear', { where: at, got: name });
    return args;
  };
  const needed = (name: string) => ['weight_scale', ...(argsOf(name).symmetric ? [] : ['weight_zero_point'])];
  const linears = new Map<string, StoredLinear>();
  for (const [name, parts] of findParts(tensors, key, needed, ['weight_shape', 'weight_g_idx'])) {
    const args = argsOf(name);
    // A symmetric linear may have zero points all the same (all zero): they are its, and not read.
    const points = tensors.get(`${name}.weight_zero_point`);
    if (points) parts.set('weight_zero_point', points);
    const [n, words] = parts.get('weight_packed')!.shape as [number, number];
    linears.set(`${name}.weight`, {
      name: `${name}.weight`,
      shape: [n, words * perWord(args.bits)],
      parts,
      bits: args.bits,
      scheme: {
        bits: args.bits,
        group: args.group,
        symmetric: args.symmetric,
        ...(parts.has('weight_g_idx') && { order: 'group' }),
      },
      read: (scope, load, rows, columns) => readLinear(scope, new PartReader(name, parts, load), args, rows, columns),
    });
  }
  return linears;
}

async function readLinear(
  s: Scope,
  part: PartReader,
  { bits, symmetric, strategy, group, actorder }: WeightArgs,
  n: number,
  k: number,
): Promise<QuantizedLinear> {
  const g = strategy === 'group' ? Math.ceil(k / group) : 1;
  const per = perWord(bits);
  if (part.has('weight_shape')) {
    const shape = await part.get('weight_shape', 'i64', [2]);
    const [rows, columns] = new BigInt64Array((await shape.bytesOut()).buffer);
    if (Number(rows) !== n || Number(columns) !== k) {
      throw part.wrong('weight_shape', `[${n}, ${k}]`, `[${rows}, ${columns}]`);
    }
  }
  const words = await part.get('weight_packed', 'i32', [n, Math.ceil(k / per)]);
  const codes = unpack(s, words, n, k, packing(bits, 1));
  const stored = await part.get('weight_scale', undefined, strategy === 'tensor' ? [1, 1] : [n, g]);
  const scale = cast(s, strategy === 'tensor' ? stored.expand(n, 1) : stored, 'f32');
  let zero: Tensor | undefined;
  if (!symmetric) {
    const points = await part.get('weight_zero_point', 'i32', [Math.ceil(n / per), g]);
    zero = cast(s, unpack(s, points, n, g, packing(bits, 0)), 'f32');
  }
  const ordered = (actorder === 'group' || actorder === 'dynamic') && part.has('weight_g_idx');
  const columnGroup = ordered ? await part.columnGroups('weight_g_idx', k, g) : undefined;
  const grid: Grid = { scale, zero, ...range(bits), group: strategy === 'group' ? group : k, columnGroup };
  return { codes, grid };
}

export const compressedTensorsWriter: LayoutWriter = {
  name: 'compressed-tensors',
  signedScales: true,
  refuse({ name, inFeatures }, { group }) {
    if (group !== 0 && inFeatures % group !== 0) {
      return `${name}: its readers take the group size from K / groups, so K (${inFeatures}) must be a multiple of ${group}.`;
    }
    return undefined;
  },
  plan({ name, inFeatures: k, outFeatures: n }, { bits, group, symmetric, order }, dtype) {
    const per = perWord(bits);
    const g = group === 0 ? 1 : Math.ceil(k / group);
    return [
      { name: `${name}.weight_packed`, shape: [n, Math.ceil(k / per)], dtype: 'i32' },
      { name: `${name}.weight_scale`, shape: [n, g], dtype },
      { name: `${name}.weight_shape`, shape: [2], dtype: 'i64' },
      ...(symmetric
        ? []
        : [{ name: `${name}.weight_zero_point`, shape: [Math.ceil(n / per), g], dtype: 'i32' as const }]),
      ...(order === 'group' ? [{ name: `${name}.weight_g_idx`, shape: [k], dtype: 'i32' as const }] : []),
    ];
  },
  store(s, { name, inFeatures: k, outFeatures: n }, { bits, symmetric, order }, { codes, grid }, dtype) {
    if (symmetric !== (grid.zero === undefined))
      throw bug(`${name}: zero points and a ${symmetric ? '' : 'a'}symmetric scheme`);
    const stored = [
      { name: `${name}.weight_packed`, tensor: pack(s, codes, packing(bits, 1)) },
      { name: `${name}.weight_scale`, tensor: cast(s, grid.scale, dtype) },
      { name: `${name}.weight_shape`, tensor: s.from('i64', [2], BigInt64Array.of(BigInt(n), BigInt(k))) },
    ];
    if (grid.zero) {
      const points = pack(s, cast(s, grid.zero, 'i8'), packing(bits, 0));
      stored.push({ name: `${name}.weight_zero_point`, tensor: points });
    }
    if (order === 'group') {
      if (!grid.columnGroup) throw bug(`${name}: order "group" without column groups`);
      stored.push({ name: `${name}.weight_g_idx`, tensor: grid.columnGroup });
    }
    return stored;
  },
  config({ groups, ignore }) {
    const entries = groups.map(({ scheme, linears }, i) => [
      `group_${i}`,
      {
        format: 'pack-quantized',
        input_activations: null,
        output_activations: null,
        targets: i === 0 ? ['Linear'] : [...linears],
        weights: {
          actorder: scheme.order ?? null,
          block_structure: null,
          dynamic: false,
          group_size: scheme.group === 0 ? null : scheme.group,
          num_bits: scheme.bits,
          observer: 'memoryless_minmax',
          observer_kwargs: {},
          scale_dtype: null,
          strategy: scheme.group === 0 ? 'channel' : 'group',
          symmetric: scheme.symmetric,
          type: 'int',
          zp_dtype: scheme.symmetric ? null : 'torch.int8',
        },
      },
    ]);
    return {
      config_groups: Object.fromEntries(entries) as Record<string, unknown>,
      format: 'pack-quantized',
      global_compression_ratio: null,
      ignore: [...ignore],
      kv_cache_scheme: null,
      quant_method: 'compressed-tensors',
      quantization_status: 'compressed',
      sparsity_config: {},
      transform_config: {},
      version,
    };
  },
};
