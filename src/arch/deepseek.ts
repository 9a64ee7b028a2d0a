import { linearSpec } from '../nn/layer.js';
import type { IndexerSpec } from '../nn/indexer.js';
import { latentAttention } from '../nn/mla.js';
import type { RopeSpec } from '../nn/rope.js';
import type { RouteOptions } from '../tensor/ops.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { deepseekMlp, mtpLayers, readGroups, sigmoidRouting } from './deepseek-moe.js';
import { groupedAttention, normSpec } from './parts.js';
import { readRope, yarnScale } from './rope-config.js';
import { readSizes, type Sizes } from './sizes.js';
import type { AttentionLayer, Model } from './types.js';

/** DeepSeekMoE 16B (Dai et al. 2024): Llama's attention, fine-grained experts beside shared ones. */
export const deepseek = (c: Config): Model => groupedModel(c, softmaxRouting);

function groupedModel(c: Config, routing: (c: Config, experts: number) => Omit<RouteOptions, 'bias' | 'topK'>): Model {
  const sizes = readSizes(c);
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const bias = c.bool('attention_bias', false);
  const mlp = deepseekMlp(c, sizes, routing, { bias: false });
  return decoder(c, sizes, rope, (i, name) => ({
    attention: groupedAttention(i, name, sizes, { rope, qkvBias: bias, outBias: bias }),
    mlp: mlp(i, name),
  }));
}

const softmaxRouting = (c: Config): Omit<RouteOptions, 'bias' | 'topK'> => {
  c.only('scoring_func', 'softmax');
  return { scoring: 'softmax', normalize: c.bool('norm_topk_prob', false) };
};

/** Softmax routing, optionally limited to groups scored by their best expert (DeepSeek-V2, section 2.2). */
const limitedRouting = (c: Config, experts: number): Omit<RouteOptions, 'bias' | 'topK'> => {
  c.only('scoring_func', 'softmax');
  // The original divides by the sum and leaves the factor out then; transformers does neither. No model uses it.
  c.only('norm_topk_prob', false);
  const limited = c.choice('topk_method', ['greedy', 'group_limited_greedy'], 'greedy') !== 'greedy';
  const groups = readGroups(c, experts);
  const scale = c.float('routed_scaling_factor', { default: 1 });
  return { scoring: 'softmax', scale, ...(limited && { ...groups, groupScore: 'max' }) };
};

/** DeepSeek-V2 and V2-Lite (Liu et al. 2024): latent attention, softmax routing, optionally limited to groups. */
export function deepseekV2(c: Config): Model {
  c.only('mlp_bias', false);
  return latentModel(c, limitedRouting, { bias: false, interleaved: true, carried: () => [] });
}

/** DeepSeek-V2's experts on Llama's attention, as in DeepSeek-OCR 2. */
export function deepseekOcrText(c: Config): Model {
  c.only('mlp_bias', false);
  return groupedModel(c, limitedRouting);
}

/** DeepSeek-V3, V3.1 and R1 (Liu et al. 2025): sigmoid routing with a selection bias, a layer that predicts further. */
export function deepseekV3(c: Config): Model {
  const interleaved = c.bool('rope_interleave', true);
  return latentModel(c, sigmoidRouting, { bias: true, interleaved, carried: (n) => mtpLayers(c, n) });
}

/** DeepSeek-V3.2 (2025): V3 with sparse attention. */
export function deepseekV32(c: Config): Model {
  c.only('mlp_bias', false);
  const carried = (n: number) => mtpLayers(c, n);
  return latentModel(c, sigmoidRouting, { bias: true, interleaved: true, carried, sparse: true });
}

interface Variant {
  /** The router has a bias for the selection. */
  readonly bias: boolean;
  readonly interleaved: boolean;
  readonly carried: (layers: number) => string[];
  readonly sparse?: boolean;
}

