import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { badInput, didYouMean } from '../base/errors.js';
import { exists } from '../base/files.js';
import { matching } from '../base/patterns.js';
import type { TensorLoader } from '../arch/load.js';
import type { RotatedBy } from '../arch/rotate.js';
import type { StoredWeight } from '../arch/stored.js';
import { readConfig } from '../checkpoint/config.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { Checkpoint, TensorEntry } from '../checkpoint/types.js';
import { binary, gemm } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import type { Merge, PlannedConversion } from './convert-tensor.js';

export interface Adapter {
  /** By tensor name of the model. */
  readonly merges: ReadonlyMap<string, Merge>;
  /** Its tensors, under names that the model has not. */
  readonly tensors: ReadonlyMap<string, StoredWeight>;
  /** Of settings and headers: part of a job's fingerprint. */
  readonly hash: string;
  readonly description: string;
}

/** Settings that change what an adapter means, and what they must be for a plain sum. */
const plain: Readonly<Record<string, readonly unknown[]>> = {
  use_dora: [false],
  use_qalora: [false],
  fan_in_fan_out: [false],
  lora_bias: [false],
  layer_replication: [null],
  megatron_config: [null],
  target_parameters: [null],
  trainable_token_indices: [null],
  alora_invocation_tokens: [null],
};
const named: Readonly<Record<string, string>> = {
  use_dora: 'DoRA scales each merged column anew: merge it with PEFT (merge_and_unload) and convert the result.',
};

type Settings = Readonly<Record<string, unknown>>;

function requirePlain(settings: Settings, where: string): void {
  if (settings.peft_type !== 'LORA') {
    throw badInput('Only LoRA adapters can be merged', { where, got: `peft_type ${JSON.stringify(settings.peft_type)}`, expected: '"LORA"' }); // prettier-ignore
  }
  for (const [key, allowed] of Object.entries(plain)) {
    const value = settings[key];
    if (value === undefined || allowed.includes(value) || (Array.isArray(value) && value.length === 0)) continue;
    throw badInput(key === 'use_dora' ? 'DoRA adapters cannot be merged' : 'The adapter has a setting that merging does not know', {
      where,
      got: `${key}: ${JSON.stringify(value)}`,
      expected: `${key}: ${JSON.stringify(allowed[0])}`,
      hint: named[key] ?? 'Merge it with PEFT (merge_and_unload) and convert the result.',
    }); // prettier-ignore
  }
  const init = settings.init_lora_weights;
  if (typeof init === 'string' && /^(pissa|olora|corda|loftq)/.test(init)) {
    throw badInput('The adapter was trained on changed base weights', {
      where,
      got: `init_lora_weights: ${JSON.stringify(init)}`,
      hint: 'Save it with PEFT as an ordinary LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=...).',
    });
  }
}

/** PEFT's rule (get_pattern_key): the first key that the module's name ends with, as a regular expression. */
function byPattern(
  settings: Settings,
  key: 'rank_pattern' | 'alpha_pattern',
  modules: readonly string[],
  where: string,
): (module: string) => unknown {
  const given = settings[key] ?? {};
  if (typeof given !== 'object' || Array.isArray(given)) throw notUsable(key, given, 'an object', where);
  const patterns = Object.entries(given) as [string, unknown][];
  const found = matching(patterns.map(([pattern]) => `^(?:.*\\.)?(?:${pattern})$`), modules, `${where}: ${key}`); // prettier-ignore
  return (module) => patterns[found.findIndex((names) => names.has(module))]?.[1];
}

const notUsable = (key: string, value: unknown, expected: string, where: string): Error =>
  badInput(`The adapter's setting ${key} is not usable`, {
    where,
    got: (JSON.stringify(value) ?? 'nothing').slice(0, 200),
    expected,
  });

/** The rank and the scale of each module's factors. */
function scaling(
  settings: Settings,
  modules: readonly string[],
  where: string,
): { rankOf: (module: string) => number; scaleOf: (module: string) => number } {
  const [rank, alpha] = (['rank_pattern', 'alpha_pattern'] as const).map((key) => byPattern(settings, key, modules, where)) as [(module: string) => unknown, (module: string) => unknown]; // prettier-ignore
  const rankOf = (module: string): number => {
    const value = rank(module) ?? settings.r;
    if (!Number.isSafeInteger(value) || (value as number) < 1) throw notUsable('r', value, 'a positive integer', where);
    return value as number;
  };
  const scaleOf = (module: string): number => {
    const value = alpha(module) ?? settings.lora_alpha ?? 8;
    if (typeof value !== 'number' || !Number.isFinite(value)) throw notUsable('lora_alpha', value, 'a number', where);
    return value / (settings.use_rslora === true ? Math.sqrt(rankOf(module)) : rankOf(module));
  };
  return { rankOf, scaleOf };
}

