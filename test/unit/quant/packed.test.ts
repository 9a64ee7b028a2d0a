import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { generate } from '../../../src/arch/generate.js';
import { openModel, type OpenModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import type { QuantFormat } from '../../../src/quant/formats.js';
import { quantize } from '../../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../../src/quant/scheme.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { fixture, relativeError, testEnv } from '../../arch/support.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'packed-'));
afterAll(() => rmSync(work, { recursive: true }));

async function rounded(name: string, input: string, formats: readonly QuantFormat[], more: Partial<Recipe>) {
  const recipe: Recipe = { ...defaultRecipe, method: 'rtn', ...more };
  const tool = { name: 'deepseek-convert', version: '0' };
  await quantize({ input, out: join(work, name), formats, recipe, scope: 'all', tool, commandLine: 'test' }, env);
  return (format: QuantFormat) => join(work, name, formats.length > 1 ? format : '');
}

const embedding = 8192 * 256 * 4;
const tokens = Int32Array.from({ length: 24 }, (_, i) => (i * 97 + 3) % 8000);

/** What a model says when INT4 linears stay packed (few sequences) or not. */
async function run(open: OpenModel, dtype: 'f32' | 'bf16', sequences: number) {
  const before = env.device.memory().used;
  using resident = await ResidentModel.load(open, env, dtype, sequences);
  const bytes = env.device.memory().used - before;
  using scope = new Scope(env.device);
  const logits = (x: Int32Array) => resident.logits(scope, resident.hidden(scope, x, 1)).float32();
  const calls = vi.spyOn(env.device, 'run');
  const few = await logits(tokens.subarray(0, 5));
  const products = calls.mock.calls.filter(([op]) => op === 'int4_matmul').length;
  calls.mockRestore();
  const many = await logits(tokens);
  const prompts = [tokens.subarray(0, 3), tokens.subarray(4, 11)];
  const texts = await generate(resident, env, prompts, { maxNewTokens: 24, greedy: true, stopIds: [] });
  return { bytes, few, many, products, texts: texts.map((text) => [...text.tokens]) };
}

async function compare(path: string, dtype: 'f32' | 'bf16', bound: number) {
  const open = await openModel(path);
  const [whole, packed] = [await run(open, dtype, 100), await run(open, dtype, 2)];
  await open.close();
  expect(whole.products).toBe(0);
  expect(relativeError(packed.few, whole.few)).toBeLessThan(bound);
  expect(relativeError(packed.many, whole.many)).toBeLessThan(bound);
  return { whole, packed };
}

describe.each([
  ['symmetric', { groupSize: 128 }],
  ['asymmetric', { groupSize: 64, symmetric: false }],
  ['a scale a row', { groupSize: -1 }],
])('INT4, %s', (name, more) => {
  const formats = ['compressed-tensors', 'gptq', 'awq', 'onnx'] as const;
  const made = rounded(name, fixture('v1.0', 'v1.0_checkpoint.bin'), formats, more);

  test.each(formats)(
    'linears of %s stay packed: fp32 logits within 1e-5, the same text, less memory',
    async (format) => {
      const { whole, packed } = await compare((await made)(format), 'f32', 1e-5);
      expect(packed.products).toBe(28);
      expect(packed.texts).toEqual(whole.texts);
      // The tied embedding, 8192 x 256 of 5.2 million weights, stays as it is.
      expect((whole.bytes - embedding) / (packed.bytes - embedding)).toBeGreaterThan(6);
    },
  );
  test('in bf16 both round: logits within 2%', async () => {
    await compare((await made)('compressed-tensors'), 'bf16', 0.02);
  });
});

test('what is taken apart for latents is not packed, nor are experts', async () => {
  const made = await rounded('mla', fixture('moe-6m'), ['compressed-tensors'], { groupSize: 32 });
  const { whole, packed } = await compare(made('compressed-tensors'), 'f32', 1e-5);
  const open = await openModel(made('compressed-tensors'));
  const int4 = (part: RegExp) => [...open.tensors.values()].filter((t) => t.linear && part.test(t.name)).length;
  expect(int4(/kv_b_proj/)).toBe(4);
  expect(packed.products).toBe(int4(/./) - int4(/kv_b_proj|\.experts\./));
  await open.close();
  expect(packed.texts).toEqual(whole.texts);
});
