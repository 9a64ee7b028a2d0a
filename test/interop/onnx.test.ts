import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { OnnxSession } from './onnxruntime.js';
import { checkOnnx, convert, ourLogits, relativeError, someTokens, workFolder } from './support.js';

const env = testEnv();
const work = workFolder();
const int4 = trainedModel('dense-6m-int4-llmcompressor');
/** Of the largest logit. */
const bound = 1e-3;

/**
 * The error of logits [S, V]. Graphs in f16 round every activation, and where two experts are nearly equal the router
 * may then choose the other: all tokens but every fifth count, to 1e-2.
 */
function errorOf(got: Float32Array, want: Float32Array, vocab: number, type: 'float32' | 'float16'): number {
  if (type === 'float32') return relativeError(got, want);
  const rows = Array.from({ length: want.length / vocab }, (_, i) => [i * vocab, (i + 1) * vocab] as const);
  const errors = rows.map(([from, to]) => relativeError(got.subarray(from, to), want.subarray(from, to)));
  return errors.sort((a, b) => a - b)[Math.floor(0.8 * errors.length)]! / 10;
}

/** Prefill in one call; prefill, then one token after another with the cache. Both against our logits. */
async function compare(
  folder: string,
  path: string,
  [batch, length]: readonly [number, number],
  type: 'float32' | 'float16' = 'float32',
): Promise<void> {
  const open = await openModel(path);
  const { model } = open;
  const tokens = someTokens(batch * length, model.vocab);
  const want = await ourLogits(path, env, tokens, batch);
  const session = await OnnxSession.open(folder, model, type);
  const [whole] = await session.run(tokens, batch, [length]);
  expect(errorOf(whole!, want, model.vocab, type), 'prefill').toBeLessThan(bound);
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
  expect(errorOf(joined, want, model.vocab, type), 'decoding with the cache').toBeLessThan(bound);
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
const written: string[] = [];
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
      written.push(out);
      await compare(out, path, [2, 12]);
      await readBack(out, path);
    });
  },
);

test('onnx.checker passes all of them', async () => {
  expect(written.length).toBeGreaterThan(15);
  expect(await checkOnnx(...written)).toHaveLength(written.length);
});

describe.each([
  ['dense-6m', trainedModel('v1.0', 'v1.0_checkpoint.bin')],
  ['moe-6m', fixture('moe-6m')],
])('trained %s', (name, path) => {
  test.skipIf(path === undefined)('logits in ONNX Runtime equal ours', async () => {
    const out = join(work, name);
    await convert({ input: path!, format: 'onnx', dtype: 'f32' }, out, env);
    await compare(out, path!, [1, 100]);
    await readBack(out, path!);
    const [operators] = await checkOnnx(out);
    expect(operators).toContain('com.microsoft.GroupQueryAttention');
  });

  test.skipIf(path === undefined)('in f16 too', async () => {
    const out = join(work, `${name}-f16`);
    await convert({ input: path!, format: 'onnx', dtype: 'f16' }, out, env);
    await compare(out, path!, [1, 60], 'float16');
  });
});

test.skipIf(!int4)('INT4 codes that llm-compressor chose run as MatMulNBits', async () => {
  const out = join(work, 'int4');
  await convert({ input: int4!, format: 'onnx', dtype: 'f32' }, out, env);
  await compare(out, int4!, [1, 60]);
  await readBack(out, int4!);
  const [operators] = await checkOnnx(out);
  expect(operators).toContain('com.microsoft.MatMulNBits');
});
