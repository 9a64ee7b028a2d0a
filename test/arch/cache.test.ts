import { expect, test } from 'vitest';
import { GrowingCache } from '../../src/nn/cache.js';
import { cast } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { testEnv } from './support.js';

const env = testEnv();
/** Token t of row b holds 1000 b + t. */
const rows = (scope: Scope, batch: number, from: number, count: number): Tensor => {
  const values = Array.from({ length: batch * count }, (_, i) => 1000 * Math.floor(i / count) + from + (i % count));
  return scope.from('f32', [batch, count, 1, 1], Float32Array.from(values));
};

test.each<[string, number | undefined, number[]]>([
  ['all tokens', undefined, [40, 1, 1, 30, 1, 60, 1]],
  ['a window, one token at a time', 5, [4, ...Array.from({ length: 100 }, () => 1)]],
  ['a window, pieces of many sizes', 7, [70, 1, 3, 0, 31, 1, 1, 33, 2, 64, 1, 100, 1]],
  ['a window as large as the first memory', 32, [1, 31, 1, 40, 1, 1, 64, 1]],
])('%s', async (_, window, pieces) => {
  using scope = new Scope(env.device);
  const cache = new GrowingCache(scope);
  let end = 0;
  for (const count of pieces) {
    const x = rows(scope, 2, end, count);
    const { k, v, offset } = cache.append(x, rows(scope, 2, end, count), window);
    const first = end - offset;
    end += count;
    expect(cache.length).toBe(end);
    expect(first + k.dim(1)).toBe(end);
    // What the first new token sees is there.
    expect(first).toBeLessThanOrEqual(window === undefined ? 0 : Math.max(0, end - count - (window - 1)));
    for (const held of [k, v]) {
      const values = await cast(scope, held, 'f32').float32();
      const wanted = [0, 1].flatMap((b) => Array.from({ length: end - first }, (__, t) => 1000 * b + first + t));
      expect([...values]).toEqual(wanted);
    }
    // Memory does not grow with the text.
    if (window !== undefined && count <= 1) expect(k.dim(1)).toBeLessThan(4 * Math.max(window, 32, ...pieces));
  }
  if (window !== undefined) expect(cache.append(rows(scope, 2, end, 1), rows(scope, 2, end, 1), window).k.dim(1)).toBeLessThan(end); // prettier-ignore
});

test('parts are caches of their own, the same ones each time', () => {
  using scope = new Scope(env.device);
  const cache = new GrowingCache(scope);
  cache.part('a').append(rows(scope, 1, 0, 3));
  expect([cache.length, cache.part('a').length, cache.part('b').length]).toEqual([0, 3, 0]);
  expect(
    cache
      .part('a')
      .append(rows(scope, 1, 3, 2))
      .k.dim(1),
  ).toBe(5);
});
