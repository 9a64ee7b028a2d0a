import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import type { JobEnv } from '../../../src/backend/env.js';
import { silentLog } from '../../../src/base/log.js';
import { quantize, type QuantizeOptions } from '../../../src/quant/run.js';
import { defaultRecipe, defaultRounding, type Recipe, type Rounding } from '../../../src/quant/scheme.js';
import { binary, matmulT, reduce } from '../../../src/tensor/ops.js';
import { Tape } from '../../../src/tensor/tape.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { SignDescent } from '../../../src/tune/parameters.js';
import { inCells, positionsOf, RoundingUnit } from '../../../src/tune/rounding.js';
import { linear } from '../../../src/tune/schedule.js';
import { archCase, fixture, testEnv, trainedModel } from '../../arch/support.js';
import { refusal } from '../../support/refusal.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'autoround-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

interface Learned {
  readonly w: number[];
  readonly x: number[];
  readonly target: number[];
  readonly scale0: number[];
  readonly zero0: number[];
  readonly errors: number[];
  readonly offset: number[];
  readonly codes: number[];
  readonly scale: number[];
  readonly zero: number[] | null;
}
type Case = { n: number; k: number; group: number; tokens: number; steps: number; lr: number } & Record<'symmetric' | 'asymmetric', Learned>; // prettier-ignore
const torch = JSON.parse(readFileSync(fixture('train', 'rounding.json'), 'utf8')) as Case;

describe('rounding offsets', () => {
  it.each(['symmetric', 'asymmetric'] as const)('learn as torch makes them learn: %s', async (kind) => {
    const { n, k, group, tokens, steps, lr, [kind]: expected } = torch;
    using scope = new Scope(env.device);
    const tensor = (shape: number[], values: number[]) => scope.from('f32', shape, Float32Array.from(values));
    const zero = kind === 'asymmetric' ? { zero: tensor([n, k / group], expected.zero0) } : {};
    const grid = { scale: tensor([n, k / group], expected.scale0), ...zero, low: -8, high: 7, group };
    const positions = positionsOf(scope, tensor([n, k], expected.w), grid);
    const unit = new RoundingUnit(scope, { name: 'x', positions, grid, stored: ['bf16'], fixedGrid: false, block: 0 });
    using descent = new SignDescent(env.device, unit.parameters);
    const [x, target] = [tensor([tokens, k], expected.x), tensor([tokens, n], expected.target)];
    for (let step = 0; step < steps; step++) {
      using tape = new Tape(env.device);
      descent.leaves(tape);
      const y = tape.record(() => matmulT(tape.scope, x, unit.value(tape.scope, 'f32')));
      const d = binary(tape.scope, 'sub', y, target);
      const error = await reduce(tape.scope, 'sumsq', d.view(1, -1), 1).float32();
      expect(error[0]! / expected.errors[step]!).toBeCloseTo(1, 4);
      tape.seed(y, d);
      tape.backward();
      await descent.step(lr * linear(step, steps, 0));
      unit.project(scope);
    }
    const offsets = await unit.parameters[0]!.value.float32();
    offsets.forEach((offset, i) => expect(offset, `offset ${i}`).toBeCloseTo(expected.offset[i]!, 5));
    const result = unit.result(scope);
    expect([...(await result.codes.int8())]).toEqual(expected.codes);
    expect([...(await result.grid.scale.float32())]).toEqual([...Float32Array.from(expected.scale)]);
    if (expected.zero) expect([...(await result.grid.zero!.float32())]).toEqual(expected.zero);
  });

  it('begin inside the cells of codes that feedback chose', async () => {
    using scope = new Scope(env.device);
    const w = scope.from('f32', [1, 4], Float32Array.of(0.1, 0.9, -3.2, 5));
    const codes = scope.from('i8', [1, 4], Int8Array.of(1, 1, -3, 7));
    const grid = { scale: scope.from('f32', [1, 1], Float32Array.of(1)), low: -8, high: 7, group: 4 };
    const inside = await inCells(scope, w, codes, grid, 0.1).float32();
    [0.6, 0.9, -3.2, 6.6].forEach((value, i) => expect(inside[i]).toBeCloseTo(value, 6));
  });
});

const job = (name: string, rounding: Partial<Rounding>, recipe: Partial<Recipe> = {}, more: Partial<QuantizeOptions> = {}): QuantizeOptions => ({
  input: trainedModel('v1.0', 'v1.0_checkpoint.bin')!,
  out: join(folder, name),
  recipe: { ...defaultRecipe, method: 'autoround', rounding: { ...defaultRounding, ...rounding }, ...recipe },
  formats: ['compressed-tensors'],
  calibration: { source: [fixture('samples.jsonl')], samples: 16, seqLen: 32, seed: 0 },
  tool: { name: 'deepseek-convert', version: 'test' },
  commandLine: 'deepseek-convert quantize',
  ...more,
}); // prettier-ignore
const self = { source: 'self', samples: 32, seqLen: 8, seed: 0 } as const;
const few = { calibration: { source: [fixture('samples.jsonl')], samples: 8, seqLen: 32, seed: 0 } };
const tiny = { input: archCase('llama'), calibration: self };
const bytes = (name: string) => readFileSync(join(folder, name, 'model.safetensors'));

