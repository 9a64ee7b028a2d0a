import { describe, expect, test } from 'vitest';
import { generate } from '../../src/arch/generate.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { Sampler, type SamplingOptions } from '../../src/arch/sampler.js';
import { refusal } from '../support/refusal.js';
import { archCase, testEnv } from './support.js';

const logits = Float32Array.of(1, 3, -2, 2, 3, Number.NEGATIVE_INFINITY);
const softmax = (temperature = 1) => {
  const e = [...logits].map((x) => Math.exp(x / temperature));
  const sum = e.reduce((a, b) => a + b, 0);
  return e.map((x) => x / sum);
};
/** Frequencies of 20,000 draws. */
function frequencies(options: SamplingOptions): number[] {
  const sampler = new Sampler({ seed: 3, ...options }, 0);
  const counts = new Array<number>(logits.length).fill(0);
  for (let i = 0; i < 20_000; i++) counts[sampler.draw(logits).token]!++;
  return counts.map((c) => c / 20_000);
}
const near = (got: number[], want: number[]) =>
  got.forEach((f, i) => expect(Math.abs(f - want[i]!), `token ${i}`).toBeLessThan(0.015));
const renormalised = (p: number[], kept: number[]) => {
  const sum = kept.reduce((a, i) => a + p[i]!, 0);
  return p.map((x, i) => (kept.includes(i) ? x / sum : 0));
};

describe('sampling', () => {
  test('follows the distribution, at any temperature', () => {
    near(frequencies({}), softmax());
    near(frequencies({ temperature: 3 }), softmax(3));
  });
  test('top-k and top-p keep the most probable tokens', () => {
    near(frequencies({ topK: 3 }), renormalised(softmax(), [1, 3, 4]));
    // Probabilities 0.39, 0.39, 0.14, 0.05: two reach 0.75, three are needed for 0.85.
    near(frequencies({ topP: 0.75 }), renormalised(softmax(), [1, 4]));
    near(frequencies({ topP: 0.85 }), renormalised(softmax(), [1, 3, 4]));
    near(frequencies({ topP: 0 }), renormalised(softmax(), [1]));
  });
  test("greedy takes the first of equals; log-probabilities are the model's own", () => {
    const drawn = new Sampler({ greedy: true, temperature: 5 }, 0).draw(logits);
    expect(drawn.token).toBe(1);
    expect(drawn.logprob).toBeCloseTo(Math.log(softmax()[1]!), 12);
  });
});

test('generation: a seed gives the same text, alone or beside others; stops end it', async () => {
  const env = testEnv();
  const open = await openModel(archCase('llama'));
  using resident = await ResidentModel.load(open, env, 'f32');
  const prompts = [Int32Array.of(5, 6, 7), Int32Array.of(9), Int32Array.of(5, 6, 7)];
  const run = (which: Int32Array[], options: object = {}) =>
    generate(resident, env, which, { maxNewTokens: 24, seed: 4, stopIds: [], ...options });
  const [a, b, c] = await run(prompts);
  const [again] = await run([prompts[0]!]);
  expect([...again!.tokens]).toEqual([...a!.tokens]);
  expect([...c!.tokens]).not.toEqual([...a!.tokens]);
  expect([...(await run([prompts[0]!], { seed: 5 }))[0]!.tokens]).not.toEqual([...a!.tokens]);
  expect(b!.stopped).toBe('length');

  const seen: number[] = [];
  const stop = a!.tokens[10]!;
  const first = a!.tokens.indexOf(stop);
  const [stopped] = await run([prompts[0]!], {
    stopIds: [stop],
    onToken: (_: number, token: number) => seen.push(token),
  });
  expect(stopped).toMatchObject({ stopped: 'eos' });
  expect([...stopped!.tokens]).toEqual([...a!.tokens.subarray(0, first)]);
  expect(seen).toEqual([...stopped!.tokens]);

  expect((await refusal(run([new Int32Array()]))).kind).toBe('usage');
  expect((await refusal(run([Int32Array.of(64)]))).message).toMatch(/outside the vocabulary.*got 64|0 to 63, got 64/s);
  expect((await refusal(run([Int32Array.of(1)], { maxNewTokens: 64 }))).message).toMatch(/1 \+ 64 tokens/);
  await open.close();
});
