import { createHash } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test, vi } from 'vitest';
import { forwardContext } from '../../src/arch/context.js';
import { openModel } from '../../src/arch/open.js';
import { WeightReader } from '../../src/arch/weights.js';
import type { JobEnv } from '../../src/backend/env.js';
import { readSafetensors } from '../../src/formats/safetensors.js';
import { OpenFile } from '../../src/formats/source.js';
import { moeInStages } from '../../src/commands/moe-then.js';
import { runMoe, type MoeOptions } from '../../src/moe/run.js';
import { run } from '../../src/nn/run.js';
import { Scope } from '../../src/tensor/tensor.js';
import type { MixtureTraining } from '../../src/train/moe/options.js';
import { trainedModel } from '../../src/train/moe/student.js';
import { archCase, relativeError, testEnv } from '../arch/support.js';

vi.setConfig({ testTimeout: 120_000 });
// One thread: operations this small only wait for a second one.
const env = testEnv(1);
const folder = mkdtempSync(join(tmpdir(), 'moe-distill-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const input = archCase('llama');
const job = (name: string, more: Partial<MoeOptions> = {}): MoeOptions => ({
  input,
  out: join(folder, name),
  method: 'split',
  container: 'glm4_moe',
  experts: 7,
  active: 3,
  refit: false, // there is much to learn
  calibration: { source: 'self', samples: 24, seqLen: 48, seed: 0 },
  rounds: 0,
  steps: 2,
  tool: { name: 'deepseek-convert', version: '0.0.0' },
  commandLine: 'deepseek-convert moe',
  ...more,
});
const rates = { router: 0.02, scales: 0.01, lora: 0.003, full: 0.002 } as const;
const training = (part: MixtureTraining['part'], more: Partial<MixtureTraining> = {}): MixtureTraining => ({
  ...{
    part,
    tokens: 3072,
    passes: 1,
    batch: 8,
    lr: rates[part],
    hidden: 1,
    rank: 4,
    routerRate: 0,
    failOnAlarm: false,
  },
  ...more,
});
const bytes = (name: string) => readFileSync(join(folder, name, 'model.safetensors'));
const hash = (name: string) => createHash('sha256').update(bytes(name)).digest('hex');

const reportOf = (name: string) =>
  JSON.parse(readFileSync(join(folder, name, 'deepseek-convert.json'), 'utf8')) as {
    mixture: { allExpertsOn: { split: { relative: number } } };
    distillation: { health: { medianNorm: number } };
    validation: { heldOut: unknown };
  };

/** Name, type, shape and bytes of all tensors. */
function tensorsOf(name: string) {
  using file = new OpenFile(join(folder, name, 'model.safetensors'));
  return new Map(
    readSafetensors(file).tensors.map(({ name: key, shape, span, encoding }) => [
      key,
      { form: JSON.stringify([shape, encoding]), hash: createHash('sha256').update(file.read(span.offset, span.bytes, key)).digest('hex') },
    ]),
  ); // prettier-ignore
}

/** Names of the tensors that are not what they were in the mixture. */
function changed(name: string, before: ReturnType<typeof tensorsOf>): string[] {
  const now = tensorsOf(name);
  expect([...now.keys()]).toEqual([...before.keys()]);
  for (const [key, { form }] of now) expect(form, key).toBe(before.get(key)!.form);
  return [...now].filter(([key, tensor]) => tensor.hash !== before.get(key)!.hash).map(([key]) => key);
}

describe('a distilled mixture', async () => {
  await runMoe(job('mixture'), env);
  const before = tensorsOf('mixture');
  const config = readFileSync(join(folder, 'mixture', 'config.json'), 'utf8');
  let once = '';

  test.each([
    ['full', /self_attn|experts|layernorm/, 0.97],
    ['lora', /self_attn|experts|layernorm/, 0.98],
    ['scales', /self_attn|experts|layernorm/, 0.995],
    ['router', /mlp\.gate\.(weight|e_score_correction_bias)$/, 1],
  ] as const)('%s: it comes closer to the dense model, in the same tensors', async (part, parts, bound) => {
    const { distilled } = await moeInStages(job(part), { distill: training(part) }, undefined, env); // prettier-ignore
    const { heldOut, training: trained, tokens } = distilled!;
    once = distilled!.calibration;
    expect(heldOut.after).toBeLessThan(bound * heldOut.before);
    expect(tokens).toBe(3072);
    expect(trained.steps).toHaveLength(8);
    expect(trained.health.nonFinite).toBe(0);
    const names = changed(part, before);
    expect(names.length).toBeGreaterThan(0);
    expect(names.filter((name) => !parts.test(name))).toEqual([]);
    expect(readFileSync(join(folder, part, 'config.json'), 'utf8')).toBe(config);
    expect(existsSync(join(folder, `${part}.mixture`))).toBe(false);
    const report = reportOf(part);
    expect(report.mixture.allExpertsOn.split.relative).toBeLessThan(5e-5);
    expect(report.distillation.health.medianNorm).toBeGreaterThan(0);
    expect(report.validation.heldOut).toEqual(heldOut);
  });

  test('routers learn along where they are asked to', async () => {
    const { distilled } = await moeInStages(job('along'), { distill: training('full', { routerRate: 2 }) }, undefined, env); // prettier-ignore
    expect(distilled!.heldOut.after).toBeLessThan(0.97 * distilled!.heldOut.before);
    expect(changed('along', before)).toEqual(expect.arrayContaining([...changed('full', before), ...changed('router', before)])); // prettier-ignore
    expect(changed('full', before)).not.toEqual(expect.arrayContaining(changed('router', before)));
  });

  test('the same text goes several times through where it is asked to', async () => {
    const { distilled } = await moeInStages(job('twice'), { distill: training('full', { passes: 2 }) }, undefined, env); // prettier-ignore
    const { heldOut, training: trained, tokens, passes, calibration } = distilled!;
    expect([trained.steps.length, Math.round(passes)]).toEqual([16, 2]);
    expect(tokens).toBeGreaterThan(1.8 * 3072); // the last batch of a pass may be smaller
    expect(calibration).toBe(once);
    expect(heldOut.after).toBeLessThan(0.97 * heldOut.before);
  });

  test('is the mixture where every step makes it worse', async () => {
    const { distilled } = await moeInStages(job('ruined'), { distill: training('full', { lr: 10 }) }, undefined, env);
    expect(distilled!.training.best).toBe(0);
    expect(distilled!.heldOut.after).toBeCloseTo(distilled!.heldOut.before, 5);
    expect(changed('ruined', before)).toEqual([]);
  });

  test('interrupted at any step, it ends with the same bytes', async () => {
    for (const at of [3, 6]) {
      const stop = new AbortController();
      const progress = ({ stage, done }: { stage: string; done: number }) => stage === 'distill' && done >= at && stop.abort(); // prettier-ignore
      const interrupted: JobEnv = { ...env, log: { ...env.log, progress }, signal: stop.signal };
      await expect(moeInStages(job('again'), { distill: training('full') }, undefined, interrupted)).rejects.toThrow('the training so far is saved'); // prettier-ignore
      expect(existsSync(join(folder, 'again'))).toBe(false);
    }
    const { mixture, distilled } = await moeInStages(job('again'), { distill: training('full') }, undefined, env); // prettier-ignore
    expect([mixture.seconds, distilled!.resumed]).toEqual([0, true]);
    expect(hash('again')).toBe(hash('full'));
    const { distillation, validation } = reportOf('full');
    expect(reportOf('again')).toMatchObject({ distillation, validation });
  });

  test('is quantized behind it, and goes on there', async () => {
    const stages = { distill: training('scales'), quantize: { bits: 4, groupSize: 32 } } as const;
    const stop = new AbortController();
    // What calibration says before the first block, of the distilled mixture.
    const debug = (text: string) => text.startsWith('calibration:') && existsSync(join(folder, 'small.distilled')) && stop.abort(); // prettier-ignore
    const interrupted: JobEnv = { ...env, log: { ...env.log, debug }, signal: stop.signal };
    await expect(moeInStages(job('small'), stages, undefined, interrupted)).rejects.toThrow('saved');
    expect(hash('small.distilled')).toBe(hash('scales'));
    const { distilled, quantized } = await moeInStages(job('small'), stages, undefined, env);
    expect([distilled!.resumed, distilled!.seconds, quantized!.resumed]).toEqual([true, 0, true]);
    const open = await openModel(join(folder, 'small'));
    await open.close();
    expect(open.layout?.description).toContain('compressed-tensors');
    for (const name of ['small.mixture', 'small.distilled', 'small.part']) expect(existsSync(join(folder, name)), name).toBe(false); // prettier-ignore
  });

  test('is a file where one is asked for', async () => {
    const { distilled } = await moeInStages(job('one.bin'), { distill: training('scales', { tokens: 768 }) }, undefined, env); // prettier-ignore
    expect(distilled!.out).toBe(join(folder, 'one.bin'));
    expect(readFileSync(join(folder, 'one.bin')).subarray(0, 2).toString()).toBe('PK');
  });

  test('is not made of a mixture that other options made', async () => {
    await runMoe(job('other.mixture', { active: 2 }), env);
    await expect(moeInStages(job('other'), { distill: training('scales') }, undefined, env)).rejects.toThrow('exists already'); // prettier-ignore
  });
});

test.each(['glm4_moe', 'qwen2_moe', 'mixtral'])(
  'all experts compute what the chosen ones do: %s',
  async (name) => {
    const open = await openModel(archCase(name));
    using scope = new Scope(env.device);
    const reader = new WeightReader(open, env.device, 'f32');
    const ids = Int32Array.from({ length: 24 }, (_, i) => (7 * i) % 64);
    const outer = await reader.outer(scope);
    const start = open.model.embed(scope.from('i32', [2, 12], ids), forwardContext(scope, open.model, outer, 2, 12));
    for (const part of ['full', 'router'] as const) {
      const model = trainedModel(open.model, { part, routerRate: 0 });
      for (const [i, block] of open.model.blocks.entries()) {
        const ctx = () => forwardContext(scope, model, weights, 2, 12);
        const weights = await reader.block(i, scope);
        const expected = await run(block.forward(start, ctx()), ctx()).float32();
        const own = ctx();
        expect(relativeError(await run(model.blocks[i]!.forward(start, own), own).float32(), expected)).toBeLessThan(1e-5);
      }
      if (part === 'router') expect(model.blocks.some((block, i) => block !== open.model.blocks[i])).toBe(true);
    }
    await open.close();
  },
); // prettier-ignore