/**
 * Reads a PEFT LoRA folder and says what it does to the weights named in `shapes`.
 * Errors: no LoRA, DoRA and other variants, tensors that fit no weight.
 */
export async function readAdapter(folder: string, shapes: ReadonlyMap<string, readonly number[]>): Promise<Adapter> {
  const where = join(folder, 'adapter_config.json');
  if (!(await exists(folder)) || !(await stat(folder)).isDirectory() || !(await exists(where))) {
    throw badInput('The adapter is not a PEFT folder', { where: folder, expected: 'adapter_config.json and adapter_model.safetensors' }); // prettier-ignore
  }
  const settings = readConfig(where).config;
  const files = ['adapter_model.safetensors', 'adapter_model.bin'].map((name) => join(folder, name));
  const found = await Promise.all(files.map(exists));
  const file = files[found.indexOf(true)];
  if (file === undefined)
    throw badInput('The adapter has no weights', { where: folder, expected: 'adapter_model.safetensors' });
  const checkpoint = await openCheckpoint(file, { configOptional: true });
  await checkpoint.close();

  return adapterOf({ settings, where }, { ...checkpoint, path: file }, shapes);
}

/** The adapter of settings and tensors that are read already. Errors: as `readAdapter`. */
export function adapterOf(
  { settings, where }: { readonly settings: Settings; readonly where: string },
  stored: Pick<Checkpoint, 'path' | 'tensors' | 'fingerprint'>,
  shapes: ReadonlyMap<string, readonly number[]>,
): Adapter {
  requirePlain(settings, where);
  const file = stored.path;
  const merges = new Map<string, Merge>();
  const tensors = new Map<string, StoredWeight>();
  const own = (entry: TensorEntry): string => {
    const name = `adapter:${entry.name}`;
    tensors.set(name, { name, shape: entry.shape, entry, sources: [entry.name], files: [entry.span.path] });
    return name;
  };
  const target = (entry: TensorEntry, name: string): readonly number[] => {
    const shape = shapes.get(name);
    if (shape) return shape;
    const near = didYouMean(name, shapes.keys());
    throw badInput('The adapter is for a weight that the model does not have', {
      where: `${file}, tensor ${entry.name}`,
      got: name,
      hint: near === undefined ? 'Is it made for another model?' : `The nearest name is ${near}: is the adapter made for another model?`,
    }); // prettier-ignore
  };
  const wrong = (entry: TensorEntry, expected: string) =>
    badInput('A tensor of the adapter has another shape than it should', {
      where: `${file}, tensor ${entry.name}`,
      got: `[${entry.shape.join(', ')}]`,
      expected,
    });
  const add = (name: string, entry: TensorEntry, merge: () => Merge): void => {
    if (merges.has(name)) throw badInput('The adapter changes one weight twice', { where: `${file}, tensor ${entry.name}`, got: name }); // prettier-ignore
    merges.set(name, merge());
  };
  const inner = (name: string): string => name.replace(/^base_model\.model\./, '').replace('.modules_to_save.', '.');
  const factors = new Map<string, { readonly module: string; readonly part: string }>();
  for (const name of stored.tensors.keys()) {
    const match = /^(.*)\.lora_(A|B)(?:\.default)?\.weight$/.exec(inner(name));
    if (match) factors.set(name, { module: match[1]!, part: match[2]! });
  }
  const { rankOf, scaleOf } = scaling(settings, [...new Set([...factors.values()].map(({ module }) => module))], where);
  const partner = (entry: TensorEntry, own: string, other: string): TensorEntry => {
    const found = stored.tensors.get(entry.name.replace(new RegExp(`\\.lora_${own}((?:\\.default)?\\.weight)$`), `.lora_${other}$1`)); // prettier-ignore
    if (found) return found;
    throw badInput('A LoRA factor has no counterpart', { where: `${file}, tensor ${entry.name}`, expected: `lora_${other} beside it` }); // prettier-ignore
  };
  for (const entry of stored.tensors.values()) {
    const factor = factors.get(entry.name);
    if (!factor) {
      const name = inner(entry.name);
      if (/\.lora_|_lora/.test(name)) {
        throw badInput('The adapter holds something else than LoRA factors of linears', { where: file, got: entry.name, hint: 'Merge it with PEFT (merge_and_unload) and convert the result.' }); // prettier-ignore
      }
      const shape = target(entry, name);
      if (entry.shape.join() !== shape.join()) throw wrong(entry, `[${shape.join(', ')}], as the model has it`);
      add(name, entry, () => ({ kind: 'replace', by: own(entry) }));
      continue;
    }
    const { module, part } = factor;
    if (part === 'B') {
      partner(entry, 'B', 'A');
      continue;
    }
    const name = `${module}.weight`;
    const [n, k, ...more] = target(entry, name);
    if (k === undefined || more.length > 0) throw wrong(entry, 'no factor: the weight is no matrix');
    const b = partner(entry, 'A', 'B');
    const rank = rankOf(module);
    if (entry.shape.join() !== [rank, k].join()) throw wrong(entry, `[${rank}, ${k}]: the rank that the config says, and the model's inputs`); // prettier-ignore
    if (b.shape.join() !== [n, rank].join()) throw wrong(b, `[${n}, ${rank}]`);
    add(name, entry, () => ({ kind: 'add', a: own(entry), b: own(b), scale: scaleOf(module) }));
  }
  if (merges.size === 0) throw badInput('The adapter changes nothing', { where: file });
  const hash = createHash('sha256').update(JSON.stringify(settings)).update(stored.fingerprint).digest('hex');
  const added = [...merges.values()].filter(({ kind }) => kind === 'add').length;
  const description = `LoRA adapter: ${added} weights added to, ${merges.size - added} replaced`;
  return { merges, tensors, hash, description };
}

