import { cpSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { bytesSource } from '../../../src/base/io.js';
import { Job } from '../../../src/base/job.js';
import { hfName, nativeName, planNative } from '../../../src/checkpoint/deepseek-native.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import { planKey } from '../../../src/checkpoint/types.js';
import type { Checkpoint, TensorEntry } from '../../../src/checkpoint/types.js';
import { createWriter } from '../../../src/checkpoint/writer.js';
import { joinScales } from '../../../src/checkpoint/scales.js';
import { badInputMessage } from '../../support/refusal.js';
import { elementBytes, numbers } from '../../support/values.js';

const fixture = fileURLToPath(new URL('../../../fixtures/formats/native/', import.meta.url));
const values = await openCheckpoint(join(fixture, 'values.safetensors'), { configOptional: true });
let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'native-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const isPrediction = (name: string): boolean => name.startsWith('model.layers.2.');
function requireValues({ tensors }: Checkpoint, names: readonly string[]): void {
  expect([...tensors.keys()].sort()).toEqual([...names].sort());
  for (const name of names) {
    const [got, want] = [tensors.get(name)!, values.tensors.get(name)!];
    expect(got.shape, name).toEqual(want.shape);
    expect(Array.from(numbers(got)), name).toEqual(Array.from(numbers(want)));
  }
}

describe('FP8 checkpoints', () => {
  it('have their scales joined, also from another shard', async () => {
    const checkpoint = await openCheckpoint(join(fixture, 'hf'));
    requireValues(checkpoint, [...values.tensors.keys()]);
    const { encoding, span } = checkpoint.tensors.get('model.layers.0.mlp.up_proj.weight')!;
    if (encoding.kind !== 'scaled') throw new Error(encoding.kind);
    expect(encoding).toMatchObject({ element: 'f8_e4m3', block: [4, 4], scaleElement: 'f32' });
    expect(encoding.scale.span.path).not.toBe(span.path);
  });

  it('can be opened as they are stored', async () => {
    const { tensors } = await openCheckpoint(join(fixture, 'hf'), { keepScales: true });
    expect(tensors.get('model.layers.0.mlp.up_proj.weight')!.encoding).toEqual({ kind: 'plain', dtype: 'f8_e4m3' });
    expect(tensors.has('model.layers.0.mlp.up_proj.weight_scale_inv')).toBe(true);
  });

  const entry = (name: string, shape: number[], encoding: TensorEntry['encoding']): TensorEntry => ({
    ...{ name, shape, encoding },
    span: { path: 'x', offset: 0, bytes: 0 },
  });
  const fp8 = { kind: 'plain', dtype: 'f8_e4m3' } as const;
  const f32 = { kind: 'plain', dtype: 'f32' } as const;
  const e8m0 = { kind: 'opaque', name: 'F8_E8M0', bits: 8 } as const;
  const config = { quantization_config: { quant_method: 'fp8', weight_block_size: [128, 128] } };

  it('refuse scales of another shape, and partners that are missing', async () => {
    const message = (...entries: TensorEntry[]): Promise<string> => badInputMessage(() => joinScales(entries, config));
    const weight = entry('a.weight', [256, 200], fp8);
    expect(await message(weight, entry('a.weight_scale_inv', [2, 1], f32))).toContain('expected [2, 2]');
    expect(await message(weight)).toContain('a.weight_scale_inv or a.scale');
    expect(await message(entry('a.weight_scale_inv', [2, 2], f32))).toContain('has no weight');
    expect(await message(weight, entry('a.scale', [2, 2], { kind: 'plain', dtype: 'i32' }))).toContain(
      'f32, bf16 or F8_E8M0',
    );
  });

  it('are found in any order; one that is there twice is refused', async () => {
    const names = ['b', 'a', 'c', 'd'];
    const weights = names.map((name) => entry(`${name}.weight`, [4, 4], fp8));
    const scales = ['d', 'a', 'b', 'c'].map((name) => entry(`${name}.weight_scale_inv`, [1, 1], f32));
    const orders = [[...weights, ...scales], [...scales, ...weights], weights.flatMap((one, i) => [one, scales[i]!])];
    for (const entries of orders) {
      const joined = joinScales(entries, config);
      expect([...joined.keys()]).toEqual(names.map((name) => `${name}.weight`));
      for (const { name, encoding } of joined.values()) {
        expect(encoding).toMatchObject({ kind: 'scaled', scale: { name: `${name}_scale_inv` } });
      }
    }
    expect(await badInputMessage(() => joinScales([...weights, ...scales, scales[0]!], config))).toContain(
      'in two files (tensor "d.weight_scale_inv")',
    );
  });

  it('of V4 have FP4 experts beside FP8 linears, told by their scales', () => {
    const joined = joinScales(
      [
        entry('experts.0.w1.weight', [6, 32], { kind: 'plain', dtype: 'i8' }),
        entry('experts.0.w1.scale', [6, 2], e8m0),
        entry('wq_a.weight', [130, 64], fp8),
        entry('wq_a.scale', [2, 1], e8m0),
        entry('ids.weight', [6, 32], { kind: 'plain', dtype: 'i8' }),
      ],
      { ...config, expert_dtype: 'fp4' },
    );
    expect([...joined.keys()]).toEqual(['experts.0.w1.weight', 'wq_a.weight', 'ids.weight']);
    const expert = joined.get('experts.0.w1.weight')!;
    expect(expert.shape).toEqual([6, 64]);
    expect(expert.encoding).toMatchObject({
      kind: 'scaled',
      element: 'f4_e2m1',
      block: [1, 32],
      scaleElement: 'f8_e8m0',
    });
    expect(joined.get('wq_a.weight')!.encoding).toMatchObject({ element: 'f8_e4m3', block: [128, 128] });
    expect(joined.get('ids.weight')!.encoding.kind).toBe('plain');
  });
});

describe("DeepSeek's native layout", () => {
  it('is read under Hugging Face names, joined', async () => {
    const checkpoint = await openCheckpoint(join(fixture, 'mp2'));
    expect(checkpoint.format).toBe('deepseek-native');
    requireValues(
      checkpoint,
      [...values.tensors.keys()].filter((name) => !isPrediction(name)),
    );
    const one = await openCheckpoint(join(fixture, 'mp2/model1-mp2.safetensors'));
    expect(one.tensors.size).toBe(checkpoint.tensors.size);
  });

  it('is written as its own converter writes it', async () => {
    const { tensors, config } = await openCheckpoint(join(fixture, 'hf'), { keepScales: true });
    const plan = planNative(tensors, config, 2);
    expect(plan.notes[0]).toContain('multi-token prediction');
    const job = await Job.open({ out: join(folder, 'out'), fingerprint: {} });
    const provenance = { tool: { name: 't', version: '1' }, recipe: null, inputs: [] };
    const planned = plan.tensors.map((tensor) => tensor.planned);
    const writer = await createWriter({
      job,
      format: 'deepseek-native',
      tensors: planned,
      config,
      metadata: {},
      provenance,
    });
    for (const tensor of plan.tensors) {
      await writer.write(planKey(tensor.planned), bytesSource(Buffer.concat(elementBytes(tensor.entry))));
    }
    await writer.finish();
    await job.remove();
    for (const name of ['model0-mp2.safetensors', 'model1-mp2.safetensors']) {
      expect((await readFile(join(folder, 'out', name))).equals(await readFile(join(fixture, 'mp2', name))), name).toBe(
        true,
      );
    }
    requireValues(
      await openCheckpoint(join(folder, 'out')),
      [...values.tensors.keys()].filter((n) => !isPrediction(n)),
    );
  });

  it('has names that translate both ways', () => {
    for (const name of values.tensors.keys()) {
      if (isPrediction(name)) continue;
      const native = nativeName(name)!;
      expect(hfName(native.name)).toEqual({ name, split: native.split });
    }
    expect(nativeName('model.layers.0.mlp.gate.e_score_correction_bias')!.name).toBe('layers.0.ffn.gate.bias');
    expect(hfName('head.weight')!.name).toBe('lm_head.weight');
  });

  it('refuses unknown names, missing parts, experts that do not divide', async () => {
    const { tensors, config } = await openCheckpoint(join(fixture, 'hf'), { keepScales: true });
    expect(await badInputMessage(() => planNative(tensors, config, 3))).toContain('divisor of 4');
    const odd = new Map([...tensors, ['model.extra.weight', tensors.get('model.norm.weight')!]]);
    expect(await badInputMessage(() => planNative(odd, config, 2))).toContain('model.extra.weight');
    cpSync(join(fixture, 'mp2'), folder, { recursive: true });
    cpSync(join(fixture, 'hf/model-00001-of-00002.safetensors'), join(folder, 'model1-mp2.safetensors'));
    expect(await badInputMessage(openCheckpoint(folder))).toContain('tensor');
    writeFileSync(join(folder, 'model1-mp2.safetensors'), '');
    expect(await badInputMessage(openCheckpoint(folder))).toContain('empty');
  });
});
