import { createHash } from 'node:crypto';
import {
  copyFileSync, existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync,
} from 'node:fs'; // prettier-ignore
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { JobEnv } from '../../src/backend/env.js';
import { ConvertError } from '../../src/base/errors.js';
import { silentLog, type ProgressStep } from '../../src/base/log.js';
import { openModel } from '../../src/arch/open.js';
import { rotationOf } from '../../src/arch/rotate.js';
import { quantize } from '../../src/quant/run.js';
import { defaultRecipe } from '../../src/quant/scheme.js';
import type { QatOptions } from '../../src/train/options.js';
import { trainingReport } from '../../src/train/report.js';
import { runQat } from '../../src/train/run.js';
import { archCase, fixture, testEnv, trainedModel } from '../arch/support.js';
import { convert } from '../support/models.js';
import { refusal } from '../support/refusal.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'qat-'));
afterAll(() => rmSync(folder, { recursive: true }));

const options = (name: string, more: Partial<QatOptions> = {}): QatOptions => ({
  input: trainedModel('v1.0', 'v1.0_checkpoint.bin')!,
  out: join(folder, name),
  groupSize: 128,
  fakeQuant: true,
  calibration: { source: [fixture('samples.jsonl')], samples: 24, seqLen: 32, seed: 0 },
  ...{ epochs: 1, endToEnd: 'full', endToEndEpochs: 1, batch: 3, lr: 0.05, endToEndLr: 0.05, warmup: 0.1 },
  ...{
    weightDecay: 0,
    gradClip: 1,
    crossEntropy: 0,
    kl: 1,
    hidden: 2,
    rank: 4,
    cleanInputs: 0.25,
    failOnAlarm: false,
    seed: 0,
  },
  tool: { name: 'deepseek-convert', version: 'test' },
  commandLine: 'deepseek-convert qat',
  ...more,
});

/** Ends with `interrupted` once `when` is true of a progress line. */
function interrupted(when: (step: ProgressStep) => boolean): JobEnv {
  const abort = new AbortController();
  return { ...env, signal: abort.signal, log: { ...silentLog, progress: (step) => when(step) && abort.abort() } };
}

const hashes = (path: string): Record<string, string> =>
  Object.fromEntries(
    readdirSync(path)
      .filter((name) => statSync(join(path, name)).isFile() && name !== 'deepseek-convert.json')
      .map((name) => [name, createHash('sha256').update(readFileSync(join(path, name))).digest('hex')]),
  ); // prettier-ignore

