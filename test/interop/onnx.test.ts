import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { OnnxSession } from './onnxruntime.js';
import { convert, ourLogits, python, relativeError, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const int4 = trainedModel('dense-6m-int4-llmcompressor');
/** Of the largest logit. */
const bound = 1e-3;

/** Prefill in one call; prefill, then one token after another with the cache. Both against our logits. */
async function compare(folder: string, path: string, batch: number, length: number): Promise<void> {
  const open = await openModel(path);
  const { model } = open;
  const tokens = someTokens(batch * length, model.vocab);
  const want = await ourLogits(path, env, tokens, batch);
  const session = await OnnxSession.open(folder, model);
  const [whole] = await session.run(tokens, batch, [length]);
  expect(relativeError(whole!, want), 'prefill').toBeLessThan(bound);
  const first = length - 4;
  const parts = await session.run(tokens, batch, [first, 1, 1, 1, 1]);
  const joined = new Float32Array(want.length);
  let at = 0;
  for (const [i, part] of parts.entries()) {
    const size = i === 0 ? first : 1;
    for (let b = 0; b < batch; b++) {
      const row = part.subarray(b * size * model.vocab, (b + 1) * size * model.vocab);
      joined.set(row, (b * length + at) * model.vocab);
    }
    at += size;
  }
  expect(relativeError(joined, want), 'decoding with the cache').toBeLessThan(bound);
  await session.close();
  await open.close();
}

/** Our own reader finds the same weights in the graph. */
async function readBack(folder: string, path: string): Promise<void> {
  const tokens = someTokens(16, 60);
  expect(relativeError(await ourLogits(folder, env, tokens), await ourLogits(path, env, tokens))).toBeLessThan(1e-6);
}

/** Rotary frequencies that change with the length of the text; choices of sparse attention. */
const refused = new Set(['llama-caps', 'llama-dynamic', 'llama-longrope', 'deepseek_v32', 'deepseek_v4']);
const cases = readdirSync(fixture('arch'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
describe.each(cases.map(({ name }) => name).filter((name) => !name.includes('_vl') && !name.includes('ocr')))(
  '%s',
  (name) => {
    test(refused.has(name) ? 'is refused with the reason' : 'logits in ONNX Runtime equal ours', async () => {
      const path = archCase(name);
      const out = join(work, name);
      const done = convert({ input: path, format: 'onnx', dtype: 'f32' }, out, env);
      if (refused.has(name)) {
        await expect(done).rejects.toThrow(/not written as ONNX/);
        return;
      }
      await done;
      await compare(out, path, 2, 12);
      await readBack(out, path);
    });
  },
);

describe.each([
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin')],
  ['moe-6m', fixture('moe-6m')],
])('trained %s', (name, path) => {
  test.skipIf(path === undefined)('logits in ONNX Runtime equal ours', async () => {
    const out = join(work, name);
    await convert({ input: path!, format: 'onnx', dtype: 'f32' }, out, env);
    await compare(out, path!, 1, 100);
    await readBack(out, path!);
    const checked = await python<{ nodes: number; operators: string[] }>('check_onnx.py', out);
    expect(checked.operators).toContain('com.microsoft.GroupQueryAttention');
  });
});

test.skipIf(!int4)('INT4 codes that llm-compressor chose run as MatMulNBits', async () => {
  const out = join(work, 'int4');
  await convert({ input: int4!, format: 'onnx', dtype: 'f32' }, out, env);
  await compare(out, int4!, 1, 60);
  await readBack(out, int4!);
  const checked = await python<{ operators: string[] }>('check_onnx.py', out);
  expect(checked.operators).toContain('com.microsoft.MatMulNBits');
});
