// Several devices share the windows of each step: they must do what one does.
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import type { JobEnv } from '../../src/backend/env.js';
import { joinDevices, openDevice } from '../../src/backend/load.js';
import { silentLog, type ProgressStep } from '../../src/base/log.js';
import { Random } from '../../src/base/rng.js';
import { copyInto } from '../../src/tensor/ops.js';
import { Tape } from '../../src/tensor/tape.js';
import { Scope } from '../../src/tensor/tensor.js';
import type { DistillOptions } from '../../src/train/distill/options.js';
import { runDistill } from '../../src/train/distill/run.js';
import type { EndToEndOutcome } from '../../src/train/end-to-end.js';
import type { QatOptions } from '../../src/train/options.js';
import { runQat } from '../../src/train/run.js';
import { defaultAdam } from '../../src/tune/parameters.js';
import { ShardedOptimizer, type Copy } from '../../src/tune/sharded.js';
import { archCase } from '../arch/support.js';
import { refusal } from '../support/refusal.js';
import { hashesOf } from '../support/shards.js';

const folder = mkdtempSync(join(tmpdir(), 'data-parallel-'));
afterAll(() => rmSync(folder, { recursive: true }));

/** Surroundings with so many CPU devices. */
function surroundings(ranks: number): JobEnv {
  const devices = Array.from({ length: ranks }, () => openDevice({ kind: 'cpu', threads: 1, poison: true }));
  afterAll(() => {
    for (const device of devices) {
      expect(device.memory().buffers, 'buffers left').toBe(0);
      device.close();
    }
  });
  const group = ranks > 1 ? { group: joinDevices(devices) } : {};
  return { device: devices[0]!, ...group, log: silentLog, signal: new AbortController().signal };
}
const alone = surroundings(1);
const pair = surroundings(2);
const three = surroundings(3);

const bound = 1e-5;
/** The same losses, norms and choice, but for the rounding of sums. */
function expectSameTraining(actual: EndToEndOutcome, expected: EndToEndOutcome): void {
  const close = (a: number | null, b: number | null, what: string) => {
    if (a === null || b === null) expect(a, what).toBe(b);
    else expect(Math.abs(a - b), what).toBeLessThanOrEqual(bound * Math.abs(b));
  };
  expect(actual.steps).toHaveLength(expected.steps.length);
  actual.steps.forEach((step, i) => {
    const other = expected.steps[i]!;
    expect(step.lr).toBe(other.lr);
    for (const key of ['loss', 'crossEntropy', 'kl', 'hidden', 'norm'] as const) close(step[key], other[key], `${key} of step ${i + 1}`); // prettier-ignore
  });
  expect(actual.judgements.map(({ step }) => step)).toEqual(expected.judgements.map(({ step }) => step));
  actual.judgements.forEach((one, i) => close(one.loss, expected.judgements[i]!.loss, `judgement ${i}`));
  expect(actual.best).toBe(expected.best);
  for (const [block, norm] of Object.entries(expected.health.blocks)) {
    close(actual.health.blocks[block]!, norm, `norm of block ${block}`);
  }
}

const input = archCase('llama');
const tool = { name: 'deepseek-convert', version: 'test' };
const text = { source: 'self', samples: 36, seqLen: 12, seed: 0 } as const;

describe('distill on several devices', () => {
  const options = (name: string, more: Partial<DistillOptions> = {}): DistillOptions => ({
    ...{ input, tool, out: join(folder, name), shape: { layers: 1, hidden: 24 }, init: 'teacher', calibration: text },
    ...{ epochs: 2, batch: 6, lr: 1e-2, warmup: 0.1, weightDecay: 0.01, gradClip: 1, kl: 1, hidden: 1, crossEntropy: 0.1 },
    ...{ temperature: 2, failOnAlarm: false, seed: 0, commandLine: 'deepseek-convert distill' },
    ...more,
  }); // prettier-ignore

  /** 34 windows are trained on: the sixth step of an epoch has four, which do not divide by three. */
  const steps = 12;
  const expected = runDistill(options('one'), alone);

  test.each([
    ['two', pair],
    ['three', three],
  ])('%s follow one', async (name, env) => {
    const { training, perplexity } = await runDistill(options(name), env);
    const one = await expected;
    expect(one.training.steps).toHaveLength(steps);
    expect(one.training.steps.some(({ norm }) => norm > 1)).toBe(true); // clipped
    expectSameTraining(training, one.training);
    expect(perplexity.student / one.perplexity.student).toBeCloseTo(1, 3);
  });

  test('from random weights too', async () => {
    const more = { init: 'random', kl: 0, hidden: 0, crossEntropy: 1 } as const;
    const results = [];
    for (const [i, env] of [alone, pair].entries()) results.push(await runDistill(options(`random-${i}`, more), env));
    expectSameTraining(results[1]!.training, results[0]!.training);
  });

  test('the same bytes twice, and after an interruption', async () => {
    const whole = hashesOf((await runDistill(options('whole'), pair)).out);
    const job = options('resumed');
    await refusal(runDistill(job, interrupted(pair, 7)));
    const { resumed, out } = await runDistill(job, pair);
    expect(resumed).toBe(true);
    expect(hashesOf(out)).toEqual(whole);
  });

  test.each([
    ['two to one', pair, alone],
    ['one to three', alone, three],
  ])('an interrupted run goes on with another number of devices: %s', async (name, before, after) => {
    const job = options(name.replaceAll(' ', '-'));
    expect((await refusal(runDistill(job, interrupted(before, 7)))).exitCode).toBe(75);
    const { training, resumed } = await runDistill(job, after);
    expect(resumed).toBe(true);
    expectSameTraining(training, (await expected).training);
  });

  test('a batch that does not divide is refused', async () => {
    const error = await refusal(runDistill(options('odd', { batch: 4 }), three));
    expect(error.message).toMatch(
      /do not divide among the devices: expected a multiple of 3, got --batch 4 on 3 devices/,
    );
    expect(error.exitCode).toBe(2);
  });
});

