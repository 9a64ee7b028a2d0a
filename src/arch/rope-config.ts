import type { RopeScaling, RopeSpec } from '../nn/rope.js';
import type { Config } from './config.js';

export interface RopeDefaults {
  /** Channels of a head that `partial_rotary_factor` is a part of. */
  headDim: number;
  theta?: number;
  /** Default of partial_rotary_factor; absent: the architecture turns whole heads and the factor must be 1. */
  partial?: number;
  interleaved?: boolean;
  fromEnd?: boolean;
}

export interface RopeConfig {
  readonly rope: RopeSpec;
  /** YaRN's scaling factor and mscale_all_dim, which DeepSeek's attention scale needs. */
  readonly factor: number | undefined;
  readonly mscaleAllDim: number | undefined;
}

/**
 * Rope parameters as transformers 5 (`rope_parameters`) and 4 (`rope_theta`, `rope_scaling`) write them. Where both
 * stand, rope_scaling wins, as in transformers.
 */
export function readRope(c: Config, d: RopeDefaults): RopeConfig {
  const context = c.int('max_position_embeddings');
  const modern = c.object('rope_parameters');
  const p = c.object('rope_scaling') ?? modern;
  const within = <T>(read: (from: Config) => T | undefined): T | undefined => {
    const inner = p ? read(p) : undefined;
    const outer = read(c);
    return inner ?? outer;
  };
  const theta = within((from) => from.optionalFloat('rope_theta', { min: 1, max: 1e15 }));
  const partial = within((from) => from.optionalFloat('partial_rotary_factor', { max: 1 }));
  if (d.partial === undefined && partial !== undefined && partial !== 1) {
    throw c.wrong('partial_rotary_factor', '1 (this architecture turns whole heads)');
  }
  const dim = Math.trunc(d.headDim * (partial ?? d.partial ?? 1));
  if (dim < 2 || dim % 2 !== 0) throw c.wrong('partial_rotary_factor', `an even number of turned channels, not ${dim}`);

  const read = p ? readScaling(p, c, dim, context) : { scaling: { type: 'default' as const } };
  p?.finish();
  return {
    rope: {
      dim,
      theta: theta ?? d.theta ?? 10_000,
      interleaved: d.interleaved ?? false,
      fromEnd: d.fromEnd ?? false,
      scaling: read.scaling,
    },
    factor: read.factor,
    mscaleAllDim: read.mscaleAllDim,
  };
}

const types = ['default', 'linear', 'dynamic', 'llama3', 'yarn', 'longrope', 'su'] as const;

interface Scaling {
  scaling: RopeScaling;
  factor?: number | undefined;
  mscaleAllDim?: number | undefined;
}

function readScaling(p: Config, c: Config, dim: number, context: number): Scaling {
  const type = p.choice(p.oneOf('rope_type', 'type'), types, 'default');
  const positive = { min: 1e-6, max: 1e6 };
  const optional = (key: string, min = -1e6) => p.optionalFloat(key, { min, max: 1e6 });
  // Phi-style configs keep it outside; there it has priority.
  const outside = c.optionalInt('original_max_position_embeddings');
  const original = () => {
    const inside = p.int('original_max_position_embeddings', { default: context });
    return outside ?? inside;
  };
  switch (type) {
    case 'default':
      p.understood('factor', 'original_max_position_embeddings');
      return { scaling: { type } };
    case 'linear': {
      const factor = p.float('factor', positive);
      return { scaling: { type, factor }, factor };
    }
    case 'dynamic': {
      const factor = p.float('factor', positive);
      p.understood('original_max_position_embeddings');
      return { scaling: { type, factor, context }, factor };
    }
    case 'llama3': {
      const factor = p.float('factor', positive);
      const lowFrequency = p.float('low_freq_factor', positive);
      const highFrequency = p.float('high_freq_factor', positive);
      if (highFrequency <= lowFrequency)
        throw p.wrong('high_freq_factor', `more than low_freq_factor (${lowFrequency})`);
      return { scaling: { type, factor, lowFrequency, highFrequency, original: original() }, factor };
    }
    case 'yarn': {
      const trained = original();
      const factor = p.float('factor', { ...positive, default: context / trained });
      const mscale = optional('mscale');
      const mscaleAllDim = optional('mscale_all_dim');
      const inferred =
        mscale && mscaleAllDim ? yarnScale(factor, mscale) / yarnScale(factor, mscaleAllDim) : yarnScale(factor);
      const scaling = {
        type,
        factor,
        betaFast: optional('beta_fast') || 32,
        betaSlow: optional('beta_slow') || 1,
        original: trained,
        truncate: p.bool('truncate', true),
        attentionFactor: optional('attention_factor', 0) ?? inferred,
      };
      return { scaling, factor, mscaleAllDim };
    }
    case 'longrope':
    case 'su': {
      const trained = original();
      const factor = p.float('factor', { ...positive, default: context / trained });
      const inferred = factor <= 1 ? 1 : Math.sqrt(1 + Math.log(factor) / Math.log(trained));
      const scaling = {
        type: 'longrope' as const,
        short: divisors(p, 'short_factor', dim / 2),
        long: divisors(p, 'long_factor', dim / 2),
        original: trained,
        attentionFactor: optional('attention_factor', 0) ?? inferred,
      };
      return { scaling, factor };
    }
  }
}

function divisors(p: Config, key: string, count: number): number[] {
  const values = p.floats(key, count);
  if (values.some((v) => v <= 0)) throw p.wrong(key, 'positive numbers');
  return values;
}

/** YaRN's attention temperature (Peng et al. 2023, eq. 22). */
export const yarnScale = (factor: number, mscale = 1): number =>
  factor <= 1 ? 1 : 0.1 * mscale * Math.log(factor) + 1;
