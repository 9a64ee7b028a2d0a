import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { WeightReader } from '../../src/arch/weights.js';
import { planConversion } from '../../src/export/convert-plan.js';
import { runConversion } from '../../src/export/convert.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture, shared, testEnv, trainedModel } from '../arch/support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'lora-'));
afterAll(() => rmSync(folder, { recursive: true }));
const base = trainedModel('v1.0', 'v1.0_checkpoint.bin')!;
const expected = JSON.parse(readFileSync(fixture('lora', 'expected.json'), 'utf8')) as Record<
  string,
  Record<string, Record<string, number[]>>
>;

const options = (mergeLora: string, input = base) =>
  ({ input, mergeLora, dtype: 'f32', format: 'safetensors' }) as const;

/** An adapter with other settings. */
function changed(name: string, settings: Record<string, unknown>): string {
  const target = join(folder, name);
  cpSync(fixture('lora', 'plain'), target, { recursive: true });
  const path = join(target, 'adapter_config.json');
  const before = JSON.parse(readFileSync(path, 'utf8')) as object;
  writeFileSync(path, JSON.stringify({ ...before, ...settings }));
  return target;
}

describe('LoRA adapters', () => {
  test.each(['plain', 'patterns'])('%s: merged weights are those of PEFT’s formula', async (name) => {
    const out = join(folder, `merged-${name}`);
    const plan = await planConversion(options(fixture('lora', name)));
    const run = { out, overwrite: false, restart: false, shardSize: 5e9, ioBudget: 128e6, allowSaturation: false };
    await runConversion(plan, { ...options(fixture('lora', name)), ...run, recipe: null, resumeHint: '' }, env);
    await plan.close();
    const [before, after] = [await openModel(base), await openModel(out)];
    using scope = new Scope(env.device);
    const read = async (open: typeof before, tensor: string) =>
      (await new WeightReader(open, env.device, 'f32').tensor(tensor, scope)).float32();
    for (const [tensor, rows] of Object.entries(expected[name]!)) {
      const values = await read(after, tensor);
      for (const [row, want] of Object.entries(rows)) {
        const got = values.subarray(Number(row) * want.length, (Number(row) + 1) * want.length);
        const worst = Math.max(...want.map((w, i) => Math.abs(w - got[i]!)));
        expect(worst, `${tensor} row ${row}`).toBeLessThan(1e-6);
      }
    }
    const untouched = 'model.layers.1.self_attn.q_proj.weight';
    expect(await read(after, untouched)).toEqual(await read(before, untouched));
    await before.close();
    await after.close();
  });

  test.each([
    ['DoRA', { use_dora: true }, /DoRA adapters cannot be merged[\s\S]*merge_and_unload/],
    ['another method', { peft_type: 'IA3' }, /Only LoRA adapters can be merged/],
    ['PiSSA', { init_lora_weights: 'pissa' }, /trained on changed base weights/],
    ['another rank', { r: 5 }, /another shape than it should[\s\S]*\[5, 256\]/],
    ['a setting that is not known to be harmless', { layer_replication: [[0, 2]] }, /layer_replication/],
  ])('%s is refused by name', async (name, settings, message) => {
    await expect(planConversion(options(changed(name, settings)))).rejects.toThrow(message);
  });

  test('a model without the weight, a folder without an adapter', async () => {
    await expect(planConversion(options(fixture('lora', 'plain'), fixture('moe-6m')))).rejects.toThrow(/for a weight that the model does not have/); // prettier-ignore
    await expect(planConversion(options(fixture('moe-6m')))).rejects.toThrow(/not a PEFT folder/);
  });

  test('a rotated model, whose weights are others than the adapter is for', async () => {
    const turned = join(folder, 'rotated.bin');
    cpSync(base, turned);
    cpSync(base.replace(/bin$/, 'config.json'), join(folder, 'rotated.config.json'));
    const rotation = { rotation: { kind: 'hadamard', seed: 3 } };
    writeFileSync(join(folder, 'rotated.deepseek-convert.json'), JSON.stringify(rotation));
    const plan = planConversion(options(fixture('lora', 'plain'), turned));
    await expect(plan).rejects.toThrow(/cannot be merged into a rotated model[\s\S]*seed 3/);
  });

  const int4 = shared('models', 'dense-6m-int4-llmcompressor');
  test.skipIf(!trainedModel('dense-6m-int4-llmcompressor'))(
    'merging into INT4 is refused with the remedy',
    async () => {
      for (const dtype of ['f32', undefined] as const) {
        const plan = planConversion({ ...options(fixture('lora', 'plain'), int4), dtype });
        await expect(plan).rejects.toThrow(/cannot be merged into quantized weights[\s\S]*then quantize/);
      }
    },
  );
});
