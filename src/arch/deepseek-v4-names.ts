/** Names of modules in transformers -> names in the published checkpoints; applied in order. */
const renamed: readonly (readonly [RegExp, string])[] = [
  [/^model\.hc_head\.hc_/, 'hc_head_'],
  [/^model\.embed_tokens/, 'embed'],
  [/^lm_head/, 'head'],
  [/^model\./, ''],
  [/\.self_attn\b/, '.attn'],
  [/\.mlp\b/, '.ffn'],
  [/\.(attn|ffn)_hc\./, '.hc_$1_'],
  [/\.input_layernorm/, '.attn_norm'],
  [/\.post_attention_layernorm/, '.ffn_norm'],
  [/\.compressor\.indexer\.scorer\./, '.indexer.'],
  [/\.compressor\.indexer\.q_b_proj/, '.indexer.wq_b'],
  [/\.compressor\.indexer\./, '.indexer.compressor.'],
  [/\.compressor\.kv_norm/, '.compressor.norm'],
  [/\.compressor\.position_bias/, '.compressor.ape'],
  [/\.compressor\.gate_proj/, '.compressor.wgate'],
  [/\.sinks$/, '.attn_sink'],
  [/\.q_a_norm/, '.q_norm'],
  [/\.(q_a|q_b|o_a|o_b|kv)_proj/, '.w$1'],
  [/\.e_score_correction_bias$/, '.bias'],
  [/(experts(?:\.\d+)?)\.gate_proj/, '$1.w1'],
  [/(experts(?:\.\d+)?)\.down_proj/, '$1.w2'],
  [/(experts(?:\.\d+)?)\.up_proj/, '$1.w3'],
];

const published = (name: string): string => renamed.reduce((n, [from, to]) => n.replace(from, to), name);

/** What transformers 5 writes: the published names of layers behind `model.`, the rest as its modules are called. */
const prefixed = (name: string): string => (/^model\.layers\./.test(name) ? `model.${published(name)}` : name.replace(/^lm_head/, 'head')); // prettier-ignore
/** So far with one norm under the name that it has in compressors. */
const saved = (name: string): string => prefixed(name).replace(/\.attn\.kv_norm/, '.attn.norm');

const spellings = [published, saved, prefixed, (name: string): string => name] as const;

/**
 * How a DeepSeek-V4 checkpoint spells the names of transformers' modules: as it was published, as transformers writes
 * it, or as the modules are called. `stores` says what is there; where that is not known, as published.
 */
export function speller(stores: ((name: string) => boolean) | undefined): (name: string) => string {
  if (!stores) return published;
  const holds = (name: string): boolean => stores(name) || stores(`${name}.weight`);
  const style = spellings.find((spell) => holds(spell('model.layers.0.input_layernorm'))) ?? published;
  return (name) => [style, ...spellings].map((spell) => spell(name)).find(holds) ?? style(name);
}
