import { badInput } from '../base/errors.js';
import type { GgufScalar, GgufValue } from '../formats/gguf.js';
import type { TensorEntry } from '../formats/types.js';
import type { GgufArch } from './gguf-arch.js';

type Config = Readonly<Record<string, unknown>>;
export type GgufMetadata = Map<string, GgufValue>;

/** llama_ftype numbers of general.file_type. */
export const fileTypes = {
  f32: 0,
  f16: 1,
  q4_0: 2,
  q8_0: 7,
  q2_k: 10,
  q3_k: 11,
  q4_k_s: 14,
  q4_k_m: 15,
  q5_k: 16,
  q6_k: 18,
  bf16: 32,
} as const;
export type GgufFileType = keyof typeof fileTypes;

const gatingFunctions = ['', 'softmax', 'sigmoid'];
const architectures: Record<string, string> = {
  llama: 'LlamaForCausalLM',
  mixtral: 'MixtralForCausalLM',
  qwen2: 'Qwen2ForCausalLM',
  qwen2_moe: 'Qwen2MoeForCausalLM',
  qwen3: 'Qwen3ForCausalLM',
  qwen3_moe: 'Qwen3MoeForCausalLM',
  olmoe: 'OlmoeForCausalLM',
  glm4_moe: 'Glm4MoeForCausalLM',
  deepseek: 'DeepseekForCausalLM',
  deepseek_v2: 'DeepseekV2ForCausalLM',
  deepseek_v3: 'DeepseekV3ForCausalLM',
};

const isRecord = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** Rope parameters wherever transformers 4 and 5 write them. */
export function ropeOf(config: Config): Record<string, unknown> {
  const nested = isRecord(config['rope_parameters']) ? config['rope_parameters'] : undefined;
  const scaling = isRecord(config['rope_scaling']) ? config['rope_scaling'] : {};
  const rope: Record<string, unknown> = { rope_theta: config['rope_theta'], ...scaling, ...nested };
  return { ...rope, rope_type: rope['rope_type'] ?? scaling['type'] ?? 'default' };
}

class Writer {
  readonly metadata: GgufMetadata = new Map();
  constructor(
    readonly config: Config,
    readonly prefix: string,
  ) {}

  set(key: string, type: Exclude<GgufValue['type'], 'array'>, value: GgufScalar): void {
    this.metadata.set(key.startsWith('general.') ? key : `${this.prefix}.${key}`, { type, value });
  }
  /** The first of the config's keys that holds a number. */
  number(key: string, type: 'u32' | 'f32', ...from: string[]): void {
    const value = from.map((name) => this.config[name]).find((found) => typeof found === 'number');
    if (value !== undefined) this.set(key, type, value);
  }
}

/**
 * Metadata of a model as llama.cpp's converter writes it.
 * Errors (kind 'input'): settings that the runtime has no place for, which would change the model's answers.
 */
