import { gatedMlp } from '../nn/mlp.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { ffnSpec, groupedAttention, readActivation } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** Llama (Touvron et al. 2023; Llama 2 and 3), DeepSeek LLM and Coder, distilled R1 models. */
export function llama(c: Config): Model {
  const sizes = readSizes(c);
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const qkvBias = c.bool('attention_bias', false);
  const bias = c.bool('mlp_bias', false);
  return decoder(c, sizes, rope, (i, name) => ({
    attention: groupedAttention(i, name, sizes, { rope, qkvBias, outBias: qkvBias }),
    mlp: gatedMlp(ffnSpec(`${name}.mlp`, { hidden: sizes.hidden, width }, activation, 'mlp', { bias })),
  }));
}
