import { gatedMlp } from '../nn/mlp.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { ffnSpec, groupedAttention, readActivation } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** Mistral (Jiang et al. 2023): Llama with a sliding window in every layer. */
export function mistral(c: Config): Model {
  const sizes = readSizes(c);
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const window = c.optionalInt('sliding_window');
  return decoder(c, sizes, rope, (i, name) => ({
    attention: groupedAttention(i, name, sizes, { rope, window }),
    mlp: gatedMlp(ffnSpec(`${name}.mlp`, { hidden: sizes.hidden, width }, activation)),
    window,
  }));
}