export function configToGguf(config: Config, arch: GgufArch, fileType: GgufFileType): GgufMetadata {
  const out = new Writer(config, arch.name);
  const modelType = config['model_type'] as string;
  out.set('general.architecture', 'string', arch.name);
  out.set('general.type', 'string', 'model');
  out.set('general.file_type', 'u32', fileTypes[fileType]);
  out.set('general.quantization_version', 'u32', 2);
  const isMla = arch.name === 'deepseek2';
  out.number('block_count', 'u32', 'num_hidden_layers');
  out.number('context_length', 'u32', 'max_position_embeddings');
  out.number('embedding_length', 'u32', 'hidden_size');
  out.number('feed_forward_length', 'u32', 'intermediate_size');
  out.number('attention.head_count', 'u32', 'num_attention_heads');
  // Multi-head latent attention runs as attention with one key/value head.
  if (isMla) out.set('attention.head_count_kv', 'u32', 1);
  else out.number('attention.head_count_kv', 'u32', 'num_key_value_heads', 'num_attention_heads');
  out.number('attention.layer_norm_rms_epsilon', 'f32', 'rms_norm_eps');
  out.number('vocab_size', 'u32', 'vocab_size');
  writeRope(out, isMla);
  if (!isMla) {
    out.number('attention.key_length', 'u32', 'head_dim');
    out.number('attention.value_length', 'u32', 'head_dim');
    const head = (config['head_dim'] ??
      Number(config['hidden_size']) / Number(config['num_attention_heads'])) as number;
    const partial = Number(ropeOf(config)['partial_rotary_factor'] ?? config['partial_rotary_factor'] ?? (modelType === 'glm4_moe' ? 0.5 : 1)); // prettier-ignore
    out.set('rope.dimension_count', 'u32', Math.trunc(head * partial));
  } else writeMla(out);
  writeExperts(out, arch, modelType);
  for (const key of ['attn_logit_softcapping', 'final_logit_softcapping']) {
    if (typeof config[key] !== 'number') continue;
    throw badInput('llama.cpp runs this architecture without soft caps', { where: `config.json, ${key}`, got: `${config[key]}`, expected: 'null' }); // prettier-ignore
  }
  const window = config['sliding_window'];
  if (modelType === 'mistral' && typeof window === 'number' && window < Number(config['max_position_embeddings'])) {
    throw badInput('llama.cpp runs this architecture without a sliding window', { where: 'config.json, sliding_window', got: `${window}`, expected: 'null' }); // prettier-ignore
  }
  return out.metadata;
}

function writeMla(out: Writer): void {
  const { config } = out;
  if (config['rope_interleave'] === false) {
    throw badInput('llama.cpp runs this architecture with interleaved rotary pairs', { where: 'config.json, rope_interleave', got: 'false', expected: 'true' }); // prettier-ignore
  }
  const sizes = ['kv_lora_rank', 'qk_rope_head_dim', 'qk_nope_head_dim', 'v_head_dim'].map((key) =>
    Number(config[key]),
  );
  const [rank, rope, nope, value] = sizes as [number, number, number, number];
  // 0 selects plain q_proj.
  out.set('attention.q_lora_rank', 'u32', Number(config['q_lora_rank'] ?? 0));
  out.set('attention.kv_lora_rank', 'u32', rank);
  out.set('attention.key_length', 'u32', rank + rope);
  out.set('attention.value_length', 'u32', rank);
  out.set('attention.key_length_mla', 'u32', nope + rope);
  out.set('attention.value_length_mla', 'u32', value);
  out.set('rope.dimension_count', 'u32', rope);
}

function writeRope(out: Writer, isMla: boolean): void {
  const rope = ropeOf(out.config);
  const number = (key: string, name: string): void => {
    if (typeof rope[name] === 'number') out.set(key, 'f32', rope[name]);
  };
  number('rope.freq_base', 'rope_theta');
  switch (rope['rope_type']) {
    case 'default':
    case 'llama3': // its factors are a tensor, rope_freqs
      return;
    case 'linear':
      out.set('rope.scaling.type', 'string', 'linear');
      number('rope.scaling.factor', 'factor');
      return;
    case 'yarn':
      out.set('rope.scaling.type', 'string', 'yarn');
      number('rope.scaling.factor', 'factor');
      out.set('rope.scaling.original_context_length', 'u32', Number(rope['original_max_position_embeddings'] ?? out.config['max_position_embeddings'])); // prettier-ignore
      number('rope.scaling.yarn_beta_fast', 'beta_fast');
      number('rope.scaling.yarn_beta_slow', 'beta_slow');
      writeAmplitude(out, rope, isMla);
      return;
    default:
      throw badInput('This rope scaling is not written as GGUF', {
        where: 'config.json, rope_parameters',
        got: JSON.stringify(rope['rope_type']),
        expected: 'default, linear, yarn or llama3',
      });
  }
}

/** YaRN's temperature (Peng et al. 2023, eq. 22), which multiplies cos and sin. */
const temperature = (factor: number, mscale: number): number => (factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1);

/**
 * llama.cpp multiplies cos and sin by the temperature and by attn_factor; in latent attention it takes mscale for
 * mscale_all_dim and scales the scores by it instead (deepseek2.cpp).
 */