describe('qat of a whole model on several devices', () => {
  const options = (name: string, more: Partial<QatOptions> = {}): QatOptions => ({
    ...{ input, tool, out: join(folder, `qat-${name}`), groupSize: 32, fakeQuant: true, calibration: text },
    ...{ epochs: 0, endToEnd: 'full', endToEndEpochs: 2, batch: 6, endToEndLr: 0.02, warmup: 0.1, weightDecay: 0 },
    ...{ gradClip: 1, crossEntropy: 0.5, kl: 1, hidden: 1, rank: 4, cleanInputs: 0.25, failOnAlarm: false, seed: 0 },
    commandLine: 'deepseek-convert qat',
    ...more,
  });

  test.each([
    ['scales', { endToEnd: 'scales' }],
    ['lora', { endToEnd: 'lora' }],
    ['full', { endToEnd: 'full' }],
    ['no-fake-quant', { fakeQuant: false, endToEndLr: 1e-3, kl: 0, hidden: 0, crossEntropy: 1 }],
  ] as const)('%s: two follow one', async (name, more) => {
    const one = await runQat(options(name, more), alone);
    const two = await runQat(options(`${name}-two`, more), pair);
    expect(one.endToEnd!.steps.length).toBe(12);
    expectSameTraining(two.endToEnd!, one.endToEnd!);
  });

  test('block by block alone is refused', async () => {
    const error = await refusal(runQat(options('none', { epochs: 1, endToEnd: 'none' }), pair));
    expect(error.message).toMatch(/block by block one device does all: expected --end-to-end/);
    expect(error.exitCode).toBe(2);
  });
});

/** Stops once a step of the training is done. */
function interrupted(env: JobEnv, step: number): JobEnv {
  const abort = new AbortController();
  const progress = ({ stage, done }: ProgressStep) => stage === 'distill' && done === step && abort.abort();
  return { ...env, signal: abort.signal, log: { ...silentLog, progress } };
}

describe('the sharded optimizer', () => {
  // Also parameters of fewer values than ranks, whose last parts are empty.
  const shapes = [[1, 1], [2], [5, 7], [64, 33]]; // prettier-ignore
  const random = new Random(3);
  const draw = (n: number) => Float32Array.from({ length: n }, () => 2 * random.uniform() - 1);
  const sizes = shapes.map((shape) => shape.reduce((a, b) => a * b, 1));
  const start = sizes.map(draw);
  /** Of each step, rank of three, and parameter. */
  const gradients = Array.from({ length: 4 }, () => Array.from({ length: 3 }, () => sizes.map(draw)));

  /** Values behind each step; ranks beyond those there are add to the last one's gradients. */
  async function trained(env: JobEnv): Promise<{ values: Float32Array[][]; norms: number[] }> {
    const devices = env.group?.devices ?? [env.device];
    const scopes = devices.map((device) => new Scope(device));
    const copies: Copy[] = devices.map((device, r) => ({
      device,
      parameters: shapes.map((shape, i) => ({
        name: String(i),
        value: scopes[r]!.from('f32', shape, r === 0 ? start[i]! : new Float32Array(sizes[i]!)),
        ...{ rate: 1 + i, decay: i % 2 === 1, block: i - 1 },
      })),
    }));
    const norms: number[] = [];
    const values: Float32Array[][] = [];
    {
      using optimizer = new ShardedOptimizer(copies, { ...defaultAdam, decay: 0.1, clip: 30 }, env.group);
      // Only the first rank's part of the start is right on it alone.
      for (const [r, { optimizer: own }] of optimizer.ranks.entries()) {
        own.parameters.forEach(({ value }, i) => {
          using scope = new Scope(devices[r]!);
          const first = scope.from('f32', [sizes[i]!], start[i]!);
          const from = value.byteOffset / 4;
          copyInto(value, first.slice(0, from, from + value.count));
        });
      }
      optimizer.spread();
      for (const step of gradients) {
        for (const [r, own] of step.entries()) {
          const rank = Math.min(r, devices.length - 1);
          using tape = new Tape(devices[rank]!);
          optimizer.ranks[rank]!.leaves(tape);
          own.forEach((g, i) => tape.seed(copies[rank]!.parameters[i]!.value, tape.scope.from('f32', shapes[i]!, g)));
        }
        norms.push((await optimizer.step(0.01)).norm);
        for (const { parameters } of copies.slice(1)) {
          const pairs = parameters.map(async ({ value }, i) =>
            expect(await value.bytesOut()).toEqual(await copies[0]!.parameters[i]!.value.bytesOut()),
          );
          await Promise.all(pairs);
        }
        values.push(await Promise.all(copies[0]!.parameters.map(({ value }) => value.float32())));
      }
    }
    for (const scope of scopes) scope[Symbol.dispose]();
    return { values, norms };
  }

  test.each([
    ['two', pair],
    ['three', three],
  ])('of %s devices makes the steps that one makes', async (_, env) => {
    const [one, many] = [await trained(alone), await trained(env)];
    expect(one.norms.some((norm) => norm > 30)).toBe(true);
    many.norms.forEach((norm, i) => expect(norm / one.norms[i]!).toBeCloseTo(1, 6));
    many.values.forEach((values, step) =>
      values.forEach((value, i) =>
        value.forEach((v, k) => expect(Math.abs(v - one.values[step]![i]![k]!), `step ${step}, ${i}[${k}]`).toBeLessThan(1e-5)),
      ),
    ); // prettier-ignore
  });
});
