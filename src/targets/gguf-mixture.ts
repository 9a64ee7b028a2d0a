import { blockFormats, type BlockFormatName } from '../tensor/ops.js';

/** Block types that GGUF files are quantized to, from the usual one down. */
export const ggufTypes = ['q4_k', 'q5_k', 'q6_k', 'q8_0', 'q4_0', 'q3_k', 'q2_k'] as const satisfies BlockFormatName[];
export type GgufType = (typeof ggufTypes)[number];

/** What stands in for a type whose blocks of 256 do not divide a row (llama-quant.cpp, tensor_type_fallback). */
const smaller: Partial<Record<BlockFormatName, BlockFormatName>> = {
  q2_k: 'q4_0',
  q3_k: 'q4_0',
  q4_k: 'q5_0',
  q5_k: 'q5_1',
  q6_k: 'q8_0',
};

/** The block type of rows of `columns`: the one that is wanted, or what fits in its place; undefined: nothing fits. */
export const fittingType = (columns: number, wanted: BlockFormatName): BlockFormatName | undefined =>
  [wanted, smaller[wanted]].find((type) => type !== undefined && columns % blockFormats[type].values === 0);

/** llama.cpp's mixtures of block types: most tensors in Q4_K, the sensitive ones in more bits. */
export const mixtures = ['q4_k_s', 'q4_k_m'] as const;
export type Mixture = (typeof mixtures)[number];

/** The kinds of tensors that mixtures tell apart. */
export type TensorKind = 'output' | 'token_embd' | 'attn_v' | 'attn_k' | 'attn_output' | 'ffn_down' | 'other';

/** The kind of a linear by its Hugging Face name. */
export function kindOf(name: string): TensorKind {
  const leaf = name.slice(name.lastIndexOf('.') + 1);
  const kinds: Record<string, TensorKind> = {
    v_proj: 'attn_v',
    k_proj: 'attn_k',
    o_proj: 'attn_output',
    down_proj: 'ffn_down',
    w2: 'ffn_down',
    lm_head: 'output',
    embed_tokens: 'token_embd',
  };
  return kinds[leaf] ?? 'other';
}

/** The kind of a tensor by its GGUF name. `tied`: the embedding is the head too. */
export function kindOfGguf(name: string, tied: boolean): TensorKind {
  if (name === 'output.weight' || (tied && name === 'token_embd.weight')) return 'output';
  if (name === 'token_embd.weight') return 'token_embd';
  const part = /^blk\.\d+\.(attn_v|attn_k|attn_output|ffn_down)(_exps|_shexp)?\.weight$/.exec(name)?.[1];
  return (part as TensorKind | undefined) ?? 'other';
}

/** Of `n` layers the first and last eighth, and every third between (llama.cpp, use_more_bits). */
const moreBits = (i: number, n: number): boolean =>
  i < Math.floor(n / 8) || i >= Math.floor((7 * n) / 8) || (i - Math.floor(n / 8)) % 3 === 2;

/**
 * The block type of a tensor as llama.cpp's quantizer chooses it (llama-quant.cpp, llama_tensor_get_type).
 * @param layer index of the layer; 0 outside of them
 * @param experts routed experts of the model; models of exactly 8 get more bits in their attention
 */
export function mixtureType(
  mixture: Mixture,
  kind: TensorKind,
  layer: number,
  layers: number,
  experts: number,
): BlockFormatName {
  const medium = mixture === 'q4_k_m';
  switch (kind) {
    case 'output':
      return 'q6_k';
    case 'attn_v':
      if (experts === 8) return 'q8_0';
      if (medium) return moreBits(layer, layers) ? 'q6_k' : 'q4_k';
      return layer < 4 ? 'q5_k' : 'q4_k';
    case 'attn_k':
      return experts === 8 ? 'q8_0' : 'q4_k';
    case 'attn_output':
      return experts === 8 ? 'q5_k' : 'q4_k';
    case 'ffn_down':
      if (medium) return moreBits(layer, layers) ? 'q6_k' : 'q4_k';
      return layer < Math.floor(layers / 8) ? 'q5_k' : 'q4_k';
    case 'token_embd':
    case 'other':
      return 'q4_k';
  }
}
