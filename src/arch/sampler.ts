import { Random } from '../base/rng.js';

export interface SamplingOptions {
  /** Always the most probable token. */
  readonly greedy?: boolean;
  /** Divides the logits; default 1. */
  readonly temperature?: number;
  /** Only the smallest set of tokens whose probabilities sum to at least this; default 1 (Holtzman et al. 2020). */
  readonly topP?: number;
  /** Only the k most probable tokens; 0: all. */
  readonly topK?: number;
  readonly seed?: number;
}

export interface Drawn {
  readonly token: number;
  /** Natural log-probability under the model itself, before temperature and truncation. */
  readonly logprob: number;
}

/** Draws tokens for one sequence; the same seed and stream give the same draws. */
export class Sampler {
  readonly #random: Random;
  readonly #options: SamplingOptions;

  constructor(options: SamplingOptions, stream: number) {
    this.#options = options;
    this.#random = new Random(options.seed ?? 0, stream);
  }

  /** `logits` [V]. Ties go to the lower id. */
  draw(logits: Float32Array): Drawn {
    let best = 0;
    for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[best]!) best = i;
    const max = logits[best]!;
    let sum = 0;
    for (let i = 0; i < logits.length; i++) sum += Math.exp(logits[i]! - max);
    const token = this.#options.greedy ? best : this.#sample(logits, max);
    return { token, logprob: logits[token]! - max - Math.log(sum) };
  }

  #sample(logits: Float32Array, max: number): number {
    const { temperature = 1, topP = 1, topK = 0 } = this.#options;
    const u = this.#random.uniform();
    const weight = (i: number) => Math.exp((logits[i]! - max) / temperature);
    if (topP >= 1 && topK === 0) {
      let total = 0;
      for (let i = 0; i < logits.length; i++) total += weight(i);
      let left = u * total;
      for (let i = 0; i < logits.length; i++) {
        left -= weight(i);
        if (left < 0) return i;
      }
      return logits.length - 1;
    }
    // Sorting a whole vocabulary is slow: tokens far below the best cannot matter and are left out first.
    const floor = max - 60 * temperature;
    const candidates: number[] = [];
    for (let i = 0; i < logits.length; i++) if (logits[i]! >= floor) candidates.push(i);
    candidates.sort((a, b) => logits[b]! - logits[a]! || a - b);
    if (topK > 0 && candidates.length > topK) candidates.length = topK;
    const weights = candidates.map(weight);
    let total = weights.reduce((a, b) => a + b, 0);
    if (topP < 1) {
      let kept = 0;
      let count = 0;
      while (count < weights.length && kept < topP * total) kept += weights[count++]!;
      candidates.length = Math.max(1, count);
      total = Math.max(kept, weights[0]!);
    }
    let left = u * total;
    for (let i = 0; i < candidates.length; i++) {
      left -= weights[i]!;
      if (left < 0) return candidates[i]!;
    }
    return candidates.at(-1)!;
  }
}
