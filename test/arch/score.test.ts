import { describe, expect, test, vi } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { score, scoreAll } from '../../src/arch/score.js';
import { WeightReader } from '../../src/arch/weights.js';
import { badInputMessage } from '../support/refusal.js';
import { expected, fixture, relativeError, testEnv, trainedModel } from './support.js';

const env = testEnv();

describe.each([
  ['dense-6m', 'v1.0', 'v1.0_checkpoint.bin'],
  ['moe-6m', 'moe-6m', ''],
  ['stories260k', 'stories260k', ''],
])('%s', (name, folder, file) => {
  const path = trainedModel(folder, file);
  test.skipIf(!path)(
    'log-probabilities of a text, as one sequence and in windows, are those of transformers',
    async () => {
      const want = expected(fixture('arch', `${name}.expected.safetensors`));
      const open = await openModel(path!);
      const tokens = want.tokens!.i32;
      const whole = await score(open, env, tokens);
      expect(whole.scored).toBe(63);
      expect(whole.logprobs[0]).toBeNaN();
      expect(relativeError(whole.logprobs.subarray(1), want.logprobs!.f32)).toBeLessThan(1e-5);
      const mean = want.logprobs!.f32.reduce((a, b) => a + b, 0) / 63;
      expect(whole.perplexity / Math.exp(-mean)).toBeCloseTo(1, 5);

      // Windows of 24: the last has 16 tokens; a small budget makes one pass each.
      for (const more of [{}, { stateBytes: 1 }]) {
        const cut = await score(open, env, tokens, { window: 24, ...more });
        expect([...cut.logprobs.keys()].filter((i) => Number.isNaN(cut.logprobs[i]))).toEqual([0, 24, 48]);
        expect(
          relativeError(
            cut.logprobs.filter((v) => !Number.isNaN(v)),
            want.logprobs_24!.f32,
          ),
        ).toBeLessThan(1e-5);
        expect(cut.scored).toBe(61);
      }
      await open.close();
    },
  );
});

test('bf16 is near fp32; only one block is resident; nothing is left behind', async () => {
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  const tokens = expected(fixture('arch', 'dense-6m.expected.safetensors')).tokens!.i32;
  const exact = await score(open, env, tokens);
  env.device.resetPeak();
  const near = await score(open, env, tokens, { dtype: 'bf16' });
  expect(Math.abs(near.meanLogprob - exact.meanLogprob)).toBeLessThan(0.02);
  expect(near.meanLogprob).not.toBe(exact.meanLogprob);
  expect(env.device.memory().buffers).toBe(0);
  const embedding = open.model.vocab * open.model.hidden * 2;
  const block = open.model.blocks[0]!.tensors.reduce((n, t) => n + t.shape.reduce((a, b) => a * b, 1) * 2, 0);
  // Never the whole model: the embedding is larger than a block here, and logits are made in pieces.
  expect(env.device.memory().peak).toBeLessThan(embedding + block + 8 * 2 ** 20);
  await open.close();
});

test('of several texts each block is read once, and each text scores as on its own', async () => {
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  const tokens = expected(fixture('arch', 'dense-6m.expected.safetensors')).tokens!.i32;
  const texts = [tokens, tokens.subarray(3, 30), tokens.subarray(10, 12)];
  const alone = [];
  for (const text of texts) alone.push(await score(open, env, text, { window: 24 }));
  const reads = vi.spyOn(WeightReader.prototype, 'block');
  expect(await scoreAll(open, env, texts, { window: 24 })).toEqual(alone);
  expect(reads.mock.calls.map(([block]) => block)).toEqual([...open.model.blocks.keys()]);
  reads.mockRestore();
  await open.close();
});

test('what cannot be scored is refused', async () => {
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  expect(await badInputMessage(score(open, env, Int32Array.of(5)))).toMatch(/too short/);
  expect(await badInputMessage(score(open, env, Int32Array.of(5, 8192)))).toMatch(/0 to 8191, got token 8192/);
  await open.close();
});
