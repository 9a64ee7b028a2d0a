import type { Container } from './types.js';

/**
 * GLM-4.5 (`Glm4MoeForCausalLM`): grouped-query attention under a DeepSeek-V3 router, which chooses by sigmoid(logit) +
 * bias and weighs by sigmoid(logit) alone. With tiny logits every weight is 1/2, so that routed_scaling_factor 2 without
 * normalisation gives unit weights for any number of active experts: num_experts_per_tok can be changed in the config.
 */
export const glm4Moe: Container = {
  name: 'glm4_moe',
  scoring: 'sigmoid',
  selectionBias: true,
  // Both readers build the shared network from moe_intermediate_size n_shared_experts: there has to be one.
  groups: true,
  shared: { min: 1, max: Infinity, default: 1 },
  denseLayers: 'first',
  // vLLM's class has a head of its own, whatever tie_word_embeddings says.
  tiesHead: false,
  weighting: (method, { shared }) =>
    method === 'split'
      ? { routedDown: 1, sharedDown: 1, normalized: false, scale: 2 }
      : // Half of the output from the shared copies, half from the chosen ones, whose weights sum to 1.
        { routedDown: 1, sharedDown: 1 / (2 * shared), normalized: true, scale: 0.5 },
  router: (layer) => `${layer}.mlp.gate`,
  bias: (layer) => `${layer}.mlp.gate.e_score_correction_bias`,
  expert: (layer, e) => network(`${layer}.mlp.experts.${e}`),
  sharedExpert: (layer) => network(`${layer}.mlp.shared_experts`),
  constants: () => [],
  config: (shape, { normalized, scale }, { dense, qkvBias, qkNorm }) => ({
    architectures: ['Glm4MoeForCausalLM'],
    model_type: 'glm4_moe',
    intermediate_size: shape.ffn,
    moe_intermediate_size: shape.width,
    n_routed_experts: shape.routed,
    n_shared_experts: shape.shared,
    num_experts_per_tok: shape.active,
    n_group: shape.limit?.groups ?? 1,
    topk_group: shape.limit?.topGroups ?? 1,
    norm_topk_prob: normalized,
    routed_scaling_factor: scale,
    first_k_dense_replace: dense.length,
    num_nextn_predict_layers: 0,
    attention_bias: qkvBias,
    use_qk_norm: qkNorm,
    // transformers 4 reads it here, transformers 5 and vLLM in rope_parameters; all default to 0.5.
    partial_rotary_factor: 1,
  }),
  refuse: ({ outBias, windows }) => {
    if (outBias) return 'it has no bias on self_attn.o_proj';
    if (windows.some((window) => window !== undefined)) return 'it has no sliding-window attention';
    return undefined;
  },
};

export const network = (name: string) => ({
  gate: `${name}.gate_proj`,
  up: `${name}.up_proj`,
  down: `${name}.down_proj`,
});
