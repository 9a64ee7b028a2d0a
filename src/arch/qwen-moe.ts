import { linearSpec } from '../nn/layer.js';
import { gatedMlp } from '../nn/mlp.js';
import { moeLayer } from '../nn/moe.js';
import { limits, type Config } from './config.js';
import { decoder } from './decoder.js';
import { expertSpecs, ffnSpec, groupedAttention, readActivation, readExperts, readWindows } from './parts.js';
import { readRope } from './rope-config.js';
import { readSizes, type Sizes } from './sizes.js';
import type { Model } from './types.js';

/** Qwen 1.5/2 MoE: routed experts beside one shared network behind a sigmoid gate. */
export function qwen2Moe(c: Config): Model {
  const sizes = readSizes(c);
  const windows = readWindows(c, sizes.layers, (i, from) => (i + 1) % 2 === 1 && i < from);
  const shared = c.int('shared_expert_intermediate_size', { max: limits.width, default: 5632 });
  const qkvBias = c.bool('qkv_bias', true);
  return qwenMoe(c, sizes, { windows, shared, attention: { qkvBias } });
}

/** Qwen 3 MoE: no shared network, norms on the heads of q and k. */
export function qwen3Moe(c: Config): Model {
  const sizes = readSizes(c);
  const bias = c.bool('attention_bias', false);
  const window = c.bool('use_sliding_window', false) ? c.optionalInt('sliding_window') : undefined;
  c.understood('sliding_window', 'max_window_layers');
  const windows = Array.from({ length: sizes.layers }, () => window);
  return qwenMoe(c, sizes, { windows, attention: { qkvBias: bias, outBias: bias, norm: 'head' } });
}

interface Variant {
  readonly windows: readonly (number | undefined)[];
  /** Width of the shared network; absent: none. */
  readonly shared?: number;
  readonly attention: { readonly qkvBias: boolean; readonly outBias?: boolean; readonly norm?: 'head' };
}

function qwenMoe(c: Config, sizes: Sizes, v: Variant): Model {
  const { hidden, layers } = sizes;
  const { rope } = readRope(c, { headDim: sizes.headDim });
  const activation = readActivation(c);
  const { experts, active } = readExperts(c, layers, 'num_experts', 'num_local_experts');
  const width = c.int('moe_intermediate_size', { max: limits.width });
  const normalize = c.bool('norm_topk_prob', false);
  const step = c.int('decoder_sparse_step', { default: 1 });
  const dense = new Set(c.ids('mlp_only_layers'));
  const isDense = (i: number) => dense.has(i) || (i + 1) % step !== 0;
  const anyDense = Array.from({ length: layers }, (_, i) => i).some(isDense);
  const denseWidth = anyDense ? c.int('intermediate_size', { max: limits.width }) : 0;
  c.understood('intermediate_size');
  return decoder(c, sizes, rope, (i, name) => {
    const mlp = `${name}.mlp`;
    const window = v.windows[i];
    const attention = groupedAttention(i, name, sizes, { rope, window, ...v.attention });
    if (isDense(i))
      return { attention, window, mlp: gatedMlp(ffnSpec(mlp, { hidden, width: denseWidth }, activation)) };
    return {
      attention,
      window,
      mlp: moeLayer({
        layer: i,
        router: linearSpec(`${mlp}.gate`, hidden, experts, 'router'),
        route: { topK: active, scoring: 'softmax', normalize },
        experts: expertSpecs(`${mlp}.experts`, experts, { hidden, width }, activation),
        ...(v.shared && {
          shared: ffnSpec(`${mlp}.shared_expert`, { hidden, width: v.shared }, activation, 'shared-expert'),
          sharedGate: linearSpec(`${mlp}.shared_expert_gate`, hidden, 1, 'router'),
        }),
      }),
    };
  });
}
