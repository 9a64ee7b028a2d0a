import { badInput } from '../base/errors.js';
import { asStored, assembled } from '../formats/assembly.js';
import { encodedBytes } from '../formats/ggml.js';
import type { TensorEntry } from '../formats/types.js';
import { expertNames, layerNames, outerNames, routerBias, staysF32 } from './gguf-arch.js';
import type { GgufArch, Projection } from './gguf-arch.js';

/** A tensor of a GGUF file: where its values come from, and whether it is f32 whatever the others are. */
export interface GgufTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly entry: TensorEntry;
  readonly staysF32: boolean;
}

/** Experts of a layer; the largest models have 512. A number far beyond would only cost memory. */
const maxExperts = 65_536;

type Config = Readonly<Record<string, unknown>>;
const size = (config: Config, key: string): number => {
  const value = config[key];
  if (typeof value === 'number' && Number.isSafeInteger(value) && value > 0) return value;
  throw badInput('The config lacks a size that GGUF needs', { where: `config.json, ${key}`, got: JSON.stringify(value) ?? 'none' }); // prettier-ignore
};

/** Rows of rotary heads, [H D] = [H, 2, D/2] -> [H, D/2, 2]: the order in which GGUF pairs neighbours. */
function interleave(entry: TensorEntry, heads: number): TensorEntry {
  const [rows, ...rest] = entry.shape as [number, ...number[]];
  const view = [heads, 2, rows / heads / 2, ...rest];
  if (view.length > 4 || !Number.isInteger(view[2]!)) throw notHeads(entry, heads);
  const axes = [0, 2, 1, ...rest.map((_, d) => d + 3)];
  return assembled(entry.name, entry.shape, 0, [{ entry, view, axes }]);
}

/** The reverse of `interleave`. */
function deinterleave(entry: TensorEntry, heads: number): TensorEntry {
  const [rows, ...rest] = entry.shape as [number, ...number[]];
  const view = [heads, rows / heads / 2, 2, ...rest];
  if (view.length > 4 || !Number.isInteger(view[1]!)) throw notHeads(entry, heads);
  const axes = [0, 2, 1, ...rest.map((_, d) => d + 3)];
  return assembled(entry.name, entry.shape, 0, [{ entry, view, axes }]);
}

const notHeads = ({ name, shape }: TensorEntry, heads: number): Error =>
  badInput('The rows of a tensor do not divide into heads', {
    where: `tensor ${JSON.stringify(name)}`,
    got: `[${shape.join(', ')}]`,
    expected: `${heads} heads of an even size`,
  });

const headsOf = (config: Config, module: string): number | undefined =>
  module === 'self_attn.q_proj'
    ? size(config, 'num_attention_heads')
    : module === 'self_attn.k_proj'
      ? size(config, config['num_key_value_heads'] === undefined ? 'num_attention_heads' : 'num_key_value_heads')
      : undefined;

/**
 * Names and arranges a Hugging Face checkpoint as llama.cpp's converter does: q and k rows by rotary pairs where the
 * architecture wants them so, experts joined to [E, rows, columns], kv_b split into k_b (transposed) and v_b.
 * `tensors` have their logical shapes. Multi-token prediction layers are left out with a note.
 */
