import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { JobEnv } from '../../../src/backend/env.js';
import { silentLog } from '../../../src/base/log.js';
import { openModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import { quantize, type QuantizeOptions } from '../../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../../src/quant/scheme.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { runValidate } from '../../../src/validate/run.js';
import { archCase, fixture, testEnv, trainedModel, type RawTensor } from '../../arch/support.js';
import { convert } from '../../support/models.js';
import { refusal } from '../../support/refusal.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'rotate-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const rotation = { kind: 'hadamard', seed: 0 } as const;
const job = (name: string, input: string, recipe: Partial<Recipe>, more: Partial<QuantizeOptions> = {}): QuantizeOptions => ({
  input,
  out: join(folder, name),
  recipe: { ...defaultRecipe, method: 'rtn', groupSize: -1, rotation, ...recipe },
  formats: ['safetensors'],
  scope: 'all',
  tool: { name: 'deepseek-convert', version: 'test' },
  commandLine: 'deepseek-convert quantize',
  ...more,
}); // prettier-ignore

async function logits(path: string): Promise<Float32Array> {
  const open = await openModel(path);
  try {
    using resident = await ResidentModel.load(open, env, 'f32');
    using scope = new Scope(env.device);
    const tokens = Int32Array.from({ length: 24 }, (_, i) => (7 * i + 3) % open.model.vocab);
    return await resident.logits(scope, resident.hidden(scope, tokens, 2)).float32();
  } finally {
    await open.close();
  }
}

/** |a - b| / |b| */
const distance = (a: Float32Array, b: Float32Array): number => Math.sqrt(b.reduce((sum, x, i) => sum + (a[i]! - x) ** 2, 0) / b.reduce((sum, x) => sum + x ** 2, 0)); // prettier-ignore

describe('a rotated model', () => {
  it.each([
    ['llama-tied-bias', true, ['compressed-tensors', 'onnx', 'safetensors']],
    ['qwen3', true, ['gguf', 'safetensors']],
    ['mixtral', false, ['gguf', 'safetensors']],
    ['deepseek_v3', false, ['compressed-tensors', 'safetensors']],
    ['qwen2_moe', false, ['onnx', 'safetensors']],
  ] as const)('is whole in every container: %s', async (name, tied, formats) => {
    const input = archCase(name, { config: (config) => expect(config.tie_word_embeddings ?? false).toBe(tied) });
    await quantize(job(name, input, { bits: 8, blocks: 'q8_0' }, { formats }), env);
    const want = await logits(input);
    // Eight bits, beside embedding, head and biases in bf16.
    for (const format of formats) expect(distance(await logits(join(folder, name, format)), want), format).toBeLessThan(0.05); // prettier-ignore
    const config = JSON.parse(readFileSync(join(folder, name, 'safetensors', 'config.json'), 'utf8')) as object;
    expect(config).toMatchObject({ tie_word_embeddings: false });
    expect(readFileSync(join(folder, name, 'safetensors', 'README.md'), 'utf8')).toMatch(/^Rotated \(/m);
  });

  it('has no outlying channels left, so that one scale a row costs less', async () => {
    // Channel 3 is small in the residual stream and large in what reads it.
    const outlying = (tensors: Map<string, RawTensor>) => {
      for (const [name, { shape, data }] of tensors) {
        const reads = /(q|k|v|gate|up)_proj\.weight$/.test(name);
        const writes = /(o|down)_proj\.weight$/.test(name);
        if (!reads && !writes && !name.includes('embed_tokens')) continue;
        const [rows, columns] = shape as [number, number];
        const values = new Uint16Array(data.buffer);
        const by = (at: number, exponents: number) => (values[at] = values[at]! + (exponents << 7)); // bf16 times 2^e
        if (writes) for (let c = 0; c < columns; c++) by(3 * columns + c, -4);
        else for (let r = 0; r < rows; r++) by(r * columns + 3, reads ? 4 : -4);
      }
    };
    const input = archCase('llama', { tensors: outlying });
    const want = await logits(input);
    const error = async (name: string, recipe: Partial<Recipe>) => {
      const { rotation: own, ...rest } = job(name, input, recipe).recipe;
      await quantize({ ...job(name, input, {}), recipe: recipe.rotation ? { ...rest, rotation: own! } : rest }, env);
      return distance(await logits(join(folder, name)), want);
    };
    expect(await error('turned', { rotation })).toBeLessThan(0.5 * (await error('straight', {})));
  });

  const v1 = () => trainedModel('v1.0', 'v1.0_checkpoint.bin')!;
  const calibration = { source: [fixture('samples.jsonl')], samples: 4, seqLen: 32, seed: 0 };

  it('is compared with the model in the basis that it has', async () => {
    const { blocks } = await quantize(job('judged', v1(), { method: 'gptq' }, { calibration, formats: ['compressed-tensors'] }), env); // prettier-ignore
    for (const { error, plainError } of blocks.flatMap(({ linears }) => linears))
      expect(error).toBeLessThan(plainError);
    const texts = [fixture('samples.jsonl')];
    const common = { reference: v1(), candidate: join(folder, 'judged'), texts, samples: 2, seqLen: 32, generations: 0, resamples: 10 }; // prettier-ignore
    const { layers, logits: measured, weights } = await runValidate(common, env);
    expect(measured.kl.mean).toBeLessThan(0.2);
    for (const { teacherForced } of layers) expect(teacherForced.update).toBeLessThan(0.4);
    for (const { kind, mean } of weights?.kinds ?? []) expect(mean, kind).toBeLessThan(0.3);
    // The basis goes along from format to format.
    const [plain, file] = [join(folder, 'plain'), join(folder, 'plain.bin')];
    await convert({ input: common.candidate, format: 'safetensors', dtype: 'f32' }, plain, env);
    await convert({ input: plain, format: 'torch', dtype: undefined }, file, env);
    const again = await runValidate({ ...common, candidate: file }, env);
    for (const { teacherForced } of again.layers) expect(teacherForced.update).toBeLessThan(0.4);
  }, 60_000);

  it('interrupted, goes on to the same bytes; with another seed not at all', async () => {
    const input = archCase('mixtral');
    const own = (name: string) => job(name, input, { method: 'gptq' }, { calibration: { source: 'self', samples: 8, seqLen: 16, seed: 0 } }); // prettier-ignore
    const abort = new AbortController();
    const stopping: JobEnv = { ...env, signal: abort.signal, log: { ...silentLog, progress: ({ stage }) => stage === 'quantize' && abort.abort() } }; // prettier-ignore
    expect((await refusal(quantize(own('resumed'), stopping))).exitCode).toBe(75);
    const other = { ...own('resumed'), recipe: { ...own('resumed').recipe, rotation: { ...rotation, seed: 1 } } };
    expect((await refusal(quantize(other, env))).message).toMatch(/rotation\.seed: 0 -> 1/);
    expect((await quantize(own('resumed'), env)).resumed).toBe(true);
    const { blocks } = await quantize({ ...own('whole'), states: 'f32' }, env);
    for (const { error, plainError } of blocks.flatMap(({ linears }) => linears))
      expect(error).toBeLessThan(plainError);
    const bytes = (name: string) => readFileSync(join(folder, name, 'model.safetensors'));
    expect(bytes('resumed').equals(bytes('whole'))).toBe(true);
  }, 60_000);

  it.each([
    ['awq', { method: 'awq' }, {}, /--method awq/],
    ['imatrix', {}, { formats: ['imatrix'] }, /--format imatrix/],
    ['bf16', {}, { states: 'bf16' }, /--states bf16/],
  ] as const)('is refused with what does not go with it: %s', async (name, recipe, more, message) => {
    const given = { calibration, ...more } as Partial<QuantizeOptions>;
    expect((await refusal(quantize(job(`no-${name}`, archCase('llama'), recipe, given), env))).message).toMatch(
      message,
    );
  });
});
