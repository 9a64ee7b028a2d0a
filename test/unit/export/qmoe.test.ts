import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { planConversion } from '../../../src/export/convert-plan.js';
import { readOnnx } from '../../../src/formats/onnx.js';
import { OpenFile } from '../../../src/formats/source.js';
import { quantize } from '../../../src/quant/run.js';
import { defaultRecipe, type Recipe } from '../../../src/quant/scheme.js';
import type { Scheme } from '../../../src/layout/types.js';
import { linearSpec } from '../../../src/nn/layer.js';
import type { FfnSpec } from '../../../src/nn/mlp.js';
import { quantizedExperts } from '../../../src/targets/onnx/experts.js';
import { fixture, testEnv } from '../../arch/support.js';
import { ourLogits } from '../../support/models.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'qmoe-'));
afterAll(() => rmSync(work, { recursive: true }));

const job = (out: string, formats: readonly ('onnx' | 'safetensors')[], recipe: Partial<Recipe>) => ({
  ...{ input: fixture('moe-6m'), out: join(work, out), formats, scope: 'experts', commandLine: 'test' },
  recipe: { ...defaultRecipe, method: 'rtn' as const, ...recipe },
  tool: { name: 'deepseek-convert', version: '0' },
});

const tokens = Int32Array.from({ length: 12 }, (_, i) => (i * 97 + 3) % 8000);
const logits = (path: string) => ourLogits(path, env, tokens);

function operators(folder: string): Map<string, number> {
  using file = new OpenFile(join(folder, 'model.onnx'));
  const counts = new Map<string, number>();
  for (const { op } of readOnnx(file).nodes) counts.set(op, (counts.get(op) ?? 0) + 1);
  return counts;
}

// What ONNX Runtime computes from the operator is tested by npm run test:interop.
test.each([
  ['symmetric, 8 bits', { groupSize: 64, bits: 8 as const }],
  ['asymmetric', { groupSize: 32, symmetric: false }],
])('quantized experts become one QMoE a layer and read back as they are: %s', async (name, recipe) => {
  const { blocks, verified } = await quantize(job(name, ['onnx', 'safetensors'], recipe), env);
  const experts = blocks.flatMap(({ linears }) => linears).length;
  expect(verified).toBe(2 * experts);
  const found = operators(join(work, name, 'onnx'));
  expect([found.get('QMoE'), found.get('MatMulNBits')]).toEqual([3, undefined]);
  // Plain weights are rounded to bf16.
  const [onnx, plain] = [await logits(join(work, name, 'onnx')), await logits(join(work, name, 'safetensors'))];
  const largest = Math.max(...plain.map(Math.abs));
  expect(Math.max(...onnx.map((value, i) => Math.abs(value - plain[i]!))) / largest).toBeLessThan(0.02);
});

test('experts in full precision are a dense loop, and it is said', async () => {
  const plan = await planConversion({ input: fixture('moe-6m'), format: 'onnx' });
  await plan.close();
  expect(plan.notes).toContain('Experts are a dense loop, not QMoE: not all experts are quantized.');
});

const ffn = (hidden: number, width: number, more: Partial<FfnSpec> = {}): FfnSpec => ({
  gate: linearSpec('experts.0.gate_proj', hidden, width, 'expert'),
  up: linearSpec('experts.0.up_proj', hidden, width, 'expert'),
  down: linearSpec('experts.0.down_proj', width, hidden, 'expert'),
  activation: 'silu',
  ...more,
});
const symmetric: Scheme = { bits: 4, group: 128, symmetric: true };
const asymmetric: Scheme = { ...symmetric, symmetric: false };

test.each([
  [ffn(256, 128), symmetric, 128],
  [ffn(256, 96), symmetric, 32],
  [ffn(256, 256), asymmetric, 128],
  [ffn(256, 128), asymmetric, 'one block'],
  [ffn(256, 100), symmetric, 'no block divides 256 and 100'],
  [ffn(256, 128, { activation: 'gelu' }), symmetric, 'not gelu'],
  [ffn(256, 128, { limit: 7 }), symmetric, 'with a limit'],
  [ffn(256, 128, { down: linearSpec('experts.0.down_proj', 128, 256, 'expert', true) }), symmetric, 'biases'],
])('what QMoE takes (%#)', (expert, scheme, expected) => {
  const found = quantizedExperts({ of: (stored) => ({ stored, scheme }), accuracy: 0 }, [expert]);
  if (typeof expected === 'number') expect(found).toMatchObject({ block: expected, scheme });
  else expect(found).toContain(expected);
});