function writeAmplitude(out: Writer, rope: Readonly<Record<string, unknown>>, isMla: boolean): void {
  const { mscale, mscale_all_dim: all, attention_factor: given } = rope;
  const factor = Number(rope['factor']);
  if (isMla) {
    if (typeof all !== 'number' || all === 0 || mscale !== all || typeof given === 'number') {
      throw badInput('llama.cpp runs YaRN in latent attention with mscale and mscale_all_dim that are the same', {
        where: 'config.json, rope_parameters',
        got: JSON.stringify({ mscale, mscale_all_dim: all, attention_factor: given }),
      });
    }
    out.set('rope.scaling.yarn_log_multiplier', 'f32', 0.1 * all);
    return;
  }
  const both = typeof mscale === 'number' && typeof all === 'number' && mscale !== 0 && all !== 0;
  const inferred = both ? temperature(factor, mscale) / temperature(factor, all) : temperature(factor, 1);
  const amplitude = typeof given === 'number' ? given : inferred;
  const share = amplitude / temperature(factor, 1);
  if (share !== 1) out.set('rope.scaling.attn_factor', 'f32', share);
}

function writeExperts(out: Writer, arch: GgufArch, modelType: string): void {
  const { config } = out;
  out.number('expert_count', 'u32', 'n_routed_experts', 'num_local_experts', 'num_experts');
  const hasExperts = out.metadata.has(`${arch.name}.expert_count`);
  if (!hasExperts) return;
  out.number('expert_used_count', 'u32', 'num_experts_per_tok');
  out.number('expert_feed_forward_length', 'u32', 'moe_intermediate_size', 'intermediate_size');
  out.number('expert_shared_feed_forward_length', 'u32', 'shared_expert_intermediate_size');
  out.number('expert_shared_count', 'u32', 'n_shared_experts');
  out.number('leading_dense_block_count', 'u32', 'first_k_dense_replace');
  const hasGroups = Number(config['n_group'] ?? 1) > 1;
  if (modelType === 'deepseek_v2' && hasGroups && config['topk_method'] === 'group_limited_greedy') {
    throw badInput('llama.cpp chooses groups of experts by their two best, this architecture by the best', {
      where: 'config.json, topk_method',
      got: 'group_limited_greedy',
      expected: 'greedy, or one group',
    });
  }
  // Where there is a number of groups, llama.cpp chooses by them.
  if (!hasGroups || config['topk_method'] !== 'greedy') {
    out.number('expert_group_count', 'u32', 'n_group');
    out.number('expert_group_used_count', 'u32', 'topk_group');
  }
  out.number('expert_weights_scale', 'f32', 'routed_scaling_factor');
  const scoring = config['scoring_func'] ?? (['glm4_moe', 'deepseek_v3'].includes(modelType) ? 'sigmoid' : undefined) ?? (arch.name === 'deepseek2' ? 'softmax' : undefined); // prettier-ignore
  if (scoring !== undefined) {
    const id = gatingFunctions.indexOf(scoring as string);
    if (id < 1) throw badInput('This router function is not written as GGUF', { where: 'config.json, scoring_func', got: JSON.stringify(scoring), expected: 'softmax or sigmoid' }); // prettier-ignore
    out.set('expert_gating_func', 'u32', id);
  }
  const norm = config['norm_topk_prob'];
  if (arch.normalizes !== undefined && norm !== undefined && norm !== arch.normalizes) {
    throw badInput('llama.cpp has this setting fixed for the architecture', {
      where: 'config.json, norm_topk_prob',
      got: JSON.stringify(norm),
      expected: `${arch.normalizes}`,
      hint: 'Use the container glm4_moe, whose normalization GGUF can say.',
    });
  }
  if (typeof norm === 'boolean' && arch.normalizes === undefined) out.set('expert_weights_norm', 'bool', norm);
}

class Reader {
  constructor(
    readonly metadata: ReadonlyMap<string, GgufValue>,
    readonly prefix: string,
    readonly where: string,
  ) {}

