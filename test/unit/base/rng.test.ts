import { expect, test } from 'vitest';
import { Random } from '../../../src/base/rng.js';

test('the same seed and stream give the same numbers, others give others', () => {
  const draw = (seed: number, stream?: number) => {
    const random = new Random(seed, stream);
    return Array.from({ length: 8 }, () => random.bits());
  };
  expect(draw(1)).toEqual(draw(1));
  const all = [draw(0), draw(1), draw(0, 1), draw(1, 1), draw(2 ** 32), draw(2 ** 52)].map((d) => d.join());
  expect(new Set(all).size).toBe(all.length);
});

test('uniform: moments, range, and no correlation of neighbours or streams', () => {
  const n = 200_000;
  const [a, b] = [new Random(7, 0), new Random(7, 1)];
  let [sum, squares, lag, cross, previous] = [0, 0, 0, 0, 0.5];
  let [low, high] = [1, 0];
  for (let i = 0; i < n; i++) {
    const [u, v] = [a.uniform(), b.uniform()];
    low = Math.min(low, u);
    high = Math.max(high, u);
    sum += u;
    squares += (u - 0.5) ** 2;
    lag += (u - 0.5) * (previous - 0.5);
    cross += (u - 0.5) * (v - 0.5);
    previous = u;
  }
  expect(low).toBeGreaterThanOrEqual(0);
  expect(high).toBeLessThan(1);
  expect(sum / n).toBeCloseTo(0.5, 2);
  expect(squares / n).toBeCloseTo(1 / 12, 2);
  // Standard error of these is 1 / (12 sqrt(n)) = 0.0002.
  expect(Math.abs(lag / n)).toBeLessThan(0.001);
  expect(Math.abs(cross / n)).toBeLessThan(0.001);
});
