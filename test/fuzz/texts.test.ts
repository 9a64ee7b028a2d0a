import { expect, it } from 'vitest';
import { models } from './model-targets.js';
import { fuzzEach } from './suite.js';
import { containers, pickles, texts } from './targets.js';

fuzzEach(texts);

it('all in all there are 200,000 inputs', () => {
  const all = [...containers, ...pickles, ...texts, ...models];
  expect(all.reduce((sum, { count }) => sum + count, 0)).toBeGreaterThanOrEqual(200_000);
});