  get(key: string): GgufScalar | undefined {
    const found = this.metadata.get(`${this.prefix}.${key}`);
    if (found === undefined) return undefined;
    // Per-layer values that are all the same are one value.
    if (found.type === 'array')
      return found.value.every((item) => item === found.value[0]) ? found.value[0] : undefined;
    return found.type === 'f32' ? shortest(found.value as number) : found.value;
  }
  number(key: string): number | undefined {
    const value = this.get(key);
    return typeof value === 'number' ? value : undefined;
  }
  need(key: string): number {
    const value = this.number(key);
    if (value !== undefined) return value;
    throw badInput('The GGUF metadata lacks a size', { where: `${this.where}, ${this.prefix}.${key}` });
  }
}

/** The shortest decimal that rounds to this f32: 1e-6 rather than 9.999999974752427e-7. */
export function shortest(value: number): number {
  for (let digits = 1; digits < 10; digits++) {
    const candidate = Number(value.toPrecision(digits));
    if (Math.fround(candidate) === value) return candidate;
  }
  return value;
}

/** Rebuilds config.json from GGUF metadata; what only tensors tell (biases, tied head) is read off their names. */
export function configFromGguf(
  metadata: ReadonlyMap<string, GgufValue>,
  tensors: ReadonlyMap<string, TensorEntry>,
  arch: GgufArch,
  where: string,
): Record<string, unknown> {
  const read = new Reader(metadata, arch.name, where);
  const experts = read.number('expert_count') ?? 0;
  const gating = gatingFunctions[read.number('expert_gating_func') ?? 0] ?? '';
  const isMla = arch.name === 'deepseek2';
  let modelType = arch.modelTypes[0]!;
  if (arch.name === 'llama' && experts > 0) modelType = 'mixtral';
  if (isMla && gating !== 'sigmoid') modelType = 'deepseek_v2';
  const heads = read.need('attention.head_count');
  const hidden = read.need('embedding_length');
  const embedding = tensors.get('token_embd.weight');
  const config: Record<string, unknown> = {
    architectures: [architectures[modelType]],
    model_type: modelType,
    hidden_act: 'silu',
    hidden_size: hidden,
    intermediate_size: read.number('feed_forward_length') ?? read.need('expert_feed_forward_length'),
    num_hidden_layers: read.need('block_count'),
    num_attention_heads: heads,
    num_key_value_heads: isMla ? heads : (read.number('attention.head_count_kv') ?? heads),
    max_position_embeddings: read.need('context_length'),
    rms_norm_eps: read.need('attention.layer_norm_rms_epsilon'),
    vocab_size: read.number('vocab_size') ?? embedding?.shape[0],
    tie_word_embeddings: !tensors.has('output.weight'),
    rope_theta: read.number('rope.freq_base') ?? 10000,
    dtype: embedding?.encoding.kind === 'plain' ? { f32: 'float32', f16: 'float16' }[embedding.encoding.dtype as string] ?? 'bfloat16' : 'bfloat16', // prettier-ignore
  };
  if (!modelType.startsWith('qwen2')) config['attention_bias'] = tensors.has('blk.0.attn_q.bias');
  if (modelType === 'llama') config['mlp_bias'] = tensors.has('blk.0.ffn_down.bias');
  for (const [key, name] of [['bos', 'bos_token_id'], ['eos', 'eos_token_id'], ['padding', 'pad_token_id']] as const) {
    const id = metadata.get(`tokenizer.ggml.${key}_token_id`)?.value;
    if (typeof id === 'number') config[name] = id;
  } // prettier-ignore
  const scaling = readScaling(read, isMla);
  if (scaling !== undefined) config['rope_scaling'] = scaling;
  if (isMla) {
    const [rank, rope] = [read.need('attention.kv_lora_rank'), read.need('rope.dimension_count')];
    const key = read.number('attention.key_length_mla') ?? read.need('attention.key_length');
    config['q_lora_rank'] = read.number('attention.q_lora_rank') || null;
    config['kv_lora_rank'] = rank;
    config['qk_rope_head_dim'] = rope;
    config['qk_nope_head_dim'] = key - rope;
    config['v_head_dim'] = read.number('attention.value_length_mla') ?? read.need('attention.value_length');
  } else {
    const head = read.number('attention.key_length');
    if (head !== undefined) config['head_dim'] = head;
    if (modelType === 'glm4_moe') {
      config['partial_rotary_factor'] = read.need('rope.dimension_count') / (head ?? hidden / heads);
      config['use_qk_norm'] = tensors.has('blk.0.attn_q_norm.weight');
    }
  }
  if (experts > 0) readExperts(read, config, modelType, gating, arch);
  return config;
}

