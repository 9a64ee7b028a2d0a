import { selfAttention } from '../nn/attention.js';
import { linearSpec } from '../nn/layer.js';
import { gatedMlp } from '../nn/mlp.js';
import { limits, type Config } from './config.js';
import { decoder, ffnSpec, readActivation, readSizes } from './decoder.js';
import { readRope } from './rope-config.js';
import type { Model } from './types.js';

/** Llama (Touvron et al. 2023; Llama 2 and 3), DeepSeek LLM and Coder, distilled R1 models. */
export function llama(c: Config): Model {
  const sizes = readSizes(c);
  const { hidden, heads, kvHeads, headDim } = sizes;
  const { rope } = readRope(c, { headDim });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const attentionBias = c.bool('attention_bias', false);
  const mlpBias = c.bool('mlp_bias', false);
  return decoder(c, sizes, (i, name) => {
    const of = (part: string, inner: number, outer: number) =>
      linearSpec(`${name}.self_attn.${part}`, inner, outer, 'attention', attentionBias);
    const attention = selfAttention({
      layer: i,
      q: of('q_proj', hidden, heads * headDim),
      k: of('k_proj', hidden, kvHeads * headDim),
      v: of('v_proj', hidden, kvHeads * headDim),
      o: of('o_proj', heads * headDim, hidden),
      heads,
      kvHeads,
      headDim,
      rope,
    });
    return {
      attention,
      mlp: gatedMlp(ffnSpec(`${name}.mlp`, { hidden, width }, activation, 'mlp', { bias: mlpBias })),
    };
  });
}
