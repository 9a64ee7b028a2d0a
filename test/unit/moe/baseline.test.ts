import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it, vi } from 'vitest';
import type { SplitKind } from '../../../src/moe/restructured.js';
import type { MoeOptions } from '../../../src/moe/options.js';
import { totalsOf } from '../../../src/moe/report.js';
import { previewMoe, runMoe } from '../../../src/moe/run.js';
import { fixture, testEnv } from '../../arch/support.js';

vi.setConfig({ testTimeout: 300_000 });
const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'moe-baseline-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const job = (split: SplitKind, more: Partial<MoeOptions> = {}): MoeOptions => ({
  input: fixture('v1.0/v1.0_checkpoint.bin'),
  out: join(folder, split),
  method: 'split',
  container: 'glm4_moe',
  experts: 15,
  active: 7,
  split,
  refit: false,
  calibration: { source: [fixture('samples.jsonl')], samples: 16, seqLen: 128, seed: 0 },
  rounds: 2,
  steps: 8,
  tool: { name: 'deepseek-convert', version: '0.0.0' },
  commandLine: 'deepseek-convert moe',
  ...more,
});

it('baselines are the dense model with all experts on, and lose to the method at its budget', async () => {
  const error: Record<string, number> = {};
  for (const kind of ['static', 'random', 'cmoe', 'fitted'] as const) {
    const { layers, exactness } = await runMoe(job(kind), env);
    expect(exactness!.split.relative, kind).toBeLessThan(5e-5);
    error[kind] = totalsOf(layers).routed;
    const loads = layers.map(({ router }) => router.load);
    // A static mask has the same experts on for every token; the others route.
    for (const { share, dead } of loads) {
      if (kind === 'static') expect([...share]).toEqual([...Array<number>(7).fill(1), ...Array<number>(8).fill(0)]);
      else expect(dead).toBeLessThan(4);
    }
    // What the report says of a static mask without its bias is what the whole model of it does, or a little better.
    const { staticBias, randomSplit } = totalsOf(layers);
    if (kind === 'static') expect(error.static! / staticBias).toBeGreaterThan(0.95);
    // The report's own figures at the same budget: the whole model's first layer sees what the layer's baseline saw.
    if (kind === 'cmoe') expect(layers[0]!.errors.cmoe).toBe(layers[0]!.errors.routed);
    else expect(layers[0]!.errors.cmoe).not.toBe(layers[0]!.errors.routed);
    if (kind === 'random') expect(error.random! / randomSplit).toBeCloseTo(1, 0);
  }
  expect(error.fitted).toBeLessThan(0.8 * error.static!);
  expect(error.fitted).toBeLessThan(0.8 * error.random!);
  expect(error.fitted).toBeLessThan(error.cmoe!);
});

it('a static mask needs a container whose router has a selection bias', async () => {
  await expect(previewMoe(job('static', { container: 'qwen2_moe' }))).rejects.toThrow('no selection bias');
  await expect(previewMoe(job('random', { method: 'upcycle' }))).rejects.toThrow('goes with --method split');
});
