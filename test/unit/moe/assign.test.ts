import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { assignBalanced } from '../../../src/moe/assign.js';
import { fixture } from '../../arch/support.js';

interface Case {
  readonly scores: number[];
  readonly capacities: number[];
  readonly best: number;
}
const { assignments } = JSON.parse(readFileSync(fixture('moe/expected.json'), 'utf8')) as { assignments: Case[] };

const countsOf = (places: Int32Array, n: number): number[] =>
  Array.from({ length: n }, (_, e) => places.filter((place) => place === e).length);

describe('balanced assignment', () => {
  it.each(assignments)('reaches the best total of the network simplex, $best', ({ scores, capacities, best }) => {
    const n = scores.length / capacities.length;
    const places = assignBalanced(Float32Array.from(scores), Int32Array.from(capacities), { epsilon: 0.9 / n });
    expect(countsOf(places, capacities.length)).toEqual(capacities);
    expect(places.reduce((sum, place, i) => sum + scores[i * capacities.length + place]!, 0)).toBe(best);
  });

  it('ends where all scores are the same, and with a single place', () => {
    const even = assignBalanced(new Float32Array(60).fill(3), Int32Array.from([7, 7, 6]));
    expect(countsOf(even, 3)).toEqual([7, 7, 6]);
    expect([...assignBalanced(Float32Array.from([1, 2, 3]), Int32Array.from([3]))]).toEqual([0, 0, 0]);
  });

  it('refuses capacities that do not sum to the number of items', () => {
    expect(() => assignBalanced(new Float32Array(8), Int32Array.from([2, 3]))).toThrow('4 items');
  });
});
