import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { assign } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture } from '../arch/support.js';
import { onDevices } from './support.js';

interface Case {
  readonly scores: number[];
  readonly capacities: number[];
  readonly best: number;
}
const { assignments } = JSON.parse(readFileSync(fixture('moe/expected.json'), 'utf8')) as { assignments: Case[] };

const countsOf = (places: Int32Array, n: number): number[] =>
  Array.from({ length: n }, (_, e) => places.filter((place) => place === e).length);

const deviationOf = (values: readonly number[]): number => {
  const mean = values.reduce((a, b) => a + b) / values.length;
  return Math.sqrt(values.reduce((sum, v) => sum + (v - mean) ** 2, 0) / values.length);
};

onDevices('assign', (device, random) => {
  const run = async (
    s: Scope,
    scores: ArrayLike<number>,
    capacities: readonly number[],
    epsilon?: number,
    before: Float64Array = new Float64Array(capacities.length),
  ) => {
    const e = capacities.length;
    const prices = before.slice();
    const x = s.from('f32', [scores.length / e, e], Float32Array.from(scores));
    return { places: await assign(x, Int32Array.from(capacities), prices, epsilon), prices };
  };
  const total = (scores: ArrayLike<number>, places: Int32Array, n: number) =>
    places.reduce((sum, place, i) => sum + scores[i * n + place]!, 0);

  it.each(assignments)('reaches the best total of the network simplex, $best', async ({ scores, capacities, best }) => {
    using s = new Scope(device());
    const n = scores.length / capacities.length;
    const { places } = await run(s, scores, capacities, 0.9 / n / deviationOf(scores));
    expect(countsOf(places, capacities.length)).toEqual(capacities);
    expect(total(scores, places, capacities.length)).toBe(best);
  });

  it('ends where all scores are the same, and with a single place', async () => {
    using s = new Scope(device());
    const even = await run(s, new Float32Array(60).fill(3), [7, 7, 6]);
    expect(countsOf(even.places, 3)).toEqual([7, 7, 6]);
    expect([...(await run(s, [1, 2, 3], [3])).places]).toEqual([0, 0, 0]);
  });

  describe('random scores', () => {
    const [n, capacities] = [400, [30, 0, 70, 100, 1, 49, 50, 60, 40] as const];
    const e = capacities.length;
    const scores = random.normals(n * e).map((v, i) => Math.fround(v + (i % e) / 3));

    // Weak duality: no assignment is worth more than what everybody could gain at some prices, and the prices.
    const bound = (of: Float64Array, prices: Float64Array) => {
      let sum = 0;
      for (let i = 0; i < n; i++) {
        sum += Math.max(...capacities.map((room, j) => (room > 0 ? of[i * e + j]! - prices[j]! : -Infinity)));
      }
      return capacities.reduce((all, room, j) => all + room * prices[j]!, sum);
    };
    const slack = 1e-3 * deviationOf([...scores]) * n;

    it('are within epsilon of what its prices prove to be the most', async () => {
      using s = new Scope(device());
      const { places, prices } = await run(s, scores, capacities);
      expect(countsOf(places, e)).toEqual([...capacities]);
      const most = bound(scores, prices);
      expect(total(scores, places, e)).toBeLessThanOrEqual(most + 1e-6);
      expect(total(scores, places, e)).toBeGreaterThan(most - slack);
    });

    it('from the prices of others too, the same each time', async () => {
      using s = new Scope(device());
      const { prices: before } = await run(s, scores, capacities);
      const next = scores.map((v) => Math.fround(v * (1 + 0.2 * random.normal())));
      const [one, two] = [await run(s, next, capacities, 1e-3, before), await run(s, next, capacities, 1e-3, before)];
      expect(one).toEqual(two);
      expect(one.prices).not.toEqual(before);
      expect(countsOf(one.places, e)).toEqual([...capacities]);
      expect(total(next, one.places, e)).toBeGreaterThan(bound(next, one.prices) - slack * 1.2);
    });
  });

  it('of several at once are what they are alone', async () => {
    using s = new Scope(device());
    const [e, n] = [5, 200];
    const all = Array.from({ length: 6 }, () => random.normals(n * e).map(Math.fround));
    const capacities = [40, 40, 40, 40, 40];
    const together = await Promise.all(all.map((scores) => run(s, scores, capacities)));
    for (const [i, scores] of all.entries()) expect(together[i]).toEqual(await run(s, scores, capacities));
  });

  it('refuses capacities that do not sum to the number of items, and scores that are not finite', async () => {
    using s = new Scope(device());
    await expect(run(s, new Float32Array(8), [2, 3])).rejects.toThrow('as many items as there are');
    await expect(run(s, [1, 2, Infinity, 3], [1, 1])).rejects.toThrow('not finite');
  });
});
