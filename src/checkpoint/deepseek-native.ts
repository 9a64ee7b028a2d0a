import { badInput } from '../base/errors.js';
import { asStored, assembled } from '../formats/assembly.js';
import { encodedBytes } from '../formats/ggml.js';
import type { TensorEntry } from '../formats/types.js';
import { joinScales } from './scales.js';
import type { PlannedTensor } from './types.js';

/**
 * Module names of Hugging Face and of DeepSeek's own inference code, and the dimension on which the tensor is split
 * among model-parallel shards (inference/convert.py of DeepSeek-V3).
 */
const modules: readonly (readonly [hf: string, native: string, split: 0 | 1 | undefined])[] = [
  ['embed_tokens', 'embed', 0],
  ['input_layernorm', 'attn_norm', undefined],
  ['post_attention_layernorm', 'ffn_norm', undefined],
  ['q_proj', 'wq', 0],
  ['q_a_proj', 'wq_a', undefined],
  ['q_a_layernorm', 'q_norm', undefined],
  ['q_b_proj', 'wq_b', 0],
  ['kv_a_proj_with_mqa', 'wkv_a', undefined],
  ['kv_a_layernorm', 'kv_norm', undefined],
  ['kv_b_proj', 'wkv_b', 0],
  ['o_proj', 'wo', 1],
  ['gate', 'gate', undefined],
  ['gate_proj', 'w1', 0],
  ['down_proj', 'w2', 1],
  ['up_proj', 'w3', 0],
  ['norm', 'norm', undefined],
  ['lm_head', 'head', 0],
];
const toNative = new Map(modules.map(([hf, native, split]) => [hf, { name: native, split }]));
const toHf = new Map(modules.map(([hf, native, split]) => [native, { name: hf, split }]));

/** Real names have some 60 characters. */
const maxName = 1024;

const expertOf = (name: string): number | undefined => {
  const match = /(?:^|\.)experts\.(\d+)\./.exec(name);
  return match === null ? undefined : Number(match[1]);
};

/** Hugging Face name and split dimension of a native name; undefined for names that are not DeepSeek's. */
export function hfName(native: string): { name: string; split: 0 | 1 | undefined } | undefined {
  const parts = native.length > maxName ? [] : native.split('.');
  const found = parts.length >= 2 ? toHf.get(parts.at(-2)!) : undefined;
  if (found === undefined) return undefined;
  parts[parts.length - 2] = found.name;
  const leaf = parts.at(-1);
  if (leaf === 'scale') parts[parts.length - 1] = 'weight_scale_inv';
  if (leaf === 'bias' && found.name === 'gate') parts[parts.length - 1] = 'e_score_correction_bias';
  const name = parts.map((part) => (part === 'attn' ? 'self_attn' : part === 'ffn' ? 'mlp' : part)).join('.');
  return { name: found.name === 'lm_head' ? name : `model.${name}`, split: found.split };
}

/** Native name and split dimension of a Hugging Face name; undefined for names that are not DeepSeek's. */
export function nativeName(hf: string): { name: string; split: 0 | 1 | undefined } | undefined {
  const parts = hf.replace(/^model\./, '').split('.');
  const found = parts.length >= 2 ? toNative.get(parts.at(-2)!) : undefined;
  if (found === undefined) return undefined;
  parts[parts.length - 2] = found.name;
  const leaf = parts.at(-1);
  if (leaf === 'weight_scale_inv') parts[parts.length - 1] = 'scale';
  if (leaf === 'e_score_correction_bias') parts[parts.length - 1] = 'bias';
  const name = parts.map((part) => (part === 'self_attn' ? 'attn' : part === 'mlp' ? 'ffn' : part)).join('.');
  return { name, split: found.split };
}

/**
 * The tensors of `model{i}-mp{n}.safetensors` under Hugging Face names: split tensors joined again, experts collected,
 * replicated tensors taken from the first shard. `shards` in order of i; they are used up.
 * Errors (kind 'input'): unknown names, shards that disagree in shape or miss a part.
 */