describe('autoround', () => {
  const learning = { steps: 16, batch: 8, start: 'rtn' } as const;

  it('brings the blocks’ outputs closer to those of the model', async () => {
    const { blocks, verified } = await quantize(job('whole', learning), env);
    expect(verified).toBe(28);
    for (const { rounding, linears } of blocks) {
      expect(rounding!.after).toBeLessThan(0.95 * rounding!.before);
      expect(rounding!.steps).toBe(16);
      for (const { method, error, plainError } of linears) {
        expect(method).toBe('autoround');
        expect(error).toBeLessThanOrEqual(plainError);
      }
    }
  }, 120_000);

  it('interrupted, goes on to the same bytes', async () => {
    const quick = { steps: 4, batch: 4, start: 'rtn', lr: 0.02 } as const;
    const abort = new AbortController();
    const stopping: JobEnv = {
      ...env,
      signal: abort.signal,
      log: { ...silentLog, progress: ({ done }) => done === 2 && abort.abort() },
    };
    const own = job('resumed', quick, {}, few);
    expect((await refusal(quantize(own, stopping))).exitCode).toBe(75);
    expect(existsSync(own.out)).toBe(false);
    expect((await refusal(quantize(job('resumed', { ...quick, steps: 9 }, {}, few), env))).message).toMatch(/rounding\.steps: 4 -> 9/); // prettier-ignore
    expect((await quantize(own, env)).resumed).toBe(true);
    const { blocks } = await quantize(job('uninterrupted', quick, {}, few), env);
    for (const { rounding } of blocks) expect(rounding!.best).toBeGreaterThan(0);
    expect(bytes('resumed').equals(bytes('uninterrupted'))).toBe(true);
  }, 120_000);

  it('is never worse than its start: with a ruinous learning rate error feedback’s codes stay', async () => {
    const { blocks } = await quantize(job('ruin', { steps: 2, batch: 8, lr: 1 }, {}, tiny), env);
    expect(blocks.map(({ rounding }) => rounding!.best)).toEqual([0, 0]);
    await quantize(job('gptq', {}, { method: 'gptq' }, { ...tiny, states: 'f32' }), env);
    expect(bytes('ruin').equals(bytes('gptq'))).toBe(true);
  }, 120_000);

  it('keeps what single linears have learned where the whole block is no better', async () => {
    const { blocks } = await quantize(job('parts', { steps: 6, batch: 8, lr: 0.1 }, {}, tiny), env);
    const { before, after, best, parts } = blocks[1]!.rounding!;
    expect(best).toBe(0);
    expect(parts).toBeGreaterThan(0);
    expect(parts).toBeLessThan(4);
    expect(after).toBeLessThan(before);
    expect(bytes('parts').equals(bytes('ruin'))).toBe(false);
  }, 120_000);

  it('takes windows that stay in files, and blocks that are independent', async () => {
    const quick = { steps: 8, batch: 4, start: 'rtn', lr: 0.02 } as const;
    const { blocks: held } = await quantize(job('held', quick, {}, { ...tiny, batchRows: 4 }), env);
    await quantize(job('spilled', quick, {}, { ...tiny, batchRows: 4, budget: 1 }), env);
    for (const { rounding } of held) expect(rounding!.best).toBeGreaterThan(0);
    expect(bytes('spilled').equals(bytes('held'))).toBe(true);
    const { blocks } = await quantize(job('independent', quick, {}, { ...tiny, independentBlocks: true }), env);
    expect(blocks[1]!.rounding!.before).not.toBe(0);
    expect(bytes('independent').equals(bytes('held'))).toBe(false);
  }, 120_000);

  it('chooses codes for every format, with zero points and in blocks', async () => {
    const quick = { steps: 2, batch: 8, start: 'rtn', lr: 0.1 } as const;
    const formats = ['gptq', 'onnx', 'safetensors'] as const;
    const { verified } = await quantize(job('formats', quick, { symmetric: false }, { ...few, formats }), env);
    expect(verified).toBe(3 * 28);
    const { blocks } = await quantize(job('gguf', quick, {}, { ...few, formats: ['gguf'] }), env);
    expect(blocks.some(({ rounding }) => rounding!.best > 0)).toBe(true);
  }, 120_000);

  it('learns the experts of a mixture, judged by what it learns from where windows are few', async () => {
    const { blocks } = await quantize(
      job(
        'mixture',
        { ...learning, steps: 32 },
        {},
        { input: archCase('mixtral'), scope: 'experts', calibration: { ...self, samples: 15, seqLen: 16 } },
      ),
      env,
    );
    for (const { rounding } of blocks) expect(rounding!.after).toBeLessThan(rounding!.before);
  }, 120_000);

  it('refuses what has no gradients', async () => {
    const error = await refusal(
      quantize(job('v4', {}, {}, { input: archCase('deepseek_v4'), calibration: self }), env),
    );
    expect(error.message).toMatch(/cannot be trained.*model_type deepseek_v4/s);
  });
});
