import { selfAttention } from '../nn/attention.js';
import { linearSpec } from '../nn/layer.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { NormSpec } from '../nn/norm.js';
import type { RopeSpec } from '../nn/rope.js';
import { limits, type Config } from './config.js';
import type { Sizes } from './sizes.js';
import type { AttentionLayer } from './types.js';

/** The feed-forward activation by the names that configs use. */
export function readActivation(c: Config): FfnSpec['activation'] {
  const names = {
    silu: 'silu',
    swish: 'silu',
    gelu: 'gelu',
    gelu_pytorch_tanh: 'gelu_tanh',
    gelu_new: 'gelu_tanh',
    gelu_fast: 'gelu_tanh',
  } as const;
  return names[c.choice('hidden_act', Object.keys(names) as (keyof typeof names)[], 'silu')];
}

export const normSpec = (name: string, width: number, eps: number): NormSpec => ({ name, width, eps });

/** A gated feed-forward network of separate gate, up and down projections. */
export function ffnSpec(
  name: string,
  sizes: { hidden: number; width: number },
  activation: FfnSpec['activation'],
  role: 'mlp' | 'expert' | 'shared-expert' = 'mlp',
  { names = ['gate_proj', 'up_proj', 'down_proj'], bias = false }: { names?: string[]; bias?: boolean } = {},
): FfnSpec {
  const [gate, up, down] = names as [string, string, string];
  const { hidden, width } = sizes;
  return {
    gate: linearSpec(`${name}.${gate}`, hidden, width, role, bias),
    up: linearSpec(`${name}.${up}`, hidden, width, role, bias),
    down: linearSpec(`${name}.${down}`, width, hidden, role, bias),
    activation,
  };
}

export interface GroupedAttentionOptions {
  readonly rope: RopeSpec;
  readonly qkvBias?: boolean;
  readonly outBias?: boolean;
  readonly window?: number | undefined;
  /** Norms of q and k: of each head, or of all heads together. */
  readonly norm?: 'head' | 'all';
  readonly clip?: number | undefined;
}

/** Attention of layer `i` under `self_attn`, with the names that nearly all architectures use. */
export function groupedAttention(i: number, layer: string, sizes: Sizes, o: GroupedAttentionOptions): AttentionLayer {
  const { hidden, heads, kvHeads, headDim, eps, attentionCap } = sizes;
  const name = `${layer}.self_attn`;
  const of = (part: string, count: number) =>
    linearSpec(`${name}.${part}`, hidden, count * headDim, 'attention', o.qkvBias);
  const norm = (part: string, count: number) =>
    o.norm && normSpec(`${name}.${part}`, o.norm === 'head' ? headDim : count * headDim, eps);
  return selfAttention({
    layer: i,
    q: of('q_proj', heads),
    k: of('k_proj', kvHeads),
    v: of('v_proj', kvHeads),
    o: linearSpec(`${name}.o_proj`, heads * headDim, hidden, 'attention', o.outBias),
    heads,
    kvHeads,
    headDim,
    rope: o.rope,
    window: o.window,
    qNorm: norm('q_norm', heads),
    kNorm: norm('k_norm', kvHeads),
    clip: o.clip,
    cap: attentionCap,
  });
}

/** Networks of experts 0 .. count-1 under `name`. */
export const expertSpecs = (
  name: string,
  count: number,
  sizes: { hidden: number; width: number },
  activation: FfnSpec['activation'],
  names?: string[],
): FfnSpec[] =>
  Array.from({ length: count }, (_, e) => ffnSpec(`${name}.${e}`, sizes, activation, 'expert', names ? { names } : {}));

/** Number of experts (by any of its names) and how many a token takes. */
export function readExperts(
  c: Config,
  layers: number,
  ...keys: [string, ...string[]]
): { experts: number; active: number } {
  const key = c.oneOf(...keys);
  const experts = c.int(key, { max: Math.min(limits.experts, limits.allExperts / layers) });
  return { experts, active: c.int('num_experts_per_tok', { max: experts }) };
}

/** Qwen's sliding windows by layer: `layer_types`, or `use_sliding_window` from layer `max_window_layers` on. */
export function readWindows(
  c: Config,
  layers: number,
  sliding: (i: number, from: number) => boolean,
): (number | undefined)[] {
  const use = c.bool('use_sliding_window', false);
  const window = c.optionalInt('sliding_window', { min: 0 });
  const from = c.int('max_window_layers', { min: 0, default: 28 });
  const types = c.words('layer_types', ['full_attention', 'sliding_attention'], layers);
  return Array.from({ length: layers }, (_, i) => {
    const slides = types ? types[i] === 'sliding_attention' : sliding(i, from);
    return use && window && slides ? window : undefined;
  });
}
