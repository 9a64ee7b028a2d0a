import type { Container } from './types.js';

/**
 * Mixtral (`MixtralForCausalLM`): softmax over the chosen experts' logits, no shared ones. With tiny logits each of the
 * K chosen experts weighs 1/K, so w2 is stored times K: K is fixed with the conversion.
 */
export const mixtral: Container = {
  name: 'mixtral',
  scoring: 'softmax',
  selectionBias: false,
  groups: false,
  shared: { min: 0, max: 0, default: 0 },
  denseLayers: 'none',
  tiesHead: true,
  weighting: (method, { active }) => ({
    routedDown: method === 'split' ? active : 1,
    sharedDown: 1,
    normalized: true,
  }),
  router: (layer) => `${layer}.block_sparse_moe.gate`,
  expert: (layer, e) => {
    const name = `${layer}.block_sparse_moe.experts.${e}`;
    return { gate: `${name}.w1`, up: `${name}.w3`, down: `${name}.w2` };
  },
  constants: () => [],
  config: (shape, _weighting, { windows }) => ({
    architectures: ['MixtralForCausalLM'],
    model_type: 'mixtral',
    intermediate_size: shape.width,
    num_local_experts: shape.routed,
    num_experts_per_tok: shape.active,
    sliding_window: windows[0] ?? null,
    output_router_logits: false,
    router_jitter_noise: 0,
  }),
  refuse: ({ qkvBias, outBias, qkNorm, windows }) => {
    if (qkvBias || outBias) return 'its attention has no biases';
    if (qkNorm) return 'it has no norms on q and k';
    if (windows.some((window) => window !== windows[0])) return 'its sliding window is the same in all layers';
    return undefined;
  },
};
