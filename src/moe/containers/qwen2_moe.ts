import { network } from './glm4_moe.js';
import { powerOfTwo, type Container } from './types.js';

/**
 * Qwen 1.5/2 MoE (`Qwen2MoeForCausalLM`): softmax router, one shared network behind a sigmoid gate. A zero gate halves
 * the shared network, so its down_proj is stored doubled; with tiny logits each of E routed experts weighs 1/E (or 1/K
 * of the chosen ones after normalisation), so theirs is stored times E (or K). Of the two the one that is exact in
 * bf16 is taken; E, where it can be, because then num_experts_per_tok can be changed in the config.
 */
export const qwen2Moe: Container = {
  name: 'qwen2_moe',
  scoring: 'softmax',
  selectionBias: false,
  groups: false,
  shared: { min: 1, max: Infinity, default: 1 },
  denseLayers: 'any',
  tiesHead: true,
  weighting: (method, { routed, active, shared }) => {
    if (method !== 'split') return { routedDown: 0.5, sharedDown: 1 / shared, normalized: true };
    const normalized = !powerOfTwo(routed) && powerOfTwo(active);
    return { routedDown: normalized ? active : routed, sharedDown: 2, normalized };
  },
  router: (layer) => `${layer}.mlp.gate`,
  expert: (layer, e) => network(`${layer}.mlp.experts.${e}`),
  sharedExpert: (layer) => network(`${layer}.mlp.shared_expert`),
  constants: (layer, { model, qkvBias }, converted) => [
    ...(converted ? [{ name: `${layer}.mlp.shared_expert_gate.weight`, shape: [1, model.hidden], value: 0 }] : []),
    ...(qkvBias ? [] : zeroBiases(layer, model)),
  ],
  config: (shape, { normalized }, { dense }) => ({
    architectures: ['Qwen2MoeForCausalLM'],
    model_type: 'qwen2_moe',
    intermediate_size: shape.ffn,
    moe_intermediate_size: shape.width,
    shared_expert_intermediate_size: shape.shared * shape.width,
    num_experts: shape.routed,
    num_experts_per_tok: shape.active,
    norm_topk_prob: normalized,
    decoder_sparse_step: 1,
    mlp_only_layers: [...dense],
    qkv_bias: true,
    use_sliding_window: false,
    output_router_logits: false,
  }),
  refuse: ({ outBias, qkNorm, windows }) => {
    if (outBias) return 'it has no bias on self_attn.o_proj';
    if (qkNorm) return 'it has no norms on q and k';
    if (windows.some((window) => window !== undefined)) return 'its sliding windows follow another pattern';
    return undefined;
  },
};

/** vLLM's class always has biases on q, k and v: without stored zeros they would be uninitialised memory. */
function zeroBiases(layer: string, { heads, kvHeads, headDim }: { heads: number; kvHeads: number; headDim: number }) {
  return [
    ['q', heads],
    ['k', kvHeads],
    ['v', kvHeads],
  ].map(([part, count]) => ({
    name: `${layer}.self_attn.${part}_proj.bias`,
    shape: [(count as number) * headDim],
    value: 0,
  }));
}
