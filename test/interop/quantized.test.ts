import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { score } from '../../src/arch/score.js';
import type { QuantFormat } from '../../src/quant/formats.js';
import { quantize } from '../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../src/quant/scheme.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { llamaScore } from './llama.js';
import { OnnxSession } from './onnxruntime.js';
import { checkOnnx, heldOut, ourLogits, python, relativeError, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const bound = 1e-3;

async function quantized(
  input: string,
  out: string,
  formats: readonly QuantFormat[],
  recipe: Partial<Recipe> = {},
): Promise<void> {
  await quantize(
    {
      ...{ input, out, formats, scope: 'all' },
      recipe: { ...defaultRecipe, method: 'rtn', ...recipe },
      tool: { name: 'deepseek-convert', version: '0' },
      commandLine: 'test',
    },
    env,
  );
}

interface Checked {
  readonly linears: number;
  readonly differences: Record<string, number>;
}

const trained: [string, string | undefined][] = [
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin')],
  ['moe-6m', fixture('moe-6m')],
];
const small = { groupSize: 32 } as const;
const cases: [string, string | undefined, Partial<Recipe>][] = [
  ...trained.map(([name, path]): [string, string | undefined, Partial<Recipe>] => [name, path, { groupSize: 32 }]),
  ['dense-6m asymmetric', trained[0]![1], { groupSize: 128, symmetric: false }],
  ['moe-6m asymmetric', trained[1]![1], { ...small, symmetric: false }],
  ['qwen2', archCase('qwen2'), small],
  ['mixtral', archCase('mixtral'), small],
];

describe.each(cases)('%s quantized', (name, path, recipe) => {
  const out = join(work, name);

  test.skipIf(!path)('transformers computes our logits from it; GPTQ and AWQ unpack to the same weights', async () => {
    await quantized(path!, out, ['compressed-tensors', 'gptq', 'awq', 'onnx', 'safetensors'], recipe);
    const open = await openModel(join(out, 'compressed-tensors'));
    const tokens = someTokens(48, open.model.vocab);
    await open.close();
    const [tokenFile, logitFile] = [join(work, `${name}.json`), join(work, `${name}.f32`)];
    writeFileSync(tokenFile, JSON.stringify([[...tokens]]));
    const checked = await python<Checked>('check_quantized.py', out, tokenFile, logitFile);
    expect(checked.linears).toBeGreaterThan(0);
    const { safetensors, ...codes } = checked.differences;
    expect(codes).toEqual({ gptq: 0, awq: 0 });
    // Plain weights are rounded to the model's bf16.
    expect(safetensors).toBeLessThan(2 ** -8);
    const theirs = new Float32Array(readFileSync(logitFile).buffer.slice(0));
    const ours = await ourLogits(join(out, 'compressed-tensors'), env, tokens);
    expect(relativeError(theirs, ours)).toBeLessThan(bound);
  });

  test.skipIf(!path)('ONNX Runtime computes our logits from it, with its cache too', async () => {
    const open = await openModel(join(out, 'onnx'));
    const { model } = open;
    expect(open.layout?.name).toBe('matmulnbits');
    const [operators] = await checkOnnx(join(out, 'onnx'));
    expect(operators).toContain('com.microsoft.MatMulNBits');
    expect(operators!.includes('com.microsoft.QMoE')).toBe(model.blocks.some(({ moe }) => moe !== undefined));
    const tokens = someTokens(20, model.vocab);
    const want = await ourLogits(join(out, 'compressed-tensors'), env, tokens);
    const session = await OnnxSession.open(join(out, 'onnx'), model);
    const [whole] = await session.run(tokens, 1, [20]);
    expect(relativeError(whole!, want)).toBeLessThan(bound);
    const parts = await session.run(tokens, 1, [17, 1, 1, 1]);
    expect(relativeError(Float32Array.from(parts.flatMap((part) => [...part])), want)).toBeLessThan(bound);
    await session.close();
    await open.close();
  });
});

test('experts of 8 bits run as QMoE', async () => {
  const out = join(work, 'eight');
  await quantized(fixture('moe-6m'), out, ['onnx'], { groupSize: 64, bits: 8 });
  const open = await openModel(out);
  const tokens = someTokens(20, open.model.vocab);
  const session = await OnnxSession.open(out, open.model);
  const [whole] = await session.run(tokens, 1, [20]);
  expect(relativeError(whole!, await ourLogits(out, env, tokens))).toBeLessThan(bound);
  await session.close();
  await open.close();
});

describe.each(trained)('%s as GGUF beside others', (name, path) => {
  test.skipIf(!path)('Q4_0 holds the very codes, and llama.cpp has our perplexity', async () => {
    const out = join(work, `${name}-gguf`);
    const keep = name === 'moe-6m' ? { keep: ['kv_b_proj'] } : {};
    await quantize(
      {
        ...{ input: path!, out, formats: ['compressed-tensors', 'gguf'], scope: 'all', ...keep },
        recipe: { ...defaultRecipe, method: 'rtn', groupSize: 32, blocks: 'q4_0' },
        tool: { name: 'deepseek-convert', version: '0' },
        commandLine: 'test',
      },
      env,
    );
    const file = join(out, 'gguf/model.gguf');
    const tokens = someTokens(32, 60);
    const same = await ourLogits(join(out, 'compressed-tensors'), env, tokens);
    expect(relativeError(await ourLogits(file, env, tokens), same)).toBeLessThan(1e-6);
    const open = await openModel(file);
    const text = (await (await open.tokenizer()).encode(heldOut(), { special: false })).subarray(0, 500);
    const ours = await score(open, env, text, { window: 500 });
    await open.close();
    const theirs = await llamaScore(file, text, 500);
    expect(Math.abs(theirs.perplexity / ours.perplexity - 1)).toBeLessThan(0.01);
  });
});
