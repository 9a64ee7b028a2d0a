import { badInput } from '../base/errors.js';

/** How GGUF stores an architecture: names, the order of rotary dimensions, what is fixed in its runtime. */
export interface GgufArch {
  /** general.architecture. */
  readonly name: string;
  /** model_type values of Hugging Face configs that it stands for. */
  readonly modelTypes: readonly string[];
  /**
   * Rotary pairs: Hugging Face pairs dimension i with i + D/2; where GGUF pairs 2i with 2i + 1, rows of q and k are
   * stored in that order (`interleaved`), except where the checkpoint itself interleaves already (`as-stored`).
   */
  readonly rotary: 'interleaved' | 'as-stored';
  /** Name of the norm before the feed-forward part. */
  readonly feedForwardNorm: string;
  /** Whether the runtime normalizes the weights of the chosen experts, whatever the metadata says. */
  readonly normalizes?: boolean;
}

const arch = (
  name: string,
  modelTypes: string,
  rotary: GgufArch['rotary'],
  more: Partial<GgufArch> = {},
): GgufArch => ({ name, modelTypes: modelTypes.split(' '), rotary, feedForwardNorm: 'ffn_norm', ...more });

/** A new architecture is a line here, unless its tensors have other names or need rearranging. */
const archs: readonly GgufArch[] = [
  arch('llama', 'llama mistral mixtral', 'interleaved'),
  arch('qwen2', 'qwen2', 'as-stored'),
  arch('qwen2moe', 'qwen2_moe', 'as-stored', { normalizes: false }),
  arch('qwen3', 'qwen3', 'as-stored'),
  arch('qwen3moe', 'qwen3_moe', 'as-stored', { normalizes: true }),
  arch('olmoe', 'olmoe', 'as-stored', { normalizes: false }),
  arch('glm4moe', 'glm4_moe', 'as-stored', { feedForwardNorm: 'post_attention_norm' }),
  arch('deepseek', 'deepseek', 'interleaved', { normalizes: false }),
  arch('deepseek2', 'deepseek_v3 deepseek_v2', 'as-stored'),
];

export function archOfModel(modelType: unknown): GgufArch {
  const found = archs.find(({ modelTypes }) => modelTypes.includes(modelType as string));
  if (found !== undefined) return found;
  throw badInput('This architecture is not written as GGUF', {
    where: 'config.json, model_type',
    got: JSON.stringify(modelType) ?? 'none',
    expected: archs.flatMap(({ modelTypes }) => modelTypes).join(', '),
  });
}

export function archOfGguf(name: unknown, where: string): GgufArch {
  const found = archs.find((known) => known.name === name);
  if (found !== undefined) return found;
  throw badInput('This GGUF architecture is not read', {
    where: `${where}, general.architecture`,
    got: JSON.stringify(name) ?? 'none',
    expected: archs.map((known) => known.name).join(', '),
  });
}

/** Tensors outside of the layers. */
export const outerNames: readonly (readonly [hf: string, gguf: string])[] = [
  ['model.embed_tokens.weight', 'token_embd.weight'],
  ['model.norm.weight', 'output_norm.weight'],
  ['lm_head.weight', 'output.weight'],
];

/** Modules of a layer, without `.weight` or `.bias`: behind `model.layers.{i}.` and `blk.{i}.`. */
const moduleNames: readonly (readonly [hf: string, gguf: string])[] = [
  ['input_layernorm', 'attn_norm'],
  ['self_attn.q_proj', 'attn_q'],
  ['self_attn.k_proj', 'attn_k'],
  ['self_attn.v_proj', 'attn_v'],
  ['self_attn.o_proj', 'attn_output'],
  ['self_attn.q_norm', 'attn_q_norm'],
  ['self_attn.k_norm', 'attn_k_norm'],
  ['self_attn.q_a_proj', 'attn_q_a'],
  ['self_attn.q_a_layernorm', 'attn_q_a_norm'],
  ['self_attn.q_b_proj', 'attn_q_b'],
  ['self_attn.kv_a_proj_with_mqa', 'attn_kv_a_mqa'],
  ['self_attn.kv_a_layernorm', 'attn_kv_a_norm'],
  ['self_attn.kv_b_proj', 'attn_kv_b'],
  ['mlp.gate_proj', 'ffn_gate'],
  ['mlp.up_proj', 'ffn_up'],
  ['mlp.down_proj', 'ffn_down'],
  ['mlp.shared_expert_gate', 'ffn_gate_inp_shexp'],
];

const projections = ['gate', 'up', 'down'] as const;
export type Projection = (typeof projections)[number];

/** Where an architecture keeps its router and experts in Hugging Face names. */
export interface ExpertNames {
  readonly router: string;
  /** Folder of the experts. */
  readonly experts: string;
  readonly projection: Readonly<Record<Projection, string>>;
  readonly shared: string;
}

export function expertNames(modelType: string): ExpertNames {
  const plain = { gate: 'gate_proj', up: 'up_proj', down: 'down_proj' };
  const mixtral = { gate: 'w1', up: 'w3', down: 'w2' };
  const at = modelType === 'mixtral' ? 'block_sparse_moe' : 'mlp';
  return {
    router: `${at}.gate`,
    experts: `${at}.experts`,
    projection: modelType === 'mixtral' ? mixtral : plain,
    shared: modelType === 'qwen2_moe' ? 'mlp.shared_expert' : 'mlp.shared_experts',
  };
}

/** All modules of a layer for one model type, both ways. */
export function layerNames(
  { feedForwardNorm }: GgufArch,
  modelType: string,
): { toGguf: Map<string, string>; toHf: Map<string, string> } {
  const { router, shared, projection } = expertNames(modelType);
  const pairs: (readonly [string, string])[] = [
    ...moduleNames,
    ['post_attention_layernorm', feedForwardNorm],
    [router, 'ffn_gate_inp'],
    ...projections.map((name) => [`${shared}.${projection[name]}`, `ffn_${name}_shexp`] as const),
  ];
  return {
    toGguf: new Map(pairs),
    toHf: new Map(pairs.map(([hf, gguf]) => [gguf, hf])),
  };
}

/** The selection bias of DeepSeek-V3's router has a name of its own on both sides. */
export const routerBias = { hf: 'mlp.gate.e_score_correction_bias', gguf: 'exp_probs_b.bias' };

/** Small tensors that ggml multiplies in f32 only: vectors and routers. */
export const staysF32 = (gguf: string, shape: readonly number[]): boolean =>
  shape.length <= 1 || /\.ffn_gate_inp(_shexp)?\.weight$/.test(gguf);