export function fromNative(
  shards: readonly (readonly TensorEntry[])[],
  config: Readonly<Record<string, unknown>>,
): Map<string, TensorEntry> {
  const names = new Set(shards.flatMap((shard) => shard.map(({ name }) => name)));
  const joined = shards.map((shard) => joinScales(shard, config));
  const tensors = new Map<string, TensorEntry>();
  for (const native of names) {
    const parts = joined.map((shard) => shard.get(native)).filter((entry) => entry !== undefined);
    const [first] = parts;
    if (first === undefined) continue; // a scale, now part of its weight
    const where = `${first.span.path}, tensor ${JSON.stringify(native)}`;
    const known = hfName(native);
    if (known === undefined) throw badInput("Not a name of DeepSeek's native layout", { where, hint: 'The folder may hold another model.' }); // prettier-ignore
    const { name, split } = known;
    if (expertOf(native) !== undefined) {
      if (parts.length > 1) throw badInput('An expert is in several shards', { where, got: parts[1]!.span.path });
      tensors.set(name, { ...first, name });
      continue;
    }
    if (parts.length !== shards.length) {
      throw badInput('A tensor is missing in some shards', {
        where,
        expected: `in all ${shards.length}`,
        got: `in ${parts.length}`,
      });
    }
    const axis = first.shape.length > (split ?? 0) ? split : undefined;
    const others = parts.find(({ shape }) => shape.length !== first.shape.length || shape.some((n, d) => d !== axis && n !== first.shape[d])); // prettier-ignore
    if (others !== undefined) {
      throw badInput('Shards disagree on a shape', { where, expected: `[${first.shape.join(', ')}]`, got: `[${others.shape.join(', ')}] in ${others.span.path}` }); // prettier-ignore
    }
    if (axis === undefined || parts.length === 1) tensors.set(name, { ...first, name });
    else {
      const shape = first.shape.with(axis, parts.reduce((sum, part) => sum + part.shape[axis]!, 0)); // prettier-ignore
      tensors.set(name, assembled(name, shape, axis, parts.map(asStored))); // prettier-ignore
    }
  }
  return tensors;
}

/** A tensor of a native shard: what is planned, and which part of the input it is. */
export interface NativeTensor {
  readonly planned: PlannedTensor;
  readonly entry: TensorEntry;
}

/**
 * Plans native shards of a checkpoint whose tensors are as they are stored (scales not joined). Split tensors become
 * views of the input; experts go to the shard of their range; everything else goes to every shard.
 * Errors (kind 'input'): names that DeepSeek's code does not know; sizes that do not divide by `shards`.
 */
export function planNative(
  tensors: ReadonlyMap<string, TensorEntry>,
  config: Readonly<Record<string, unknown>>,
  shards: number,
): { tensors: NativeTensor[]; notes: string[] } {
  const layers = Number(config['num_hidden_layers'] ?? Infinity);
  const experts = Number(config['n_routed_experts'] ?? 0);
  if (!Number.isSafeInteger(shards) || shards < 1 || experts % shards !== 0) {
    throw badInput('The experts do not divide among the shards', {
      expected: `a divisor of ${experts}`,
      got: `${shards}`,
    });
  }
  const planned: NativeTensor[] = [];
  let skipped = 0;
  for (let i = 0; i < shards; i++) {
    for (const [hf, entry] of tensors) {
      const layer = /^model\.layers\.(\d+)\./.exec(hf);
      if (layer !== null && Number(layer[1]) >= layers) {
        skipped += i === 0 ? 1 : 0; // the multi-token prediction head, which the native code has no place for
        continue;
      }
      const known = nativeName(hf);
      const where = `${entry.span.path}, tensor ${JSON.stringify(hf)}`;
      if (known === undefined) throw badInput("DeepSeek's native layout has no place for a tensor", { where });
      const expert = expertOf(hf);
      if (expert !== undefined && Math.floor(expert / (experts / shards)) !== i) continue;
      const axis = expert === undefined && entry.shape.length > (known.split ?? 0) ? known.split : undefined;
      const part = axis === undefined ? entry : cut(entry, axis, i, shards, where);
      const file = `model${i}-mp${shards}.safetensors`;
      planned.push({ planned: plan(known.name, file, part, where), entry: part });
    }
  }
  const notes = skipped > 0 ? [`${skipped} tensors of the multi-token prediction layers were left out.`] : [];
  return { tensors: planned, notes };
}

function plan(name: string, file: string, { shape, encoding }: TensorEntry, where: string): PlannedTensor {
  if (encoding.kind === 'plain') return { name, file, shape, dtype: encoding.dtype };
  if (encoding.kind === 'opaque') return { name, file, shape, dtype: 'u8', encoding };
  throw badInput("DeepSeek's native layout cannot hold this tensor", { where, got: encoding.kind });
}

/** The i-th of n equal parts along `axis`, as a view of the same bytes. */
function cut(entry: TensorEntry, axis: 0 | 1, i: number, n: number, where: string): TensorEntry {
  const { shape, span, encoding } = entry;
  const size = shape[axis]! / n;
  if (!Number.isInteger(size) || entry.strides !== undefined) {
    throw badInput('A tensor does not divide among the shards', {
      where,
      expected: `a multiple of ${n}`,
      got: `${shape[axis]}`,
    });
  }
  const element = encodedBytes([8], encoding) / 8;
  const row = shape.slice(axis + 1).reduce((product, d) => product * d, element);
  const part = shape.with(axis, size);
  const start = span.offset + i * size * row;
  if (axis === 0) return { ...entry, shape: part, span: { ...span, offset: start, bytes: size * row } };
  const pitch = shape[1]! * element;
  const bytes = shape[0] === 0 ? 0 : (shape[0]! - 1) * pitch + size * row;
  const strides = size === shape[1] ? undefined : [shape[1]!, 1];
  return { ...entry, shape: part, span: { ...span, offset: start, bytes }, ...(strides && { strides }) };
}
