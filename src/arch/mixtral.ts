import { linearSpec } from '../nn/layer.js';
import { moeLayer } from '../nn/moe.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { expertSpecs, groupedAttention, readActivation, readExperts } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes } from './sizes.js';
import type { Model } from './types.js';

/** Mixtral (Jiang et al. 2024): softmax over the chosen experts, no shared ones. */
export function mixtral(c: Config): Model {
  const sizes = readSizes(c, { eps: 1e-5 });
  const { hidden } = sizes;
  const { rope } = readRope(c, { headDim: sizes.headDim, theta: 1e6 });
  const width = c.int('intermediate_size', { max: limits.width });
  const activation = readActivation(c);
  const window = c.optionalInt('sliding_window');
  const { experts, active } = readExperts(c, sizes.layers, 'num_local_experts', 'num_experts');
  return decoder(c, sizes, rope, (i, name) => {
    const moe = `${name}.block_sparse_moe`;
    return {
      attention: groupedAttention(i, name, sizes, { rope, window }),
      mlp: moeLayer({
        layer: i,
        router: linearSpec(`${moe}.gate`, hidden, experts, 'router'),
        route: { topK: active, scoring: 'softmax', normalize: true },
        experts: expertSpecs(`${moe}.experts`, experts, { hidden, width }, activation, ['w1', 'w3', 'w2']),
      }),
      window,
    };
  });
}