describe('qat of dense-6m', () => {
  // Plain rounding leaves something to learn, also from very little text.
  beforeAll(async () => {
    const common = { input: options('').input, out: join(folder, 'rounded'), tool: options('').tool, commandLine: '' };
    await quantize({ ...common, recipe: { ...defaultRecipe, method: 'rtn' }, formats: ['compressed-tensors'] }, env);
  }, 60_000);

  test('from a rotated model, the input is rotated too; the output knows its rotation', async () => {
    const rotate = async (name: string, seed: number) => {
      const common = { input: options('').input, out: join(folder, name), tool: options('').tool, commandLine: '' };
      const recipe = { ...defaultRecipe, method: 'rtn', rotation: { kind: 'hadamard', seed } } as const;
      await quantize({ ...common, recipe, formats: ['compressed-tensors'] }, env);
      return common.out;
    };
    const from = await rotate('rotated', 5);
    const { blocks, out } = await runQat(options('from-rotated', { from, endToEnd: 'none' }), env);
    // In another basis than its targets a block would be all wrong.
    for (const { before } of blocks) expect(before).toBeLessThan(0.1);
    expect(await rotationOf(out)).toEqual({ kind: 'hadamard', seed: 5 });
    const plain = join(folder, 'rotated-plain');
    await convert({ input: from, format: 'safetensors', dtype: 'f32' }, plain, env);
    const { message } = await refusal(runQat(options('other', { input: plain, from: join(folder, 'rounded') }), env));
    expect(message).toMatch(/does not have the rotation/);
  }, 60_000);

  let whole: Record<string, string> = {};

  test('keeps the best by windows it was not trained on, of each block and of the whole model', async () => {
    const result = await runQat(options('whole'), env);
    whole = hashes(result.out);
    expect(existsSync(`${result.out}.part`)).toBe(false);
    expect(result.linears).toBe(28);
    for (const { before, after } of result.blocks) expect(after).toBeLessThanOrEqual(before);
    const { judgements, best, steps } = result.endToEnd!;
    expect(steps).toHaveLength(8);
    const kept = judgements.find(({ step }) => step === best)!;
    expect(kept.loss).toBe(Math.min(...judgements.map(({ loss }) => loss)));
    // Steps count hidden states too; predictions alone judge.
    for (const { loss, kl, hidden } of steps) expect(loss).toBeCloseTo(kl! + 2 * hidden!, 6);
    for (const { hidden } of steps) expect(hidden).toBeGreaterThan(0);
    for (const { loss, kl } of judgements) expect(loss).toBe(kl);
    const page = trainingReport(result);
    expect(page).toMatch(/<svg/);
    expect(page).not.toMatch(/https?:|NaN|Infinity/);
    const provenance = JSON.parse(readFileSync(join(result.out, 'deepseek-convert.json'), 'utf8')) as { report?: object };
    expect(JSON.stringify(provenance)).toContain('"endToEnd":{"steps":[{"loss"');
  }, 120_000); // prettier-ignore

  test.each([
    ['in a block', (step: ProgressStep) => step.stage === 'qat blocks' && step.done === 2],
    ['at the fifth step of the whole model', (step: ProgressStep) => step.stage === 'qat end to end' && step.done === 5],
  ])('interrupted %s, it goes on to the same bytes', async (name, when) => {
    const job = options(`resumed-${name.length}`);
    const stopped = await runQat(job, interrupted(when)).catch((error: unknown) => error as ConvertError);
    expect(stopped).toBeInstanceOf(ConvertError);
    expect((stopped as ConvertError).exitCode).toBe(75);
    expect(existsSync(job.out)).toBe(false);
    const result = await runQat(job, env);
    expect(result.resumed).toBe(true);
    expect(hashes(result.out)).toEqual(whole);
  }, 120_000); // prettier-ignore

  test('refuses to go on with other settings', async () => {
    const job = options('other');
    await runQat(
      job,
      interrupted((step) => step.stage === 'qat blocks'),
    ).catch(() => undefined);
    await expect(runQat({ ...job, lr: 0.2 }, env)).rejects.toThrow(/recipe\.lr: 0\.05 -> 0\.2/);
  }, 60_000);

  test.each(['scales', 'full'] as const)(
    'end to end: %s, lowers the divergence from the teacher',
    async (endToEnd) => {
      const from = join(folder, 'rounded');
      const result = await runQat(options(`${endToEnd}`, { from, epochs: 0, endToEnd, endToEndEpochs: 1, endToEndLr: 0.05 }), env); // prettier-ignore
      const { judgements, best } = result.endToEnd!;
      const kept = judgements.find(({ step }) => step === best)!;
      expect(kept.loss).toBeLessThan(judgements[0]!.loss);
      expect(result.linears).toBe(28);
    },
    60_000,
  );

  test('from an asymmetric start, an interrupted run ends with the same bytes too', async () => {
    const from = join(folder, 'asymmetric');
    const common = { input: options('').input, out: from, tool: options('').tool, commandLine: '' };
    const recipe = { ...defaultRecipe, method: 'rtn', symmetric: false } as const;
    await quantize({ ...common, recipe, formats: ['compressed-tensors'] }, env);
    const more = { from, endToEnd: 'none' } as const;
    const result = await runQat(options('zeros', more), env);
    const job = options('zeros-again', more);
    const stop = interrupted(({ stage, done }) => stage === 'qat blocks' && done === 2);
    await expect(runQat(job, stop)).rejects.toThrow(/interrupt/i);
    expect((await runQat(job, env)).resumed).toBe(true);
    expect(hashes(job.out)).toEqual(hashes(result.out));
  }, 60_000);

  test('low-rank additions learn', async () => {
    const from = join(folder, 'rounded');
    const result = await runQat(options('lora', { from, epochs: 0, endToEnd: 'lora', endToEndEpochs: 1 }), env);
    const { judgements } = result.endToEnd!;
    expect(judgements.some(({ loss }) => loss !== judgements[0]!.loss)).toBe(true);
    expect(result.linears).toBe(28);
  }, 60_000);

  test('from plain rounding, blocks learn to come closer to the full-precision ones', async () => {
    const from = join(folder, 'rounded');
    const result = await runQat(
      options('blocks', {
        from,
        epochs: 2,
        endToEnd: 'none',
        calibration: { ...options('').calibration, samples: 32 },
      }),
      env,
    );
    const gain = result.blocks.reduce((product, { before, after }) => product * (after / before), 1);
    expect(gain).toBeLessThan(0.85);
    expect(result.blocks.every(({ before, after, best }) => (best === 0 ? after === before : after < before))).toBe(true); // prettier-ignore
  }, 120_000);

  test('is never worse than its start: with a ruinous learning rate the start is kept', async () => {
    const from = join(folder, 'whole');
    const result = await runQat(options('ruin', { from, epochs: 1, lr: 30, endToEndLr: 30, endToEndEpochs: 1 }), env);
    expect(result.endToEnd!.best).toBe(0);
    expect(result.blocks.every(({ best }) => best === 0)).toBe(true);
    expect(hashes(result.out)['model.safetensors']).toBe(whole['model.safetensors']);
  }, 60_000);
});

