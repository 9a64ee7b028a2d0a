import { expect, it } from 'vitest';
import { interleaved } from '../../../src/export/pieces.js';

const items = ['a1', 'a2', 'a3', 'b1', 'c1', 'c2', 'd1', 'd2'];
const order = (lanes: number) => interleaved(items, (item) => item[0]!, lanes).join(' ');

it('gives the tensors of so many files in turn, each file in its order', () => {
  expect(order(1)).toBe(items.join(' '));
  expect(order(2)).toBe('a1 b1 a2 a3 c1 c2 d1 d2');
  expect(order(9)).toBe('a1 b1 c1 d1 a2 c2 d2 a3');
  expect(interleaved([], String, 2)).toEqual([]);
});
