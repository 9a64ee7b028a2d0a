import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { score } from '../../src/arch/score.js';
import { encodingName } from '../../src/formats/ggml.js';
import { quantize } from '../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../src/quant/scheme.js';
import { fixture, testEnv, trainedModel } from '../arch/support.js';
import { llamaScore, llamaTokens } from './llama.js';
import { convert, heldOut, python, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const [count, window] = [2000, 500];

/** Scores the first tokens of held-out text in llama.cpp and here; returns the largest difference of ln p of a token. */
async function comparePerplexity(file: string): Promise<number> {
  const open = await openModel(file);
  const all = await (await open.tokenizer()).encode(heldOut(), { special: false });
  const tokens = all.subarray(0, count);
  expect(tokens.length).toBe(count);
  const ours = await score(open, env, tokens, { window });
  await open.close();
  const theirs = await llamaScore(file, tokens, window);
  expect(Math.abs(theirs.perplexity / ours.perplexity - 1)).toBeLessThan(0.01);
  const each = [...theirs.logprobs].map((value, i) => Math.abs(value - ours.logprobs[i]!));
  return Math.max(...each.filter((_, i) => i % window !== 0));
}

const floats = ['f32', 'f16', 'bf16'] as const;
const blocks = ['q8_0', 'q6_k', 'q4_k', 'q4_0', 'q4_k_s', 'q4_k_m'] as const;
const isFloat = (type: string): type is (typeof floats)[number] => (floats as readonly string[]).includes(type);

const models: [string, string | undefined][] = [
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin')],
  ['moe-6m', fixture('moe-6m')],
];

describe.each(models)('%s in llama.cpp', (name, path) => {
  test.skipIf(!path).each([...floats, ...blocks])('%s: the perplexity is ours', async (type) => {
    const out = join(work, `${name}-${type}.gguf`);
    const options = isFloat(type) ? { dtype: type } : { blocks: type };
    await convert({ input: path!, format: 'gguf', ...options }, out, env);
    const difference = await comparePerplexity(out);
    if (type === 'f32') {
      expect(difference).toBeLessThan(1e-3);
      const text = heldOut().slice(0, 2000);
      const open = await openModel(out);
      const same = await (await open.tokenizer()).encode(text, { special: false });
      await open.close();
      expect(await llamaTokens(out, text)).toEqual([...same]);
    }
  });

  test.skipIf(!path).each(['q5_k', 'q3_k', 'q2_k'] as const)('quantize to %s: the perplexity is ours', async (type) => {
    const out = join(work, `${name}-${type}.gguf`);
    await quantizeTo(path!, out, type);
    await comparePerplexity(out);
  });

  test.skipIf(!path)('rotated: the perplexity is ours', async () => {
    const out = join(work, `${name}-rotated.gguf`);
    await quantizeTo(path!, out, 'q8_0', { rotation: { kind: 'hadamard', seed: 0 } });
    await comparePerplexity(out);
  });
});

describe.each(['qwen2', 'mixtral'])('a random %s in llama.cpp', (kind) => {
  const known = new Map<number, Promise<string>>();
  const make = async (hidden: number): Promise<string> => {
    const folder = join(work, `${kind}-${hidden}`);
    await python('make_random.py', folder, kind, `${hidden}`, fixture('moe-6m'));
    return folder;
  };
  const made = (hidden: number): Promise<string> => {
    if (!known.has(hidden)) known.set(hidden, make(hidden));
    return known.get(hidden)!;
  };

  test.each(['f32', 'bf16', 'q8_0', 'q6_k', 'q4_0', 'q4_k_s', 'q4_k_m'] as const)('%s: the perplexity is ours', async (type) => {
    const out = join(work, `${kind}-${type}.gguf`);
    const options = isFloat(type) ? { dtype: type } : { blocks: type };
    await convert({ input: await made(256), format: 'gguf', ...options }, out, env);
    const difference = await comparePerplexity(out);
    if (type === 'f32') expect(difference).toBeLessThan(1e-3);
  }); // prettier-ignore

  test('rows that blocks of 256 do not divide: smaller blocks stand in', async () => {
    const path = await made(96);
    const [mixed, quantized] = [join(work, `${kind}-mixed.gguf`), join(work, `${kind}-quantized.gguf`)];
    await convert({ input: path, format: 'gguf', blocks: 'q4_k_m' }, mixed, env);
    expect(await typesOf(mixed)).toEqual(new Set(['f32', 'q5_0', 'q8_0']));
    await comparePerplexity(mixed);
    await quantizeTo(path, quantized, 'q5_k');
    expect(await typesOf(quantized)).toContain('q5_1');
    await comparePerplexity(quantized);
  });
});

async function quantizeTo(
  input: string,
  out: string,
  blocks: 'q8_0' | 'q5_k' | 'q3_k' | 'q2_k',
  more: Partial<Recipe> = {},
): Promise<void> {
  await quantize(
    {
      ...{ input, out, formats: ['gguf'], scope: 'all' },
      recipe: { ...defaultRecipe, method: 'rtn', blocks, ...more },
      tool: { name: 'deepseek-convert', version: '0' },
      commandLine: 'test',
    },
    env,
  );
}

async function typesOf(file: string): Promise<Set<string>> {
  const open = await openModel(file);
  const types = [...open.checkpoint.tensors.values()].map(({ encoding }) => encodingName(encoding));
  await open.close();
  return new Set(types);
}
