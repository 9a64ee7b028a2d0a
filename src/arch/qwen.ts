import { gatedMlp } from '../nn/mlp.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { ffnSpec, groupedAttention, readActivation, readWindows } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases on q, k and v. */
export function qwen2(c: Config): Model {
  return qwen(c, {}, { qkvBias: true });
}

/** Qwen 3 (Yang et al. 2025): no biases by default, norms on the heads of q and k. */
export function qwen3(c: Config): Model {
  const bias = c.bool('attention_bias', false);
  return qwen(c, { headDim: 128 }, { qkvBias: bias, outBias: bias, norm: 'head' });
}

function qwen(
  c: Config,
  defaults: { headDim?: number },
  variant: { qkvBias: boolean; outBias?: boolean; norm?: 'head' },
): Model {
  const sizes = readSizes(c, defaults);
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const windows = readWindows(c, sizes.layers, (i, from) => i >= from);
  return decoder(c, sizes, rope, (i, name) => ({
    attention: groupedAttention(i, name, sizes, { rope, window: windows[i], ...variant }),
    mlp: gatedMlp(ffnSpec(`${name}.mlp`, { hidden: sizes.hidden, width }, activation)),
    window: windows[i],
  }));
}