export function tensorsToGguf(
  tensors: ReadonlyMap<string, TensorEntry>,
  config: Config,
  arch: GgufArch,
): { tensors: GgufTensor[]; notes: string[] } {
  const modelType = config['model_type'] as string;
  const names = layerNames(arch, modelType).toGguf;
  const outer = new Map(outerNames);
  const { experts: expertFolder, projection } = expertNames(modelType);
  const expertPattern = new RegExp(`^${expertFolder.replace('.', '\\.')}\\.(\\d+)\\.(\\w+)\\.weight$`);
  const projectionOf = new Map(Object.entries(projection).map(([key, name]) => [name, key as Projection]));
  const layers = size(config, 'num_hidden_layers');
  const out: GgufTensor[] = [];
  const experts = new Map<string, TensorEntry[]>();
  let skipped = 0;
  const add = (name: string, entry: TensorEntry, shape = entry.shape): void => {
    out.push({ name, shape, entry: { ...entry, shape }, staysF32: staysF32(name, shape) });
  };
  for (const [name, entry] of tensors) {
    const match = /^model\.layers\.(\d+)\.(.+)$/.exec(name);
    if (match === null) {
      const known = outer.get(name);
      if (known === undefined) throw unknownTensor(entry, 'GGUF has no name for a tensor');
      if (name !== 'lm_head.weight' || config['tie_word_embeddings'] !== true) add(known, entry);
      continue;
    }
    const [, layer, rest] = match as unknown as [string, string, string];
    if (Number(layer) >= layers) {
      skipped++;
      continue;
    }
    const at = `blk.${layer}`;
    const expert = expertPattern.exec(rest);
    if (expert !== null && projectionOf.has(expert[2]!)) {
      const key = `${at}.ffn_${projectionOf.get(expert[2]!)!}_exps.weight`;
      const list = experts.get(key) ?? [];
      if (Number(expert[1]) >= maxExperts) throw unknownTensor(entry, 'GGUF has no room for so many experts');
      list[Number(expert[1])] = entry;
      experts.set(key, list);
      continue;
    }
    if (rest === routerBias.hf) {
      add(`${at}.${routerBias.gguf}`, entry);
      continue;
    }
    const [module, leaf] = [rest.replace(/\.(weight|bias)$/, ''), rest.slice(rest.lastIndexOf('.') + 1)];
    const known = names.get(module);
    if (known === undefined || module === rest) throw unknownTensor(entry, 'GGUF has no name for a tensor');
    if (module === 'self_attn.kv_b_proj') {
      for (const part of splitKvB(entry, config)) add(`${at}.${part.name}`, part.entry);
      continue;
    }
    const heads = arch.rotary === 'interleaved' ? headsOf(config, module) : undefined;
    const arranged = heads === undefined ? entry : interleave(entry, heads);
    add(`${at}.${known}.${leaf}`, arranged, module === 'mlp.shared_expert_gate' ? [entry.shape.at(-1)!] : entry.shape);
  }
  for (const [name, list] of experts) {
    const shape = list[0]?.shape ?? [];
    for (let e = 0; e < list.length; e++) {
      if (list[e]?.shape.join() !== shape.join()) throw unevenExperts(name, e, list[e]);
    }
    const parts = list.map((entry) => ({ ...asStored(entry), view: [1, ...shape], axes: [0, 1, 2] }));
    const entry = assembled(name, [list.length, ...shape], 0, parts);
    out.push({ name, shape: entry.shape, entry, staysF32: false });
  }
  const notes = skipped > 0 ? [`${skipped} tensors of layers beyond num_hidden_layers (multi-token prediction) were left out.`] : []; // prettier-ignore
  return { tensors: inFileOrder(out), notes };
}

/** Layer by layer, as llama.cpp reads them. */
function inFileOrder(tensors: readonly GgufTensor[]): GgufTensor[] {
  const layer = ({ name }: GgufTensor): number => Number(/^blk\.(\d+)\./.exec(name)?.[1] ?? (name.startsWith('token') ? -1 : 1e9)); // prettier-ignore
  return [...tensors].sort((a, b) => layer(a) - layer(b));
}

/** kv_b [H (nope + v), R]: k_b [H, R, nope], transposed for the absorbed form, and v_b [H, v, R]. */
function splitKvB(entry: TensorEntry, config: Config): { name: string; entry: TensorEntry }[] {
  const [heads, nope, value] = ['num_attention_heads', 'qk_nope_head_dim', 'v_head_dim'].map((key) => size(config, key)) as [number, number, number]; // prettier-ignore
  const rank = entry.shape[1]!;
  const view = [heads, nope + value, rank];
  const k = { entry, view, cut: { axis: 1, from: 0, to: nope }, axes: [0, 2, 1] };
  const v = { entry, view, cut: { axis: 1, from: nope, to: nope + value }, axes: [0, 1, 2] };
  return [
    { name: 'attn_k_b.weight', entry: assembled(entry.name, [heads, rank, nope], 0, [k]) },
    { name: 'attn_v_b.weight', entry: assembled(entry.name, [heads, value, rank], 0, [v]) },
  ];
}

const unknownTensor = ({ name, span }: TensorEntry, what: string): Error =>
  badInput(what, { where: `${span.path}, tensor ${JSON.stringify(name)}` });
