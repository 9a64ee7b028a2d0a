import type { Config } from './config.js';
import { decoder } from './decoder.js';
import { deepseekMlp, mtpLayers, sigmoidRouting } from './deepseek-moe.js';
import { groupedAttention } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** GLM 4.5 MoE: DeepSeek-V3's experts and router on attention with grouped heads. */
export function glm4Moe(c: Config): Model {
  const sizes = readSizes(c, { eps: 1e-5 });
  const { rope } = readRope(c, { headDim: sizes.headDim, partial: 0.5 });
  const qkvBias = c.bool('attention_bias', false);
  const norm = c.bool('use_qk_norm', false) ? { norm: 'head' as const } : {};
  const mlp = deepseekMlp(c, sizes, sigmoidRouting, { bias: true });
  return decoder(
    c,
    sizes,
    rope,
    (i, name) => ({
      attention: groupedAttention(i, name, sizes, { rope, qkvBias, ...norm }),
      mlp: mlp(i, name),
    }),
    { carried: mtpLayers(c, sizes.layers) },
  );
}
