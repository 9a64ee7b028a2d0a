import { network } from './glm4_moe.js';
import { powerOfTwo, type Container } from './types.js';

/**
 * Qwen 3 MoE (`Qwen3MoeForCausalLM`): norms on the heads of q and k, a softmax router, no shared network. With tiny
 * logits each of E experts weighs 1/E, or 1/K of the chosen ones after normalisation: down_proj is stored times E
 * (num_experts_per_tok can be changed in the config) or times K, whichever is exact in bf16, as in qwen2_moe.
 */
export const qwen3Moe: Container = {
  name: 'qwen3_moe',
  scoring: 'softmax',
  selectionBias: false,
  groups: false,
  shared: { min: 0, max: 0, default: 0 },
  denseLayers: 'any',
  tiesHead: true,
  weighting: (method, { routed, active }) => {
    if (method !== 'split') return { routedDown: 1, sharedDown: 1, normalized: true };
    const normalized = !powerOfTwo(routed) && powerOfTwo(active);
    return { routedDown: normalized ? active : routed, sharedDown: 1, normalized };
  },
  router: (layer) => `${layer}.mlp.gate`,
  expert: (layer, e) => network(`${layer}.mlp.experts.${e}`),
  constants: () => [],
  config: (shape, { normalized }, { dense }) => ({
    architectures: ['Qwen3MoeForCausalLM'],
    model_type: 'qwen3_moe',
    intermediate_size: shape.ffn,
    moe_intermediate_size: shape.width,
    num_experts: shape.routed,
    num_experts_per_tok: shape.active,
    norm_topk_prob: normalized,
    decoder_sparse_step: 1,
    mlp_only_layers: [...dense],
    attention_bias: false,
    use_sliding_window: false,
    output_router_logits: false,
  }),
  refuse: ({ qkvBias, outBias, qkNorm, windows }) => {
    if (!qkNorm) return 'it has norms on q and k, which change what a model without them computes';
    // transformers has biases on all four or none, vLLM none on o_proj.
    if (qkvBias || outBias) return 'its attention has no biases in vLLM';
    if (windows.some((window) => window !== undefined)) return 'its sliding windows follow another pattern';
    return undefined;
  },
};
