import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { compareDiversity, distinct, measureDiversity, selfBleu } from '../../../src/validate/diversity.js';

interface Case {
  vocabulary: number;
  responses: number[][];
  perResponse: number[];
  corpus: number[];
  ead: number;
  repetition: number[];
  selfBleu: number;
}
const path = new URL('../../../fixtures/validate/diversity.json', import.meta.url);
const cases = JSON.parse(readFileSync(path, 'utf8')) as Record<string, Case>;

describe('diversity', () => {
  it.each(Object.entries(cases))('equals numpy and nltk on %s', (_, c) => {
    const got = measureDiversity(c.responses, c.vocabulary);
    const flat = [...got.distinct.perResponse, ...got.distinct.corpus, got.ead, ...got.repetition, got.selfBleu];
    const expected = [...c.perResponse, ...c.corpus, c.ead, ...c.repetition, c.selfBleu];
    expect(flat).toHaveLength(expected.length);
    flat.forEach((value, i) => expect(value).toBeCloseTo(expected[i]!, 5));
  });

  it('counts n-grams of token ids, not of their spelling', () => {
    expect(distinct([1, 23, 12, 3], 2)).toBe(1); // "1,23" and "12,3" are different pairs
    expect(distinct([5, 5, 5, 5], 2)).toBeCloseTo(1 / 3);
  });

  it('reports empty responses and survives nothing but them', () => {
    const got = measureDiversity([[], []], 100);
    expect(got).toMatchObject({ empty: 2, ead: 0, selfBleu: 0, meanLength: 0 });
    expect(selfBleu([[1, 2, 3, 4]])).toEqual([]);
  });

  it('finds no difference of a model to itself', () => {
    const { responses } = cases.mixed!;
    const same = compareDiversity(responses, responses, 50, { resamples: 200, seed: 1 });
    for (const row of same.differences) expect(row).toMatchObject({ difference: 0, interval: { low: 0, high: 0 } });
    expect(same.distinctRatio).toEqual({ value: 1, interval: { low: 1, high: 1 } });
  });

  it('finds loops, with intervals that contain the measured difference', () => {
    const random = (i: number): number[] => Array.from({ length: 40 }, (_, t) => (t * t * 7 + i * 13 + t * 5) % 997);
    const reference = Array.from({ length: 12 }, (_, i) => random(i));
    const looping = reference.map((r) => Array.from({ length: 40 }, (_, t) => r[t % 5]!));
    const found = compareDiversity(reference, looping, 1000, { resamples: 400, seed: 1 });
    const rep = found.differences.find(({ metric }) => metric === 'rep-4')!;
    expect(rep.interval.low).toBeGreaterThan(0.5);
    expect(found.distinctRatio.interval.high).toBeLessThan(0.3);
    for (const { difference, interval } of found.differences) {
      expect(difference).toBeGreaterThanOrEqual(interval.low - 1e-6);
      expect(difference).toBeLessThanOrEqual(interval.high + 1e-6);
    }
  });
});