const unevenExperts = (name: string, expert: number, entry: TensorEntry | undefined): Error =>
  badInput(entry === undefined ? 'An expert is missing' : 'Experts of one layer have different shapes', {
    where: `${name}, expert ${expert}`,
    got: entry === undefined ? 'none' : `[${entry.shape.join(', ')}]`,
  });

/** Hugging Face names and shapes of the tensors of a GGUF file. `config` is what was rebuilt from its metadata. */
export function tensorsFromGguf(
  tensors: ReadonlyMap<string, TensorEntry>,
  config: Config,
  arch: GgufArch,
): Map<string, TensorEntry> {
  const modelType = config['model_type'] as string;
  const names = layerNames(arch, modelType).toHf;
  const outer = new Map(outerNames.map(([hf, gguf]) => [gguf, hf]));
  const { experts, projection } = expertNames(modelType);
  const out = new Map<string, TensorEntry>();
  const add = (name: string, entry: TensorEntry): void => {
    out.set(name, { ...entry, name });
  };
  for (const [name, entry] of tensors) {
    const match = /^blk\.(\d+)\.(.+)$/.exec(name);
    if (match === null) {
      if (name === 'rope_freqs.weight') continue; // derived from the config
      const known = outer.get(name);
      if (known === undefined) throw unknownTensor(entry, 'A tensor that this architecture does not have');
      add(known, entry);
      continue;
    }
    const [, layer, rest] = match as unknown as [string, string, string];
    const at = `model.layers.${layer}`;
    const stack = /^ffn_(gate|up|down)_exps\.weight$/.exec(rest);
    if (stack !== null) {
      const leaf = projection[stack[1] as Projection];
      split(entry).forEach((expert, e) => add(`${at}.${experts}.${e}.${leaf}.weight`, expert));
    } else if (rest === routerBias.gguf) {
      add(`${at}.${routerBias.hf}`, entry);
    } else if (rest === 'attn_k_b.weight') {
      const v = tensors.get(`blk.${layer}.attn_v_b.weight`);
      if (v === undefined) throw unknownTensor(entry, 'attn_k_b has no attn_v_b beside it');
      add(`${at}.self_attn.kv_b_proj.weight`, joinKvB(entry, v));
    } else if (rest !== 'attn_v_b.weight') {
      const [module, leaf] = [rest.replace(/\.(weight|bias)$/, ''), rest.slice(rest.lastIndexOf('.') + 1)];
      const known = names.get(module);
      if (known === undefined || module === rest)
        throw unknownTensor(entry, 'A tensor that this architecture does not have');
      const heads = arch.rotary === 'interleaved' ? headsOf(config, known) : undefined;
      const arranged = heads === undefined ? entry : deinterleave(entry, heads);
      const isGate = known === 'mlp.shared_expert_gate';
      add(`${at}.${known}.${leaf}`, isGate ? { ...arranged, shape: [1, ...entry.shape] } : arranged);
    }
  }
  return out;
}

/** [E, rows, columns] as E tensors of the same bytes. */
function split(entry: TensorEntry): TensorEntry[] {
  const [count, ...shape] = entry.shape;
  if (count === undefined || shape.length !== 2 || count > maxExperts) {
    throw badInput('Not the shape of experts', {
      where: `${entry.span.path}, tensor ${JSON.stringify(entry.name)}`,
      expected: `[at most ${maxExperts}, rows, columns]`,
      got: `[${entry.shape.join(', ')}]`,
    });
  }
  const bytes = encodedBytes(shape, entry.encoding);
  return Array.from({ length: count }, (_, e) => ({
    ...entry,
    shape,
    span: { path: entry.span.path, offset: entry.span.offset + e * bytes, bytes },
  }));
}

function joinKvB(k: TensorEntry, v: TensorEntry): TensorEntry {
  const [heads, rank, nope] = k.shape as [number, number, number];
  const value = v.shape[1]!;
  if (k.shape.length !== 3 || v.shape.join() !== [heads, value, rank].join()) {
    throw badInput('attn_k_b and attn_v_b do not fit together', {
      where: `${k.span.path}, tensor ${JSON.stringify(k.name)}`,
      got: `[${k.shape.join(', ')}] and [${v.shape.join(', ')}]`,
    });
  }
  const parts = [{ ...asStored(k), axes: [0, 2, 1] }, asStored(v)];
  return assembled(k.name, [heads * (nope + value), rank], 1, parts);
}
