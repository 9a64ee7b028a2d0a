import { writeFileSync } from 'node:fs';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { OnnxSession } from './onnxruntime.js';
import { checkOnnx, convert, ourLogits, python, relativeError, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const bound = 1e-3;
const dense = trainedModel('v1.0', 'v1.0_checkpoint.bin');
const int4 = trainedModel('dense-6m-int4-llmcompressor');

/** What transformers computes from a folder, whatever its architecture: f32 [S, V]. */
async function transformers(folder: string, tokens: Int32Array): Promise<Float32Array> {
  const [input, output] = [join(work, 'tokens.json'), join(work, 'logits.f32')];
  writeFileSync(input, JSON.stringify([[...tokens]]));
  await python('logits.py', folder, input, output);
  return new Float32Array(readFileSync(output).buffer.slice(0));
}

describe('Phi-3’s container', () => {
  test.each([
    ['llama', archCase('llama')],
    ['mistral', archCase('mistral')],
    ['dense-6m', dense],
  ])('%s fused: transformers runs it as Phi-3 with our logits', async (name, path) => {
    if (path === undefined) return;
    const out = join(work, `phi3-${name}`);
    await convert({ input: path, format: 'safetensors', fuse: new Set(['qkv', 'gate-up']) }, out, env);
    const tokens = someTokens(40, 60);
    expect(relativeError(await transformers(out, tokens), await ourLogits(path, env, tokens))).toBeLessThan(bound);
  });

  test.each(['', 'window'])('a Phi-3 that transformers made, split: the same logits %s', async (kind) => {
    const [made, out] = [join(work, `made${kind}`), join(work, `split${kind}`)];
    await python('make_phi3.py', made, kind === '' ? '0' : '8');
    await convert({ input: made, format: 'safetensors', fuse: new Set(['split']) }, out, env);
    const tokens = someTokens(40, 60);
    const want = await transformers(made, tokens);
    expect(relativeError(await transformers(out, tokens), want)).toBeLessThan(bound);
    expect(relativeError(await ourLogits(out, env, tokens), want)).toBeLessThan(bound);
  });
});

const models: [string, string | undefined][] = [
  ...['llama', 'llama-tied-bias', 'qwen2', 'qwen3', 'olmoe', 'mixtral'].map((name): [string, string] => [name, archCase(name)]), // prettier-ignore
  ['dense-6m', dense],
  ['moe-6m', fixture('moe-6m')],
  ['INT4 codes', int4],
];

describe.each(models)('%s as ONNX with fused matrices', (name, path) => {
  test.skipIf(!path)('logits in ONNX Runtime equal ours, with the cache too', async () => {
    const out = join(work, `onnx-${name}`);
    await convert({ input: path!, format: 'onnx', dtype: 'f32', fuse: new Set(['qkv', 'gate-up']) }, out, env);
    const [operators] = await checkOnnx(out);
    if (name === 'INT4 codes') expect(operators).toContain('com.microsoft.MatMulNBits');
    const open = await openModel(path!);
    const { model } = open;
    const tokens = someTokens(24, model.vocab);
    const want = await ourLogits(path!, env, tokens);
    const session = await OnnxSession.open(out, model);
    const [whole] = await session.run(tokens, 1, [24]);
    expect(relativeError(whole!, want)).toBeLessThan(bound);
    const parts = await session.run(tokens, 1, [20, 1, 1, 1, 1]);
    expect(relativeError(Float32Array.from(parts.flatMap((part) => [...part])), want)).toBeLessThan(bound);
    await session.close();
    await open.close();
  });
});

test('linears in a row of an ONNX graph are folded: ONNX Runtime computes the same from both', async () => {
  const [path, plain, out] = [archCase('llama'), join(work, 'plain'), join(work, 'folded')];
  await convert({ input: path, format: 'onnx', dtype: 'f32' }, plain, env);
  const { made } = await python<{ made: string[] }>('factor_onnx.py', plain);
  expect(made).toHaveLength(4);
  const tokens = someTokens(24, 60);
  const open = await openModel(path);
  const logits = async (folder: string): Promise<Float32Array> => {
    const session = await OnnxSession.open(folder, open.model);
    const [whole] = await session.run(tokens, 1, [24]);
    await session.close();
    return whole!;
  };
  const want = await logits(plain);
  await convert({ input: plain, format: 'onnx', dtype: 'f32', fuse: new Set(['fold']) }, out, env);
  expect(relativeError(await logits(out), want)).toBeLessThan(bound);
  await open.close();
});
