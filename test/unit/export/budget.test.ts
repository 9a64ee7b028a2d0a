import { expect, it } from 'vitest';
import { Budget } from '../../../src/export/pieces.js';

it('what is under way never takes more than the budget, but for one thing that is larger by itself', async () => {
  const budget = new Budget(100);
  let [used, most, running, order] = [0, 0, 0, ''];
  const take = (name: string, bytes: number) =>
    budget.within(bytes, async () => {
      [used, running] = [used + bytes, running + 1];
      if (bytes <= 100) most = Math.max(most, used);
      else expect(running).toBe(1);
      order += name;
      await new Promise((resolve) => setTimeout(resolve, 1));
      [used, running] = [used - bytes, running - 1];
    });
  await Promise.all([take('a', 60), take('b', 40), take('c', 70), take('d', 10), take('e', 500), take('f', 1)]);
  expect(most).toBe(100);
  expect(order).toBe('abcdef'); // first come, first served: small ones do not starve a large one
  await expect(budget.within(100, () => Promise.reject(new Error('x')))).rejects.toThrow('x');
  await take('g', 100); // what failed gave its share back
  expect(order).toBe('abcdefg');
});
