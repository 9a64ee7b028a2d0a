import { describe, expect, it } from 'vitest';
import { stabilityNumbers } from '../../../src/validate/stability.js';

const bootstrap = { resamples: 200, seed: 1 };
const fresh = (seed: number): number[] => Array.from({ length: 1000 }, (_, t) => (t * t * 31 + t * seed * 7) % 8191);
/** Says something new until `from`, then five tokens again and again. */
const loops = (seed: number, from: number): number[] => fresh(seed).map((token, t) => (t < from ? token : t % 5));

describe('stability', () => {
  const reference = [1, 2, 3, 4].map(fresh);

  it('finds the quarter in which a model begins to loop', () => {
    const { quarters, collapsed, increase } = stabilityNumbers(reference, [1, 2, 3, 4].map((s) => loops(s, 500)), bootstrap); // prettier-ignore
    expect(quarters.reference.every((v) => v < 0.01)).toBe(true);
    expect(quarters.candidate[1]).toBeLessThan(0.01);
    // 247 4-grams, five of them different.
    expect(quarters.candidate[3]).toBeCloseTo(1 - 5 / 247, 5);
    expect(collapsed).toEqual({ reference: 0, candidate: 4 });
    expect(increase.interval.low).toBeGreaterThan(0.9);
  });

  it('one of four is no proof: the lower end of the interval stays at zero', () => {
    const { collapsed, increase } = stabilityNumbers(reference, [loops(1, 500), ...reference.slice(1)], bootstrap);
    expect(collapsed.candidate).toBe(1);
    expect(increase.value).toBeCloseTo((1 - 5 / 247) / 4, 2);
    expect(increase.interval.low).toBe(0);
  });

  it('survives responses that are too short for 4-grams', () => {
    const { quarters } = stabilityNumbers([[1, 2]], [[3]], bootstrap);
    expect([...quarters.reference, ...quarters.candidate]).toEqual(Array(8).fill(0));
  });
});
