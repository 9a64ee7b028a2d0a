/**
 * Config keys that transformers declares as float. It refuses an integer there ("expected float, got int"), and a
 * JavaScript number forgets that 1.0 was written as 1.0.
 */
const floatKeys = new Set([
  'attention_dropout', 'attention_multiplier', 'attn_logit_softcapping', 'attn_pdrop', 'attn_scale', 'beta_fast',
  'beta_slow', 'classifier_dropout', 'clip_qkv', 'compress_rope_theta', 'dropout', 'embd_pdrop', 'embedding_dropout',
  'embedding_multiplier', 'factor', 'final_logit_softcapping', 'full_attn_alpha_factor', 'full_attn_beta_factor',
  'hc_eps', 'hidden_dropout', 'high_freq_factor', 'init_std', 'initializer_range', 'layer_norm_eps',
  'layer_norm_epsilon', 'layerdrop', 'linear_attn_alpha_factor', 'linear_attn_beta_factor', 'logit_scale',
  'logits_scaling', 'long_factor', 'low_freq_factor', 'mlp_alpha_factor', 'mlp_beta_factor', 'moe_norm_min', 'mscale',
  'mscale_all_dim', 'norm_epsilon', 'partial_rotary_factor', 'resid_pdrop', 'residual_dropout', 'residual_multiplier',
  'rms_norm_eps', 'rope_theta', 'routed_scaling_factor', 'router_aux_loss_coef', 'router_jitter_noise',
  'short_factor', 'summary_first_dropout', 'swiglu_limit',
]); // prettier-ignore

/** config.json as Python writes it: indented by 2, floats with a point, NaN and Infinity spelled out. */
export function formatConfig(config: Readonly<Record<string, unknown>>): string {
  return `${format(config, '', false)}\n`;
}

function format(value: unknown, indent: string, float: boolean): string {
  if (typeof value === 'number') {
    if (!Number.isFinite(value)) return Number.isNaN(value) ? 'NaN' : value > 0 ? 'Infinity' : '-Infinity';
    return float && Number.isInteger(value) && Math.abs(value) < 1e16 ? value.toFixed(1) : String(value);
  }
  if (value === null || typeof value !== 'object') return JSON.stringify(value) ?? 'null';
  const inner = `${indent}  `;
  const [open, close] = Array.isArray(value) ? '[]' : '{}';
  const lines = Array.isArray(value)
    ? value.map((item) => format(item, inner, float))
    : Object.entries(value)
        .filter(([, item]) => item !== undefined)
        .map(([key, item]) => `${JSON.stringify(key)}: ${format(item, inner, floatKeys.has(key))}`);
  if (lines.length === 0) return `${open}${close}`;
  return `${open}\n${lines.map((line) => inner + line).join(',\n')}\n${indent}${close}`;
}
