import { expect, test } from 'vitest';
import { generate } from '../../src/arch/generate.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { unary } from '../../src/tensor/ops.js';
import { refusal } from '../support/refusal.js';
import { archCase, testEnv } from './support.js';

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

test('logits that are no numbers are refused', async () => {
  const env = testEnv();
  const open = await openModel(archCase('llama'));
  using resident = await ResidentModel.load(open, env, 'f32');
  const logits = resident.logits.bind(resident);
  resident.logits = (scope, x) => unary(scope, 'affine', logits(scope, x), NaN, 0);
  const refused = await refusal(generate(resident, env, [Int32Array.of(1)], { maxNewTokens: 3, stopIds: [] }));
  expect(refused).toMatchObject({ kind: 'input' });
  expect(refused.message).toMatch(/not numbers.*after 0 tokens/s);
  await open.close();
});
