import { linearSpec } from '../nn/layer.js';
import { moeLayer } from '../nn/moe.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { expertSpecs, groupedAttention, readActivation, readExperts } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** OLMoE (Muennighoff et al. 2024): norms over all of q and k, optional clipping of q, k and v. */
export function olmoe(c: Config): Model {
  const sizes = readSizes(c, { eps: 1e-5 });
  const { hidden } = sizes;
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const bias = c.bool('attention_bias', false);
  const clip = c.optionalFloat('clip_qkv', { min: 1e-6 });
  const { experts, active } = readExperts(c, sizes.layers, 'num_experts', 'num_local_experts');
  const normalize = c.bool('norm_topk_prob', false);
  return decoder(c, sizes, rope, (i, name) => ({
    attention: groupedAttention(i, name, sizes, { rope, qkvBias: bias, outBias: bias, norm: 'all', clip }),
    mlp: moeLayer({
      layer: i,
      router: linearSpec(`${name}.mlp.gate`, hidden, experts, 'router'),
      route: { topK: active, scoring: 'softmax', normalize },
      experts: expertSpecs(`${name}.mlp.experts`, experts, { hidden, width }, activation),
    }),
  }));
}