/** Error: a model whose weights are codes. */
export function requireMergeable(
  tensors: readonly PlannedConversion[],
  config: Readonly<Record<string, unknown>>,
  where: string,
): void {
  const coded = tensors.some(({ entry }) => entry.encoding.kind === 'ggml' || entry.encoding.kind === 'scaled');
  if (config.quantization_config === undefined && !coded) return;
  throw badInput('An adapter cannot be merged into quantized weights', {
    where,
    got: 'a model whose weights are codes: the sum would be rounded a second time',
    hint: 'Merge into the full-precision model, then quantize: deepseek-convert convert <model> --merge-lora <adapter> -o merged; deepseek-convert quantize merged -o int4.',
  });
}

/** Error: a model whose hidden states are rotated, of which an adapter for the model itself knows nothing. */
export function requireUnrotated(rotation: RotatedBy | undefined, where: string): void {
  if (!rotation) return;
  throw badInput('An adapter cannot be merged into a rotated model', {
    where,
    got: `hidden states rotated (${rotation.kind}, seed ${rotation.seed}): the adapter is for weights before that`,
    hint: 'Merge into the model that was rotated, then rotate the result.',
  });
}

/** The plan with the adapter's weights in it. */
export const withAdapter = (tensors: readonly PlannedConversion[], { merges }: Adapter): PlannedConversion[] =>
  tensors.map((tensor) => {
    const merge = merges.get(tensor.name);
    return merge ? { ...tensor, action: 'decode', merge } : tensor;
  });

/** The merged weight in fp32. */
export async function merged(
  scope: Scope,
  value: Tensor,
  merge: Merge,
  loader: TensorLoader,
  adapter: Adapter,
): Promise<Tensor> {
  // prettier-ignore
  const load = async (name: string, shape: readonly number[]): Promise<Tensor> => {
    const into = scope.empty('f32', shape);
    await loader.load([{ name, into }]);
    return into;
  };
  if (merge.kind === 'replace') return await load(merge.by, value.shape);
  const [a, b] = [await load(merge.a, adapter.tensors.get(merge.a)!.shape), await load(merge.b, adapter.tensors.get(merge.b)!.shape)]; // prettier-ignore
  const delta = gemm(scope, b, a, { alpha: merge.scale });
  return binary(scope, 'add', delta, value, { out: delta });
}
