import { limits, type Config } from './config.js';

/** Sizes that every decoder's config has. */
export interface Sizes {
  readonly hidden: number;
  readonly layers: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly context: number;
  readonly eps: number;
  /** Soft cap on attention scores, as Gemma 2 has it; other attention than grouped refuses it. */
  readonly attentionCap: number | undefined;
}

export function readSizes(c: Config, defaults: { eps?: number; headDim?: number } = {}): Sizes {
  const hidden = c.int('hidden_size', { max: limits.hidden });
  const heads = c.int('num_attention_heads', { max: limits.heads });
  const kvHeads = c.int('num_key_value_heads', { max: limits.heads, default: heads });
  if (heads % kvHeads !== 0) throw c.wrong('num_key_value_heads', `a divisor of num_attention_heads (${heads})`);
  const given = c.optionalInt('head_dim', { max: limits.hidden }) ?? defaults.headDim;
  if (given === undefined && hidden % heads !== 0) {
    throw c.wrong('num_attention_heads', `a divisor of hidden_size (${hidden}), or head_dim given`);
  }
  return {
    hidden,
    layers: c.int('num_hidden_layers', { max: limits.layers }),
    heads,
    kvHeads,
    headDim: given ?? hidden / heads,
    context: c.int('max_position_embeddings'),
    attentionCap: c.optionalFloat('attn_logit_softcapping', { min: 1e-3, max: 1e6 }),
    eps: c.float('rms_norm_eps', { max: 1, default: defaults.eps ?? 1e-6 }),
  };
}
