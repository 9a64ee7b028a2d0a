import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { score } from '../../src/arch/score.js';
import { fixture, testEnv, trainedModel } from '../arch/support.js';
import { llamaScore, llamaTokens } from './llama.js';
import { convert, heldOut, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const [count, window] = [2000, 500];

const types = ['f32', 'f16', 'bf16', 'q8_0', 'q6_k', 'q4_k', 'q4_0', 'q4_k_s', 'q4_k_m'] as const;
const models: [string, string | undefined][] = [
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin')],
  ['moe-6m', fixture('moe-6m')],
];

describe.each(models)('%s in llama.cpp', (name, path) => {
  test.skipIf(!path).each(types)('%s: the perplexity is ours', async (type) => {
    const out = join(work, `${name}-${type}.gguf`);
    const plain = type === 'f32' || type === 'f16' || type === 'bf16';
    const options = plain ? ({ dtype: type } as const) : ({ blocks: type } as const);
    await convert({ input: path!, format: 'gguf', ...options }, out, env);
    const open = await openModel(out);
    const tokenizer = await open.tokenizer();
    const text = heldOut();
    const tokens = (await tokenizer.encode(text, { special: false })).subarray(0, count);
    expect(tokens.length).toBe(count);
    const ours = await score(open, env, tokens, { window });
    await open.close();
    const theirs = await llamaScore(out, tokens, window);

    expect(Math.abs(theirs.perplexity / ours.perplexity - 1)).toBeLessThan(0.01);
    if (type === 'f32') {
      const cut = text.slice(0, 2000);
      const same = await tokenizer.encode(cut, { special: false });
      expect(await llamaTokens(out, cut)).toEqual([...same]);
    }
  });
});
