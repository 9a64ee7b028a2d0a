import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/base/rng.js';
import { mean, pairedBootstrap, quantile } from '../../../src/validate/stats.js';

describe('statistics', () => {
  it('interpolates quantiles as numpy does', () => {
    // np.quantile([1, 2, 4, 8, 16], [0, .1, .5, .99, 1])
    const sorted = [1, 2, 4, 8, 16];
    expect([0, 0.1, 0.5, 0.99, 1].map((q) => quantile(sorted, q))).toEqual([1, 1.4, 4, 15.68, 16]);
    expect(quantile([], 0.5)).toBeNaN();
  });

  it('gives intervals of the width that theory says, and covers the truth', () => {
    const random = new Random(5);
    let covered = 0;
    for (let trial = 0; trial < 40; trial++) {
      const values = Array.from({ length: 60 }, () => random.uniform());
      const of = (draw: Int32Array): number[] => [mean(Array.from(draw, (i) => values[i]!))];
      const [interval] = pairedBootstrap(60, of, { resamples: 300, seed: trial });
      expect(interval!.high - interval!.low).toBeGreaterThan(0.09); // 2 x 1.96 x sqrt(1/12/60) = 0.146
      expect(interval!.high - interval!.low).toBeLessThan(0.22);
      if (interval!.low <= 0.5 && interval!.high >= 0.5) covered++;
    }
    expect(covered).toBeGreaterThanOrEqual(34);
  });

  it('gives the same interval for the same seed only, and moves to the measured value', () => {
    const values = [3, 1, 4, 1, 5, 9, 2, 6];
    const unique = (draw: Int32Array): number[] => [new Set(Array.from(draw, (i) => values[i]!)).size];
    const run = (seed: number, measured?: number[]) =>
      pairedBootstrap(8, unique, { resamples: 300, seed }, measured)[0]!;
    expect(run(1)).toEqual(run(1));
    expect(run(1).high).toBeLessThan(7); // drawing with repetition loses values
    const moved = run(1, [7]);
    expect(moved.low).toBeLessThan(7);
    expect(moved.high).toBeGreaterThan(7);
  });
});