function latentModel(
  c: Config,
  routing: (c: Config, experts: number) => Omit<RouteOptions, 'bias' | 'topK'>,
  variant: Variant,
): Model {
  const nope = c.int('qk_nope_head_dim', { max: limits.hidden });
  const turned = c.int('qk_rope_head_dim', { max: limits.hidden });
  c.only('attn_logit_softcapping', null);
  // head_dim is the rotated part in transformers 5, and absent or of no consequence elsewhere.
  c.understood('head_dim', 'qk_head_dim');
  const sizes = { ...readSizes(c, { headDim: turned }), headDim: nope + turned };
  if (sizes.kvHeads !== sizes.heads) throw c.wrong('num_key_value_heads', `${sizes.heads}: latents serve all heads`);
  const { rope, factor, mscaleAllDim } = readRope(c, {
    headDim: turned,
    interleaved: variant.interleaved,
    fromEnd: true,
  });
  const mscale = factor !== undefined && mscaleAllDim ? yarnScale(factor, mscaleAllDim) : 1;
  const scale = (nope + turned) ** -0.5 * mscale * mscale;
  if (variant.sparse) c.words('layer_types', ['indexed_attention'], sizes.layers);
  const indexer = variant.sparse ? indexerParts(c, sizes, rope) : undefined;
  const attention = latentParts(c, sizes, { nope, rope, scale, indexer });
  const mlp = deepseekMlp(c, sizes, routing, { bias: variant.bias });
  return decoder(c, sizes, rope, (i, name) => ({ attention: attention(i, `${name}.self_attn`), mlp: mlp(i, name) }), {
    carried: variant.carried(sizes.layers),
    ragged: !variant.sparse,
  });
}

interface LatentParts {
  readonly nope: number;
  readonly rope: RopeSpec;
  readonly scale: number;
  readonly indexer: ((name: string) => IndexerSpec) | undefined;
}

function latentParts(
  c: Config,
  { hidden, heads }: Sizes,
  { nope, rope, scale, indexer }: LatentParts,
): (i: number, name: string) => AttentionLayer {
  const rank = c.int('kv_lora_rank', { max: limits.hidden });
  const qRank = c.optionalInt('q_lora_rank', { max: limits.hidden });
  const value = c.int('v_head_dim', { max: limits.hidden });
  const bias = c.bool('attention_bias', false);
  const queries = heads * (nope + rope.dim);
  // These two norms have an epsilon of their own, whatever rms_norm_eps says.
  const eps = 1e-6;
  return (i, name) => {
    const of = (part: string, inner: number, outer: number, biased = false) =>
      linearSpec(`${name}.${part}`, inner, outer, 'attention', biased);
    return latentAttention({
      layer: i,
      heads,
      nope,
      value,
      rank,
      q: qRank
        ? {
            down: of('q_a_proj', hidden, qRank, bias),
            norm: normSpec(`${name}.q_a_layernorm`, qRank, eps),
            up: of('q_b_proj', qRank, queries),
          }
        : of('q_proj', hidden, queries),
      kvDown: of('kv_a_proj_with_mqa', hidden, rank + rope.dim, bias),
      kvNorm: normSpec(`${name}.kv_a_layernorm`, rank, eps),
      kvUp: of('kv_b_proj', rank, heads * (nope + value)),
      o: of('o_proj', heads * value, hidden, bias),
      rope,
      scale,
      indexer: indexer?.(`${name}.indexer`),
    });
  };
}

function indexerParts(c: Config, { hidden }: Sizes, main: RopeSpec): (name: string) => IndexerSpec {
  const heads = c.int('index_n_heads', { max: limits.heads });
  const width = c.int('index_head_dim', { min: main.dim, max: limits.hidden });
  const topK = c.int('index_topk');
  const latent = c.int('q_lora_rank', { max: limits.hidden });
  const rope = { ...main, interleaved: false, fromEnd: false };
  return (name) => ({
    q: linearSpec(`${name}.wq_b`, latent, heads * width, 'attention'),
    k: linearSpec(`${name}.wk`, hidden, width, 'attention'),
    weights: linearSpec(`${name}.weights_proj`, hidden, heads, 'router'),
    norm: `${name}.k_norm`,
    heads,
    width,
    topK,
    rope,
  });
}