describe('architectures', () => {
  const calibration = { source: 'self', samples: 8, seqLen: 8, seed: 0 } as const;

  test.each([
    ['deepseek_v4', /cannot be trained.*model_type deepseek_v4: its layers pass on several hidden states/],
    ['deepseek_v32', /cannot be trained.*model_type deepseek_v32: its attention chooses which keys/],
  ])('%s is refused before any work', async (name, message) => {
    const error = await refusal(runQat(options('refused', { input: archCase(name), calibration }), env));
    expect(error.exitCode).toBe(1);
    expect(error.message).toMatch(message);
    expect(existsSync(join(folder, 'refused.part'))).toBe(false);
  });

  test('a layer without quantized linears is left as it is: deepseek_v3', async () => {
    const job = options('v3', { input: archCase('deepseek_v3'), calibration, groupSize: 32, endToEnd: 'scales' });
    const { blocks, endToEnd } = await runQat(job, env);
    const [dense, experts] = blocks;
    expect([dense!.steps, dense!.best, dense!.after]).toEqual([0, 0, dense!.before]);
    expect(experts!.steps).toBeGreaterThan(0);
    expect(endToEnd!.steps.every(({ norm }) => norm > 0)).toBe(true);
  }, 60_000);
});

/** dense-6m as a folder, all matrices of one layer times 2^-27 (7.5e-9). */
async function scaledCopy(layer: number): Promise<string> {
  const open = await openModel(trainedModel('v1.0', 'v1.0_checkpoint.bin')!);
  const target = join(folder, 'scaled');
  mkdirSync(target);
  const header: Record<string, unknown> = {};
  const parts: Uint8Array[] = [];
  let at = 0;
  for (const { name, shape, span } of open.checkpoint.tensors.values()) {
    const data = new Uint8Array(readFileSync(span.path).subarray(span.offset, span.offset + span.bytes)).slice();
    if (name.includes(`layers.${layer}.`) && name.includes('proj')) {
      const halves = new Uint16Array(data.buffer);
      halves.forEach((bits, i) => (halves[i] = (bits & 0x8000) | Math.max(0, (bits & 0x7fff) - (27 << 7))));
    }
    header[name] = { dtype: 'BF16', shape, data_offsets: [at, (at += data.length)] };
    parts.push(data);
  }
  const text = Buffer.from(JSON.stringify(header));
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(text.length));
  writeFileSync(join(target, 'model.safetensors'), Buffer.concat([length, text, ...parts]));
  writeFileSync(join(target, 'config.json'), JSON.stringify(open.model.config));
  copyFileSync(fixture('v1.0', 'tokenizer.json'), join(target, 'tokenizer.json'));
  await open.close();
  return target;
}

describe('gradient alarms', () => {
  const failing = async (job: QatOptions): Promise<ConvertError> =>
    (await runQat(job, env).catch((error: unknown) => error)) as ConvertError;

  test('a learning rate of 1e3 explodes, and exits 3 when asked', async () => {
    const job = options('exploding', { fakeQuant: false, epochs: 0, endToEndLr: 1e3, kl: 0, crossEntropy: 1 });
    const error = await failing({ ...job, failOnAlarm: true });
    expect(error.message).toMatch(/Gradient alarm: (exploding|non-finite)/);
    expect(error.exitCode).toBe(3);
    expect(existsSync(job.out)).toBe(false);
    const result = await runQat({ ...job, out: join(folder, 'exploded') }, env);
    expect(result.endToEnd!.health.alarms.map(({ kind }) => kind)).toContain('exploding');
    expect(result.endToEnd!.best).toBe(0);
  }, 60_000);

  test('a block with weights scaled by 1e-8 vanishes, and exits 3 when asked', async () => {
    const job = options('vanishing', { input: await scaledCopy(2), fakeQuant: false, epochs: 0, endToEndLr: 1e-4, kl: 0, crossEntropy: 1 }); // prettier-ignore
    const error = await failing({ ...job, failOnAlarm: true });
    expect(error.message).toMatch(/Gradient alarm: vanishing.*block 2's gradients/s);
    expect(error.exitCode).toBe(3);
    const result = await runQat({ ...job, out: join(folder, 'vanished') }, env);
    const kinds = result.endToEnd!.health.alarms.map(({ kind, block }) => [kind, block]);
    expect(kinds).toContainEqual(['vanishing', 2]);
  }, 60_000);
});
