import { Random } from '../base/rng.js';
import type { Interval } from './report.js';

export const sum = (values: Iterable<number>): number => {
  let total = 0;
  for (const value of values) total += value;
  return total;
};

export const mean = (values: ArrayLike<number> & Iterable<number>): number => sum(values) / values.length;

/** Quantile of ascending values by linear interpolation (numpy's and torch's default). */
export function quantile(sorted: ArrayLike<number>, q: number): number {
  if (sorted.length === 0) return Number.NaN;
  const at = (sorted.length - 1) * q;
  const low = Math.floor(at);
  const [a, b] = [sorted[low]!, sorted[Math.min(low + 1, sorted.length - 1)]!];
  return a + (b - a) * (at - low);
}

export const median = (values: Iterable<number>): number => quantile(Float64Array.from(values).sort(), 0.5);

/**
 * 95% percentile intervals of statistics over units that are drawn together (Efron & Tibshirani 1993, ch. 13): a unit
 * is a window or a prompt with the values of both models, so what is hard for both cancels.
 * @param units number of units
 * @param statistic draw (units' indices, with repetition) -> one number for each statistic
 * @param measured where given, the interval is moved so that the draws' mean meets it: for statistics that repetition
 *   itself shifts (counts of unique things)
 */
export function pairedBootstrap(
  units: number,
  statistic: (draw: Int32Array) => readonly number[],
  { resamples, seed }: { readonly resamples: number; readonly seed: number },
  measured: readonly (number | undefined)[] = [],
): Interval[] {
  const random = new Random(seed);
  const draw = new Int32Array(units);
  const values: Float64Array[] = [];
  for (let r = 0; r < resamples; r++) {
    for (let i = 0; i < units; i++) draw[i] = random.below(units);
    statistic(draw).forEach((value, s) => ((values[s] ??= new Float64Array(resamples))[r] = value));
  }
  return values.map((v, s) => {
    v.sort();
    const shift = measured[s] === undefined ? 0 : measured[s] - mean(v);
    return { low: quantile(v, 0.025) + shift, high: quantile(v, 0.975) + shift };
  });
}

/** Six significant digits: more than float32 sums hold, and reports stay small. */
export const round = (value: number): number => (Number.isFinite(value) ? Number(value.toPrecision(6)) : value);
