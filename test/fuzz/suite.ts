import { expect, it } from 'vitest';
import { fuzz, times } from './engine.js';
import type { Job } from './jobs.js';

/** One test for each target. */
export function fuzzEach(targets: readonly Job[]): void {
  it.each(targets)(
    'no input of $count made after $target.name crashes, hangs or takes much memory',
    async ({ target, count, kinds }) => {
      const outcome = await fuzz(target, count);
      expect(outcome.inputs).toBe(Math.ceil(count * times));
      expect(outcome.accepted).toBeGreaterThan(outcome.inputs / 100);
      if (times >= 1) expect(outcome.kinds).toBeGreaterThanOrEqual(kinds);
      else console.log(target.name, outcome);
    },
    600_000,
  );
}
