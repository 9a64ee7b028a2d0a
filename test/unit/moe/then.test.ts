import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it, vi } from 'vitest';
import type { JobEnv } from '../../../src/backend/env.js';
import { openModel } from '../../../src/arch/open.js';
import { moeInStages } from '../../../src/commands/moe-then.js';
import { runMoe, type MoeOptions } from '../../../src/moe/run.js';
import { quantize } from '../../../src/quant/run.js';
import { defaultRecipe } from '../../../src/quant/scheme.js';
import { fixture, testEnv } from '../../arch/support.js';

vi.setConfig({ testTimeout: 300_000 });
const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'moe-then-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const calibration = { source: [fixture('samples.jsonl')], samples: 16, seqLen: 64, seed: 0 };
const tool = { name: 'deepseek-convert', version: '0.0.0' };
const job = (name: string, more: Partial<MoeOptions> = {}): MoeOptions => ({
  input: fixture('v1.0/v1.0_checkpoint.bin'),
  out: join(folder, name),
  method: 'split',
  container: 'glm4_moe',
  experts: 40, // of 25 neurons: 24.98 each, no group divides
  active: 20,
  calibration,
  rounds: 0,
  steps: 2,
  tool,
  commandLine: 'deepseek-convert moe',
  ...more,
});
const hash = (name: string) => createHash('sha256').update(readFileSync(join(folder, name, 'model.safetensors'))).digest('hex'); // prettier-ignore
const scheme = { bits: 4, groupSize: 64 } as const;

it('moe --then quantize: the bytes of the two commands, one output, and it goes on where it stopped', async () => {
  const stop = new AbortController();
  const log = { ...env.log, progress: ({ stage }: { stage: string }) => stage === 'quantize' && stop.abort() };
  const interrupted: JobEnv = { ...env, log, signal: stop.signal };
  await expect(moeInStages(job('once'), { quantize: scheme }, undefined, interrupted)).rejects.toThrow('saved');
  expect(existsSync(join(folder, 'once'))).toBe(false);
  expect(existsSync(join(folder, 'once.mixture', 'config.json'))).toBe(true);

  const { mixture, quantized } = await moeInStages(job('once'), { quantize: scheme }, undefined, env);
  expect(mixture).toMatchObject({ resumed: true, seconds: 0 }); // taken as it was, not made again
  expect(mixture.layers).toHaveLength(4);
  expect(mixture.exactness!.split.relative).toBeLessThan(5e-5);
  expect(quantized!.resumed).toBe(true);
  expect(existsSync(join(folder, 'once.mixture'))).toBe(false);
  expect(existsSync(join(folder, 'once.part'))).toBe(false);

  // Experts are calibrated on what is routed to them: half of the tokens each, and all of them are reached.
  const coverage = quantized!.blocks.flatMap((block) => block.coverage ?? []);
  expect(coverage.map(({ experts, uncovered }) => [experts, uncovered])).toEqual(Array(4).fill([40, 0]));

  const open = await openModel(join(folder, 'once'));
  const { experts, width } = open.model.blocks[0]!.moe!;
  const config = open.checkpoint.config as { quantization_config?: { quant_method: string } };
  await open.close();
  expect(config.quantization_config?.quant_method).toBe('compressed-tensors');
  expect([experts, width % 32]).toEqual([40, 0]);

  const made = await runMoe(job('apart.mixture'), env);
  await quantize(
    {
      input: made.out,
      out: join(folder, 'apart'),
      recipe: { ...defaultRecipe, ...scheme },
      formats: ['compressed-tensors'],
      calibration,
      tool,
      commandLine: '',
    },
    env,
  );
  expect(hash('once')).toBe(hash('apart'));
});

it('takes no mixture that another recipe made', async () => {
  await runMoe(job('other.mixture', { active: 10 }), env);
  await expect(moeInStages(job('other'), { quantize: scheme }, undefined, env)).rejects.toThrow('exists already');
});

it('refuses an output that exists before any work', async () => {
  mkdirSync(join(folder, 'there'));
  writeFileSync(join(folder, 'there', 'config.json'), '{}');
  await expect(moeInStages(job('there'), { quantize: scheme }, undefined, env)).rejects.toThrow('exists already');
  expect(existsSync(join(folder, 'there.mixture'))).toBe(false);
});

it('refuses a file as output', async () => {
  await expect(moeInStages(job('x.bin'), { quantize: scheme }, undefined, env)).rejects.toThrow('writes a folder');
});
