import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { planConversion } from '../../../src/export/convert-plan.js';
import { halfBits } from '../../../src/targets/onnx/builder.js';
import { archCase, fixture, testEnv, trainedModel } from '../../arch/support.js';
import { convert as convertTo, ourLogits } from '../../support/models.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'onnx-'));
afterAll(() => rmSync(work, { recursive: true }));

const convert = (input: string, out: string, dtype: 'f32' | 'f16' = 'f32') =>
  convertTo({ input, format: 'onnx', dtype }, out, env);

const tokens = Int32Array.from({ length: 12 }, (_, i) => (i * 7 + 3) % 60);
const logits = (path: string) => ourLogits(path, env, tokens);

// What ONNX Runtime computes from the graphs is tested by npm run test:interop.
describe('ONNX output', () => {
  test.each(['llama-tied-bias', 'qwen2_moe', 'deepseek_v3'])('%s reads back with the same weights', async (name) => {
    const [path, out] = [archCase(name), join(work, name)];
    await convert(path, out);
    expect(await logits(out)).toEqual(await logits(path));
    const genai = JSON.parse(readFileSync(join(out, 'genai_config.json'), 'utf8')) as { model: { decoder: object } };
    expect(genai.model.decoder).toMatchObject({ filename: 'model.onnx', num_attention_heads: 4 });
    expect(existsSync(join(out, 'model.onnx.data'))).toBe(true);
  });

  const int4 = trainedModel('dense-6m-int4-llmcompressor');
  test.skipIf(!int4)('codes of a quantized model stay codes', async () => {
    const out = join(work, 'int4');
    await convert(int4!, out);
    expect(await logits(out)).toEqual(await logits(int4!));
    const open = await openModel(out);
    expect(open.layout?.name).toBe('matmulnbits');
    await open.close();
  });

  test('fp16 graphs keep routers in fp32', async () => {
    const out = join(work, 'f16');
    await convert(fixture('moe-6m'), out, 'f16');
    const open = await openModel(out);
    const dtype = (name: string) => open.tensors.get(name)!.entry.encoding;
    expect(dtype('model.layers.1.mlp.gate.weight')).toEqual({ kind: 'plain', dtype: 'f32' });
    expect(dtype('model.layers.1.self_attn.o_proj.weight')).toEqual({ kind: 'plain', dtype: 'f16' });
    await open.close();
  });

  test('bf16, which onnxruntime does not compute in, is refused', async () => {
    await expect(planConversion({ input: fixture('moe-6m'), format: 'onnx', dtype: 'bf16' })).rejects.toThrow(/f32 or f16/); // prettier-ignore
  });
});

test('constants of fp16 graphs', () => {
  expect([0, 1, -2, 0.5, 65504, 1e9, 1e-20].map(halfBits)).toEqual([0, 0x3c00, 0xc000, 0x3800, 0x7bff, 0x7c00, 0]);
});
