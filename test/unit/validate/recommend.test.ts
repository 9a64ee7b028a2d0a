import { describe, expect, it } from 'vitest';
import { duels, recommend } from '../../../src/validate/compare.js';
import type { ValidateReport } from '../../../src/validate/report.js';
import { syntheticReport } from './synthetic.js';

const base = syntheticReport({ layers: 2, heads: 2 });
const bootstrap = { resamples: 400, seed: 1 };

/** A candidate whose windows diverge by what `kl` says. */
function candidate(path: string, storedBytes: number, kl: (window: number) => number, passed = true): ValidateReport {
  const windows = base.logits.windows.map((window, i) => ({ ...window, kl: kl(i) }));
  return { ...base, passed, candidate: { ...base.candidate, path, storedBytes }, logits: { ...base.logits, windows } };
}
const noise = (i: number): number => 0.004 * Math.sin(i * 7.3);
const shared = (i: number): number => 0.05 + 0.04 * Math.sin(i); // what is hard is hard for all

describe('compare', () => {
  it('finds a small difference that all windows share, and none in noise', () => {
    const [a, b, c] = [shared, (i: number) => shared(i) + 0.003, (i: number) => shared(i) + noise(i)];
    const pairs = duels([candidate('a', 1, a), candidate('b', 1, b), candidate('c', 1, c)], bootstrap);
    expect(pairs.map(({ first, second }) => [first, second])).toEqual([[0, 1], [0, 2], [1, 2]]); // prettier-ignore
    expect(pairs[0]).toMatchObject({ better: 0 });
    expect(pairs[0]!.kl.difference).toBeCloseTo(-0.003, 6);
    expect(pairs[0]!.kl.interval.high).toBeLessThan(0);
    expect(pairs[1]!.better).toBeNull();
    expect(pairs[1]!.kl.interval.low).toBeLessThan(0);
    expect(pairs[1]!.kl.interval.high).toBeGreaterThan(0);
  });

  it('weighs windows by their tokens', () => {
    const [a, b] = [candidate('a', 1, () => 0), candidate('b', 1, (i) => (i === 0 ? 1 : 0))];
    const long = (r: ValidateReport): ValidateReport => ({
      ...r,
      logits: { ...r.logits, windows: r.logits.windows.map((w, i) => ({ ...w, tokens: i === 0 ? 300 : 100 })) },
    });
    const [pair] = duels([long(a), long(b)], bootstrap);
    expect(pair!.kl.difference).toBeCloseTo(-300 / (300 + 31 * 100), 5);
  });

  it.each([
    ['the smallest that passes', [100, 60, 40], [true, true, false], [0, 0, 0], 1],
    ['of equal size the better', [60, 60, 100], [true, true, true], [0.01, 0, 0], 1],
    ['not the better one that is larger', [60, 70, 100], [true, true, true], [0.01, 0, 0], 0],
    ['within 2% counts as equal', [100, 101, 300], [true, true, true], [0.01, 0, 0], 1],
    ['none', [1, 2, 3], [false, false, false], [0, 0, 0], null],
  ] as const)('recommends %s', (_, sizes, passed, extra, expected) => {
    const reports = sizes.map((size, i) => candidate(String(i), size, (w) => shared(w) + extra[i]!, passed[i]));
    expect(recommend(reports, duels(reports, bootstrap)).candidate).toBe(expected);
  });

  it('refuses reports of other windows', () => {
    const short = { ...base, logits: { ...base.logits, windows: base.logits.windows.slice(1) } };
    expect(() => duels([base, short], bootstrap)).toThrow(RangeError);
  });
});
