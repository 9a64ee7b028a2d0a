import { expect, test } from 'vitest';
import { Random } from '../../src/base/rng.js';
import type { ForwardContext } from '../../src/nn/calls.js';
import type { MoeSpec } from '../../src/nn/moe.js';
import { Tape } from '../../src/tensor/tape.js';
import { Scope } from '../../src/tensor/tensor.js';
import { straightThrough } from '../../src/train/moe/straight-through.js';
import { relativeError, testEnv } from '../arch/support.js';

const env = testEnv(1);
const [tokens, experts] = [12, 16];
interface Limit {
  readonly groups: number;
  readonly topGroups: number;
  readonly active: number;
}

const random = new Random(11);
const gauss = () => Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform());
const scores = Float32Array.from({ length: tokens * experts }, gauss);
/** What each expert would be worth. */
const worth = Float32Array.from({ length: tokens * experts }, () => random.uniform() ** 2);
const rowOf = (all: Float32Array, t: number) => Array.from(all.subarray(t * experts, (t + 1) * experts));
const range = (n: number) => Array.from({ length: n }, (_, i) => i);

/** Of sum worth . choice by the scores; `stored`: by the tiny logits of a container under a sigmoid with a bias. */
async function gradients({ groups, topGroups, active }: Limit, stored = false): Promise<Float32Array> {
  using s = new Scope(env.device);
  const logits = s.from('f32', [tokens, experts], stored ? scores.map((v) => 4e-5 * v) : scores);
  const weights = s.from(
    'f32',
    [tokens, experts],
    Float32Array.from(scores, (_, i) => i / 7),
  );
  const route = { topK: active, scoring: stored ? 'sigmoid' : 'softmax', groups, topGroups };
  const spec = { active, layer: { route, ...(stored && { routeBias: 'bias' }) } } as unknown as MoeSpec;
  const bias = s.zeros('f32', [experts]);
  using tape = new Tape(env.device);
  tape.leaf(logits);
  const y = tape.record(() => straightThrough(weights, logits, spec, { scope: tape.scope, weights: { get: () => bias } } as unknown as ForwardContext)); // prettier-ignore
  expect(relativeError(await y.float32(), await weights.float32())).toBeLessThan(1e-6);
  tape.seed(y, s.from('f32', [tokens, experts], worth));
  tape.backward();
  return await tape.take(logits, s).float32();
}

/** Groups with the largest sums of their two best scores. */
function openGroups(row: readonly number[], { groups, topGroups }: Limit): number[] {
  const size = experts / groups;
  const value = range(groups).map((g) => {
    const best = row.slice(g * size, (g + 1) * size).toSorted((a, b) => b - a);
    return best[0]! + best[1]!;
  });
  return range(groups).toSorted((a, b) => value[b]! - value[a]!).slice(0, topGroups); // prettier-ignore
}

/** What the experts that a token is sent to are worth together. */
function kept(row: readonly number[], values: readonly number[], limit: Limit): number {
  const open = openGroups(row, limit);
  const from = range(experts).filter((e) => open.includes(Math.floor((e * limit.groups) / experts)));
  const chosen = from.toSorted((a, b) => row[b]! - row[a]!).slice(0, limit.active);
  return chosen.reduce((sum, e) => sum + values[e]!, 0);
}

/**
 * The gradient of what is kept on the average when scores are moved by normal noise: by differences of the choice itself,
 * which has no gradient of its own.
 */
function smoothed(t: number, limit: Limit, draws = 3000): number[] {
  const [row, values] = [rowOf(scores, t), rowOf(worth, t)];
  const deviation = 0.45; // of a logistic distribution at the temperature of the soft choice
  const gradient = row.map(() => 0);
  for (let i = 0; i < draws; i++) {
    const noise = row.map(() => deviation * gauss());
    const moved = (sign: number) => kept(row.map((v, e) => v + sign * noise[e]!), values, limit); // prettier-ignore
    const difference = (moved(1) - moved(-1)) / (2 * deviation * deviation * draws);
    noise.forEach((z, e) => (gradient[e]! += difference * z));
  }
  return gradient;
}

function cosine(a: ArrayLike<number>, b: ArrayLike<number>): number {
  const dot = (x: ArrayLike<number>, y: ArrayLike<number>) =>
    range(x.length).reduce((sum, i) => sum + x[i]! * y[i]!, 0);
  return dot(a, b) / Math.sqrt(dot(a, a) * dot(b, b));
}

test.each([
  { groups: 4, topGroups: 2, active: 5, bound: 0.8 },
  { groups: 4, topGroups: 1, active: 2, bound: 0.75 },
  { groups: 8, topGroups: 3, active: 6, bound: 0.9 }, // all experts of open groups: only groups are chosen
  { groups: 1, topGroups: 1, active: 5, bound: 0.9 },
])('straight through a choice: the gradient of the smoothed one ($topGroups of $groups groups, $active experts)', async (limit) => {
  const wanted = range(tokens).flatMap((t) => smoothed(t, limit));
  const got = await gradients(limit);
  expect(cosine(got, wanted)).toBeGreaterThan(limit.bound);
  // What is stored is so small that half of fp32 goes by.
  expect(cosine(await gradients(limit, true), got)).toBeGreaterThan(0.99);
  if (limit.groups === 1) return;
  const free = await gradients({ ...limit, groups: 1, topGroups: 1 });
  expect(cosine(free, wanted)).toBeLessThan(cosine(got, wanted) - 0.1);
}); // prettier-ignore

test('who rises takes the place of another: the gradients of a token sum to zero', async () => {
  for (const limit of [
    { groups: 1, topGroups: 1, active: 5 },
    { groups: 8, topGroups: 3, active: 4 },
  ]) {
    const got = await gradients(limit);
    for (let t = 0; t < tokens; t++) {
      const row = rowOf(got, t);
      expect(Math.abs(row.reduce((a, b) => a + b)) / Math.max(...row.map(Math.abs))).toBeLessThan(1e-4);
    }
  }
});
