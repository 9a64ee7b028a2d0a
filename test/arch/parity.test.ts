import { readdirSync } from 'node:fs';
import { describe, expect, test } from 'vitest';
import { generate } from '../../src/arch/generate.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { score } from '../../src/arch/score.js';
import { Scope } from '../../src/tensor/tensor.js';
import { expected, fixture, archCase, relativeError, testEnv, trainedModel } from './support.js';

/** Logits in fp32 against transformers': max |difference| over max |logit| (fixtures/arch/make_arch.py). */
const bound = 1e-4;
const env = testEnv();

const cases = readdirSync(fixture('arch'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
describe.each(cases.map(({ name }) => name))('%s', (name) => {
  const path = archCase(name);
  const want = expected(fixture('arch', name, 'expected.safetensors'));

  test('logits equal those of transformers: padded, one token, two tokens, one past a window', async () => {
    const open = await openModel(path);
    using resident = await ResidentModel.load(open, env, 'f32');
    const logits = async (tokens: Int32Array, batch: number, lengths?: number[]) => {
      using scope = new Scope(env.device);
      const x = resident.hidden(scope, tokens, batch, lengths && { lengths });
      return resident.logits(scope, x).float32();
    };
    const { tokens, lengths, logits: full, logits_1: one, logits_2: two } = want;
    const [batch, length, columns] = full!.shape as [number, number, number];
    const vocab = resident.model.vocab;
    const got = await logits(tokens!.i32, batch, [...lengths!.i32]);
    const every = vocab / columns;
    for (let b = 0; b < batch; b++) {
      let worst = 0;
      for (let i = b * length * columns; i < (b * length + lengths!.i32[b]!) * columns; i++) {
        const difference = Math.abs(got[i * every]! - full!.f32[i]!);
        if (!(difference <= worst)) worst = difference; // NaN counts
      }
      expect(worst / want.largest!.f32[0]!, `row ${b}`).toBeLessThan(bound);
    }
    expect(relativeError(await logits(tokens!.i32.slice(0, 1), 1), one!.f32)).toBeLessThan(bound);
    expect(relativeError(await logits(tokens!.i32.slice(0, 2), 1), two!.f32)).toBeLessThan(bound);
    // One more than a window, by itself: the first positions of the whole row.
    const window = Math.max(0, ...resident.model.blocks.map((block) => block.window ?? 0));
    if (window > 0) {
      const alone = await logits(tokens!.i32.slice(0, window + 1), 1);
      const some = Array.from({ length: (window + 1) * columns }, (_, i) => alone[i * every]!);
      expect(relativeError(some, full!.f32.slice(0, some.length)), `${window + 1} tokens`).toBeLessThan(bound);
    }
    await open.close();
  });

  test('greedy generation equals that of transformers; rows of other lengths beside it change nothing', async () => {
    const open = await openModel(path);
    using resident = await ResidentModel.load(open, env, 'f32');
    const prompt = want.tokens!.i32.slice(0, 4);
    // transformers went on beyond the context of the dynamic case on purpose.
    const model = resident.model as { context: number };
    model.context = Math.max(model.context, 64);
    const others = [want.tokens!.i32.slice(5, 14), want.tokens!.i32.slice(20, 22)];
    const options = { maxNewTokens: 32, greedy: true, stopIds: [] };
    const [alone] = await generate(resident, env, [prompt], options);
    expect([...alone!.tokens]).toEqual([...want.greedy!.i32]);
    const [beside] = await generate(resident, env, [prompt, ...others], options);
    expect([...beside!.tokens]).toEqual([...want.greedy!.i32]);
    expect(relativeError(beside!.logprobs, alone!.logprobs)).toBeLessThan(bound);
    // Token by token (caches, absorbed latents) and all at once. These two ropes turn keys by how long the text is.
    if (!['llama-dynamic', 'llama-longrope'].includes(name)) {
      const { logprobs } = await score(open, env, Int32Array.of(...prompt, ...alone!.tokens));
      expect(relativeError(alone!.logprobs, logprobs.slice(prompt.length))).toBeLessThan(bound);
    }
    await open.close();
  });
});

describe.each([
  ['dense-6m', 'v1.0', 'v1.0_checkpoint.bin'],
  ['dense-32m', 'dense-32m', ''],
  ['stories260k', 'stories260k', ''],
  ['moe-6m', 'moe-6m', ''],
])('trained %s', (name, folder, file) => {
  const path = trainedModel(folder, file);
  test.skipIf(!path)('logits and greedy text equal those of transformers', async () => {
    const want = expected(fixture('arch', `${name}.expected.safetensors`));
    const open = await openModel(path!);
    using resident = await ResidentModel.load(open, env, 'f32');
    using scope = new Scope(env.device);
    const x = resident.hidden(scope, want.tokens!.i32, 1);
    const logits = await resident.logits(scope, x).float32();
    const { vocab } = resident.model;
    const some: number[] = [];
    for (const row of want.rows!.i32) for (let i = 0; i < vocab; i += 37) some.push(logits[row * vocab + i]!);
    const largest = want.largest!.f32[0]!;
    const worst = Math.max(...some.map((v, i) => Math.abs(v - want.some!.f32[i]!)));
    expect(worst / largest).toBeLessThan(bound);
    want.rows!.i32.forEach((row, r) => {
      const at = [...logits.subarray(row * vocab, (row + 1) * vocab)].map((v, i) => [v, i] as const);
      const top = at.sort((a, b) => b[0] - a[0]).slice(0, 8);
      expect(top.map(([, i]) => i)).toEqual([...want.top!.i32.subarray(8 * r, 8 * r + 8)]);
    });
    const [text] = await generate(resident, env, [want.tokens!.i32.slice(0, 12)], {
      maxNewTokens: 32,
      greedy: true,
      stopIds: [],
    });
    expect([...text!.tokens]).toEqual([...want.greedy!.i32]);
    await open.close();
  });
});