function readScaling(read: Reader, isMla: boolean): Record<string, unknown> | undefined {
  const type = read.get('rope.scaling.type');
  const factor = read.number('rope.scaling.factor');
  if (type === undefined || type === 'none' || factor === undefined) return undefined;
  if (type === 'linear') return { rope_type: 'linear', factor };
  if (type !== 'yarn') {
    throw badInput('This rope scaling of a GGUF file is not read', { where: `${read.where}, ${read.prefix}.rope.scaling.type`, got: JSON.stringify(String(type)) }); // prettier-ignore
  }
  const scaling: Record<string, unknown> = {
    rope_type: 'yarn',
    factor,
    original_max_position_embeddings: read.need('rope.scaling.original_context_length'),
  };
  for (const name of ['beta_fast', 'beta_slow']) {
    const value = read.number(`rope.scaling.yarn_${name}`);
    if (value !== undefined) scaling[name] = value;
  }
  const share = read.number('rope.scaling.attn_factor');
  if (share !== undefined) scaling['attention_factor'] = shortest(Math.fround(share * temperature(factor, 1)));
  const log = read.number('rope.scaling.yarn_log_multiplier');
  // DeepSeek sets both to the same.
  if (isMla && log !== undefined) scaling['mscale'] = scaling['mscale_all_dim'] = shortest(Math.fround(log * 10));
  return scaling;
}

function readExperts(
  read: Reader,
  config: Record<string, unknown>,
  modelType: string,
  gating: string,
  arch: GgufArch,
): void {
  const count = read.need('expert_count');
  config['num_experts_per_tok'] = read.need('expert_used_count');
  if (modelType === 'mixtral') {
    config['num_local_experts'] = count;
    return;
  }
  config['moe_intermediate_size'] = read.number('expert_feed_forward_length') ?? config['intermediate_size'];
  const normalizes = read.get('expert_weights_norm') ?? arch.normalizes ?? false;
  if (['qwen2_moe', 'qwen3_moe', 'olmoe'].includes(modelType)) {
    config['num_experts'] = count;
    config['norm_topk_prob'] = normalizes;
    if (modelType === 'olmoe') config['intermediate_size'] = config['moe_intermediate_size'];
    else Object.assign(config, { decoder_sparse_step: 1, mlp_only_layers: [] });
    if (modelType === 'olmoe') delete config['moe_intermediate_size'];
    if (modelType === 'qwen2_moe')
      config['shared_expert_intermediate_size'] = read.need('expert_shared_feed_forward_length');
    return;
  }
  Object.assign(config, {
    n_routed_experts: count,
    n_shared_experts: read.number('expert_shared_count') ?? 0,
    first_k_dense_replace: read.number('leading_dense_block_count') ?? 0,
    norm_topk_prob: normalizes,
  });
  if (modelType !== 'deepseek') {
    config['routed_scaling_factor'] = read.number('expert_weights_scale') ?? 1;
    config['n_group'] = read.number('expert_group_count') ?? 1;
    config['topk_group'] = read.number('expert_group_used_count') ?? 1;
  }
  if (modelType === 'deepseek_v2')
    config['topk_method'] = Number(config['n_group']) > 1 ? 'group_limited_greedy' : 'greedy';
  if (modelType.startsWith('deepseek')) config['scoring_func'] = gating || 'softmax';
}
