import type { Scope, Tensor } from '../tensor/tensor.js';

/**
 * Rotary position embedding (Su et al. 2021) with its extensions to longer contexts. Frequencies are computed as
 * transformers computes them (modeling_rope_utils.py), in fp32 where it uses fp32.
 */
export interface RopeSpec {
  /** Channels of a head that turn (even). */
  readonly dim: number;
  readonly theta: number;
  /** Pairs (2i, 2i+1) instead of halves (i, i + dim/2). */
  readonly interleaved: boolean;
  /** The last `dim` channels turn instead of the first. */
  readonly fromEnd: boolean;
  readonly scaling: RopeScaling;
}

export type RopeScaling =
  | { readonly type: 'default' }
  | { readonly type: 'linear'; readonly factor: number }
  /** NTK-aware, by sequence length (emozilla 2023). `context`: max_position_embeddings. */
  | { readonly type: 'dynamic'; readonly factor: number; readonly context: number }
  | {
      readonly type: 'llama3';
      readonly factor: number;
      readonly lowFrequency: number;
      readonly highFrequency: number;
      readonly original: number;
    }
  /** Peng et al. 2023. */
  | {
      readonly type: 'yarn';
      readonly factor: number;
      readonly betaFast: number;
      readonly betaSlow: number;
      readonly original: number;
      readonly truncate: boolean;
      /** Multiplies cos and sin. */
      readonly attentionFactor: number;
    }
  /** Ding et al. 2024: one divisor a channel pair, another set beyond the original context. */
  | {
      readonly type: 'longrope';
      readonly short: readonly number[];
      readonly long: readonly number[];
      readonly original: number;
      readonly attentionFactor: number;
    };

/** Inverse frequencies [dim/2] for sequences of `length` tokens. */
export function inverseFrequencies(rope: RopeSpec, length: number): Float32Array {
  const { dim, scaling } = rope;
  let theta = rope.theta;
  if (scaling.type === 'dynamic') {
    const stretch = (scaling.factor * Math.max(length, scaling.context)) / scaling.context - (scaling.factor - 1);
    theta *= stretch ** (dim / (dim - 2));
  }
  const powers = Float32Array.from({ length: dim / 2 }, (_, i) => theta ** Math.fround((2 * i) / dim));
  const plain = powers.map((power) => 1 / power);
  switch (scaling.type) {
    case 'default':
    case 'dynamic':
      return plain;
    case 'linear':
      return plain.map((f) => f / scaling.factor);
    case 'llama3': {
      const { factor, lowFrequency, highFrequency, original } = scaling;
      return plain.map((f) => {
        const wavelength = (2 * Math.PI) / f;
        if (wavelength < original / highFrequency) return f;
        if (wavelength > original / lowFrequency) return f / factor;
        const smooth = (original / wavelength - lowFrequency) / (highFrequency - lowFrequency);
        return ((1 - smooth) * f) / factor + smooth * f;
      });
    }
    case 'yarn': {
      const { factor, betaFast, betaSlow, original } = scaling;
      const at = (turns: number) => (dim * Math.log(original / (turns * 2 * Math.PI))) / (2 * Math.log(theta));
      const [from, to] = [at(betaFast), at(betaSlow)];
      const low = Math.max(scaling.truncate ? Math.floor(from) : from, 0);
      let high = Math.min(scaling.truncate ? Math.ceil(to) : to, dim - 1);
      if (high === low) high += 0.001;
      return plain.map((f, i) => {
        const ramp = Math.min(Math.max((i - low) / (high - low), 0), 1);
        return (f / factor) * ramp + f * (1 - ramp);
      });
    }
    case 'longrope': {
      const divisors = length > scaling.original ? scaling.long : scaling.short;
      return powers.map((power, i) => 1 / (divisors[i]! * power));
    }
  }
}

/** What cos and sin are multiplied by. */
export const ropeAmplitude = ({ scaling }: RopeSpec): number =>
  scaling.type === 'yarn' || scaling.type === 'longrope' ? scaling.attentionFactor : 1;

/** Frequencies that hold for a length hold for all lengths of the same variant. */
function variant({ scaling }: RopeSpec, length: number): number {
  if (scaling.type === 'dynamic') return Math.max(length, scaling.context);
  if (scaling.type === 'longrope') return length > scaling.original ? 1 : 0;
  return 0;
}

interface HostTable {
  readonly rows: number;
  readonly cos: Float32Array;
  readonly sin: Float32Array;
}

/** Sines are slow to make and the same for every block and batch: the last few variants of a rope are kept. */
const hostTables = new WeakMap<RopeSpec, Map<number, HostTable>>();
const keptVariants = 4;

/** cos and sin f32 [rows, dim/2], row = position; at least `length` rows. */
export function ropeTable(rope: RopeSpec, length: number): HostTable {
  let tables = hostTables.get(rope);
  if (!tables) {
    tables = new Map<number, HostTable>();
    hostTables.set(rope, tables);
  }
  const key = variant(rope, length);
  const known = tables.get(key);
  if (known && known.rows >= length) return known;

  const inverse = inverseFrequencies(rope, length);
  const amplitude = ropeAmplitude(rope);
  const half = rope.dim / 2;
  const rows = Math.max(64, 2 ** Math.ceil(Math.log2(length)));
  const cos = new Float32Array(rows * half);
  const sin = new Float32Array(rows * half);
  for (let p = 0, at = 0; p < rows; p++) {
    for (let i = 0; i < half; i++, at++) {
      const angle = Math.fround(inverse[i]! * p);
      cos[at] = Math.fround(Math.cos(angle)) * amplitude;
      sin[at] = Math.fround(Math.sin(angle)) * amplitude;
    }
  }
  const table = { rows, cos, sin };
  tables.delete(key);
  tables.set(key, table);
  if (tables.size > keptVariants) tables.delete(tables.keys().next().value!);
  return table;
}

/** Tables on a device, for as long as `scope` lives: one set for all batches that run through a block. */
export class RopeTables {
  readonly #scope: Scope;
  readonly #tables = new Map<HostTable, { cos: Tensor; sin: Tensor }>();

  constructor(scope: Scope) {
    this.#scope = scope;
  }

  /** cos and sin f32 [>= length, dim/2] for sequences that end at position length - 1. */
  get(rope: RopeSpec, length: number): { cos: Tensor; sin: Tensor } {
    const host = ropeTable(rope, length);
    let tables = this.#tables.get(host);
    if (!tables) {
      const shape = [host.rows, rope.dim / 2];
      tables = { cos: this.#scope.from('f32', shape, host.cos), sin: this.#scope.from('f32', shape, host.sin) };
      this.#tables.set(host, tables);
    }
    return tables;
  }
}
