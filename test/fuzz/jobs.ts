import type { Target } from './engine.js';
import { reshapeJson } from './json.js';

/** A target, its inputs in CI, and in how many ways they must end at least: fewer means that they no longer get far. */
export interface Job {
  readonly target: Target;
  readonly count: number;
  readonly kinds: number;
}
export const job = (target: Target, count: number, kinds: number): Job => ({ target, count, kinds });

/** A target whose inputs are JSON texts. */
export const text = (name: string, seeds: readonly string[], read: (bytes: Buffer) => unknown): Target => ({
  name,
  seeds: seeds.map((one) => Buffer.from(one)),
  reshape: (random, input) => Buffer.from(reshapeJson(random, input.toString('latin1')), 'latin1'),
  read,
});
