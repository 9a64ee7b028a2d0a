import { linearSpec, type Layer } from '../nn/layer.js';
import { gatedMlp } from '../nn/mlp.js';
import { moeLayer } from '../nn/moe.js';
import type { RouteOptions } from '../tensor/ops.js';
import { limits, type Config } from './config.js';
import type { LayerParts } from './decoder.js';
import type { Sizes } from './sizes.js';
import { expertSpecs, ffnSpec, readActivation, readExperts } from './parts.js';

/** Feed-forward parts of the DeepSeek family: the first layers dense, then routed experts beside shared ones. */
export function deepseekMlp(
  c: Config,
  { hidden, layers }: Sizes,
  route: (c: Config, experts: number) => Omit<RouteOptions, 'bias' | 'topK'>,
  { bias }: { bias: boolean },
): (i: number, layer: string) => LayerParts['mlp'] & Layer {
  const activation = readActivation(c);
  const { experts, active } = readExperts(c, layers, 'n_routed_experts', 'num_local_experts', 'num_experts');
  const width = c.int('moe_intermediate_size', { max: limits.width });
  const denseWidth = c.int('intermediate_size', { max: limits.width });
  const sharedCount = c.int('n_shared_experts', { min: 0, max: limits.experts, default: 0 });
  const dense = c.int('first_k_dense_replace', { min: 0, default: 0 });
  const types = c.words('mlp_layer_types', ['dense', 'sparse'], layers);
  const isDense = (i: number) => (types ? types[i] === 'dense' : i < dense);
  c.only('moe_layer_freq', 1);
  const routing = { topK: active, ...route(c, experts) };
  return (i, layer) => {
    const name = `${layer}.mlp`;
    if (isDense(i)) return gatedMlp(ffnSpec(name, { hidden, width: denseWidth }, activation));
    return moeLayer({
      layer: i,
      router: linearSpec(`${name}.gate`, hidden, experts, 'router'),
      routeBias: bias ? `${name}.gate.e_score_correction_bias` : undefined,
      route: routing,
      experts: expertSpecs(`${name}.experts`, experts, { hidden, width }, activation),
      ...(sharedCount > 0 && {
        sharedCount,
        shared: ffnSpec(`${name}.shared_experts`, { hidden, width: width * sharedCount }, activation, 'shared-expert'),
      }),
    });
  };
}

/** Groups of experts of which only the best are searched (DeepSeek-V2, section 2.2.2). */
export function readGroups(c: Config, experts: number): { groups: number; topGroups: number } {
  const groups = c.int('n_group', { max: experts, default: 1 });
  if (experts % groups !== 0) throw c.wrong('n_group', `a divisor of the number of experts (${experts})`);
  return { groups, topGroups: c.int('topk_group', { max: groups, default: groups }) };
}

/** DeepSeek-V3's router: sigmoid scores, a bias for the selection only, groups scored by their two best. */
export const sigmoidRouting = (c: Config, experts: number): Omit<RouteOptions, 'bias' | 'topK'> => {
  c.only('scoring_func', 'sigmoid');
  c.only('topk_method', 'noaux_tc');
  return {
    scoring: 'sigmoid',
    ...readGroups(c, experts),
    groupScore: 'top2',
    normalize: c.bool('norm_topk_prob', true),
    scale: c.float('routed_scaling_factor', { default: 1 }),
  };
};

/** Multi-token-prediction layers behind the last: carried through, never computed with. */
export function mtpLayers(c: Config, layers: number): string[] {
  const count = c.int(c.oneOf('num_nextn_predict_layers', 'num_mtp_layers'), { min: 0, max: 64, default: 1 });
  return Array.from({ length: count }, (_, j) => `${c.root}.layers.${layers + j}.`);
}
