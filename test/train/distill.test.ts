import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { forwardContext } from '../../src/arch/context.js';
import { openModel, type OpenModel } from '../../src/arch/open.js';
import { buildModel } from '../../src/arch/registry.js';
import type { Model } from '../../src/arch/types.js';
import { WeightReader } from '../../src/arch/weights.js';
import { silentLog, type ProgressStep } from '../../src/base/log.js';
import { Random } from '../../src/base/rng.js';
import type { JobEnv } from '../../src/backend/env.js';
import { run } from '../../src/nn/run.js';
import { unary } from '../../src/tensor/ops.js';
import type { Tape } from '../../src/tensor/tape.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { choose, measureImportance, type Choice } from '../../src/train/distill/importance.js';
import type { DistillOptions } from '../../src/train/distill/options.js';
import { comparedWith, runDistill } from '../../src/train/distill/run.js';
import { chooseShape, parametersOf, shapeOf, studentConfig, studentModel, type Shape } from '../../src/train/distill/shape.js'; // prettier-ignore
import { cutStudent, startOfMap, type Student } from '../../src/train/distill/student.js';
import { pass, type LossWeights, type Losses } from '../../src/train/pass.js';
import { loadTeacher } from '../../src/train/setting.js';
import type { Parameter } from '../../src/tune/parameters.js';
import { archCase, fixture, relativeError, testEnv, trainedModel, type RawTensor } from '../arch/support.js';
import { refusal } from '../support/refusal.js';
import { hashesOf } from '../support/shards.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'distill-'));
afterAll(() => rmSync(folder, { recursive: true }));

const random = new Random(11);
const ids = Int32Array.from({ length: 4 * 12 }, () => random.below(64));

/** bf16 values of a matrix's rows [rows, columns], or of a vector, multiplied by 2^power; -Infinity: zero. */
function scale(t: RawTensor, power: number, rows?: readonly number[], columns?: readonly number[]): void {
  const halves = new Uint16Array(t.data.buffer);
  const width = t.shape[1] ?? 1;
  for (const [i, bits] of halves.entries()) {
    if (rows && !rows.includes(Math.floor(i / width))) continue;
    if (columns && !columns.includes(i % width)) continue;
    halves[i] = power === -Infinity || (bits & 0x7f80) === 0 ? 0 : bits + power * 0x80;
  }
}

async function opened<T>(path: string, body: (open: OpenModel, scope: Scope) => Promise<T>): Promise<T> {
  const open = await openModel(path);
  using scope = new Scope(env.device);
  try {
    return await body(open, scope);
  } finally {
    await open.close();
  }
}

async function importanceOf(open: OpenModel, scope: Scope) {
  const teacher = await loadTeacher(open, env, 'f32', scope);
  return await measureImportance({ env, teacher, tokens: ids, n: 4, length: 12, microBatch: 3, resumeHint: '' });
}

const cut = async (open: OpenModel, choice: Choice, shape: Shape, scope: Scope): Promise<Student> => {
  const model = studentModel(open.model, shape, choice.layers);
  return await cutStudent(open.model, new WeightReader(open, env.device, 'f32'), model, choice, scope, 'f32');
};

async function studentLogits({ model, outer, blocks }: Student): Promise<Float32Array> {
  using scope = new Scope(env.device);
  const context = (weights: (typeof blocks)[number]) => forwardContext(scope, model, weights.now(scope), 4, 12);
  let x = model.embed(scope.from('i32', [4, 12], ids), context(outer));
  for (const [i, block] of model.blocks.entries()) {
    const ctx = context(blocks[i]!);
    x = run(block.forward(x, ctx), ctx);
  }
  const ctx = context(outer);
  return await run(model.logits(x, ctx), ctx).float32();
}

async function teacherLogits(open: OpenModel, scope: Scope): Promise<Float32Array> {
  const { model, outer, blocks } = await loadTeacher(open, env, 'f32', scope);
  const context = (weights: typeof outer) => forwardContext(scope, model, weights, 4, 12);
  let x = model.embed(scope.from('i32', [4, 12], ids), context(outer));
  for (const [i, block] of model.blocks.entries()) {
    const ctx = context(blocks[i]!);
    x = run(block.forward(x, ctx), ctx);
  }
  const ctx = context(outer);
  return await run(model.logits(x, ctx), ctx).float32();
}

describe('the sizes of a student', () => {
  const llama8b = buildModel(
    {
      model_type: 'llama', hidden_size: 4096, num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8,
      intermediate_size: 14336, vocab_size: 128256, max_position_embeddings: 8192, rms_norm_eps: 1e-5,
    },
    'test',
  ); // prettier-ignore
  const parameters = (teacher: Model, shape: Shape) =>
    parametersOf(
      studentModel(
        teacher,
        shape,
        Array.from({ length: shape.layers }, (_, i) => i),
      ),
    );

  test.each([650e6, 1.5e9, 4e9, 0.5])('come within 1% of the parameters asked for: %d', (targetParams) => {
    const shape = chooseShape(llama8b, { targetParams });
    const wanted = targetParams < 1 ? targetParams * parametersOf(llama8b) : targetParams;
    expect(Math.abs(parameters(llama8b, shape) / wanted - 1)).toBeLessThan(0.01);
    expect(shape.hidden % 128).toBe(0);
    expect(shape.intermediate % 128).toBe(0);
  });

  test('keep what the user fixes', () => {
    const shape = chooseShape(llama8b, { targetParams: 3e9, layers: 24, hidden: 3072, heads: 32 });
    expect(shape).toMatchObject({ layers: 24, hidden: 3072, heads: 32, kvHeads: 8 });
    expect(Math.abs(parameters(llama8b, shape) / 3e9 - 1)).toBeLessThan(0.01);
    expect(chooseShape(llama8b, { layers: 16 })).toEqual({ ...shapeOf(llama8b), layers: 16 });
    expect(chooseShape(llama8b, { kvHeads: 4 })).toMatchObject({ kvHeads: 4, heads: 16 });
    expect(chooseShape(llama8b, { heads: 16, kvHeads: 8 })).toMatchObject({ kvHeads: 8, heads: 16 });
  });

  test.each([
    [{ layers: 33 }, /--layers is more than the teacher has.*at most 32, got 33/],
    [{ heads: 30 }, /do not go together.*a multiple of 4/],
    [{ heads: 32, kvHeads: 4 }, /do not go together.*at most 4 times/],
    [{ targetParams: 9e9 }, /more parameters than its teacher/],
    [{ targetParams: 1e6 }, /No student has this number.*about .* which is nearest/],
    [{ targetParams: 1e9, hidden: 4096 }, /No student has this number/],
  ])('%j is refused', async (request, message) => {
    const error = await refusal(() => void chooseShape(llama8b, request));
    expect(error.exitCode).toBe(2);
    expect(error.message).toMatch(message);
  });

  test('windows of single layers go with the layers', async () => {
    await opened(archCase('qwen2'), async ({ model }) => {
      expect(model.blocks.map(({ window }) => window)).toEqual([undefined, 8]);
      const shape = { ...shapeOf(model), layers: 1 };
      expect(studentModel(model, shape, [1]).blocks[0]!.window).toBe(8);
      const { layer_types: _, ...config } = model.config;
      const unnamed = buildModel(config, 'test');
      expect(studentModel(unnamed, shape, [1]).blocks[0]!.window).toBe(8);
      expect(studentModel(unnamed, shape, [0]).blocks[0]!.window).toBeUndefined();
      await Promise.resolve();
    });
  });
});

describe('what a student takes over', () => {
  test.each(['llama', 'llama-tied-bias', 'mistral', 'qwen2', 'qwen3'])(
    'of its own size, it is the teacher: %s',
    async (name) => {
      await opened(archCase(name), async (open, scope) => {
        const shape = shapeOf(open.model);
        const choice = choose(await importanceOf(open, scope), shape, shape);
        const student = await cut(open, choice, shape, scope);
        expect(studentConfig(open.model, shape, choice.layers)).toEqual(open.model.config);
        const reader = new WeightReader(open, env.device, 'f32');
        for (const { parameter } of [student.outer, ...student.blocks].flatMap(({ plain }) => plain)) {
          using work = new Scope(env.device);
          const whole = await (await reader.tensor(parameter.name, work)).float32();
          expect(await parameter.value.float32(), parameter.name).toEqual(whole);
        }
        expect(await studentLogits(student)).toEqual(await teacherLogits(open, scope));
      });
    },
  );

  // Parts that add nothing are taken out: what is left must compute the same.
  test.each(['llama', 'llama-tied-bias', 'qwen3'])('without the parts that do nothing, it is the teacher: %s', async (name) => {
    const [neurons, group, channels] = [[3, 17, 40], 0, [5, 6, 30]];
    const path = archCase(name, {
      tensors: (tensors) => {
        for (const [key, t] of tensors) {
          const first = key.includes('layers.0.');
          if (first && /(o_proj|down_proj)/.test(key)) scale(t, -Infinity);
          else if (key.endsWith('down_proj.weight')) scale(t, -Infinity, undefined, neurons);
          else if (/(gate|up)_proj/.test(key) && !first) scale(t, -Infinity, neurons);
          else if (/v_proj/.test(key) && !first) scale(t, -Infinity, Array.from({ length: t.shape[0]! / 2 }, (_, i) => group * (t.shape[0]! / 2) + i));
          if (/embed_tokens/.test(key)) scale(t, -Infinity, undefined, channels);
          else if (/(o_proj|down_proj)/.test(key)) scale(t, -Infinity, channels);
        }
      },
    });
    await opened(path, async (open, scope) => {
      const full = shapeOf(open.model);
      const shape = { layers: 1, hidden: full.hidden - 3, heads: full.heads / 2, kvHeads: full.kvHeads / 2, intermediate: full.intermediate - 3 };
      const importance = await importanceOf(open, scope);
      expect(importance.layers[0]).toBeCloseTo(0, 5);
      const choice = choose(importance, shape, full);
      expect(choice.layers).toEqual([1]);
      expect(choice.groups).toEqual([[1]]);
      const left = (n: number, without: readonly number[]) => Array.from({ length: n }, (_, i) => i).filter((i) => !without.includes(i));
      expect(choice.neurons).toEqual([left(full.intermediate, neurons)]);
      expect(choice.channels).toEqual(left(full.hidden, channels));
      const student = await cut(open, choice, shape, scope);
      // A mean of squares over fewer channels is larger.
      const factor = Math.sqrt(full.hidden / shape.hidden);
      for (const { parameter: { name: tensor, value } } of [student.outer, ...student.blocks].flatMap(({ plain }) => plain)) {
        if (/layernorm|model\.norm/.test(tensor)) unary(scope, 'affine', value, factor, 0, value);
      }
      expect(relativeError(await studentLogits(student), await teacherLogits(open, scope))).toBeLessThan(1e-4);
    });
  }); // prettier-ignore

  test('is what does most: neurons, heads, channels and layers that were made large', async () => {
    const [neurons, channels] = [
      [2, 9, 33],
      [4, 21],
    ];
    const path = archCase('llama', {
      tensors: (tensors) => {
        for (const [key, t] of tensors) {
          if (key.endsWith('layers.1.mlp.up_proj.weight')) scale(t, 5, neurons);
          if (key.endsWith('layers.0.self_attn.v_proj.weight'))
            scale(
              t,
              5,
              Array.from({ length: 8 }, (_, i) => 8 + i),
            );
          if (/norm/.test(key)) scale(t, 4, channels);
          if (/layers\.0\..*(o_proj|down_proj)/.test(key)) scale(t, -20);
        }
      },
    });
    await opened(path, async (open, scope) => {
      const full = shapeOf(open.model);
      const shape = { ...full, hidden: 2, heads: 2, kvHeads: 1, intermediate: 3 };
      const importance = await importanceOf(open, scope);
      const choice = choose(importance, shape, full);
      expect(choice.neurons[1]).toEqual(neurons);
      expect([choice.groups[0], choice.heads[0]]).toEqual([[1], [2, 3]]);
      expect(choice.channels).toEqual(channels);
      expect(choose(importance, { ...shape, layers: 1 }, full).layers).toEqual([1]);
    });
  });

  test('stands for the layers that were left out behind its own', () => {
    expect(comparedWith([0, 2, 3], 6)).toEqual([1, 2, 5]);
    expect(comparedWith([1, 2], 3)).toEqual([1, 2]);
  });

  test('within a group, the heads that do most', () => {
    const full = { layers: 1, hidden: 4, heads: 8, kvHeads: 2, intermediate: 2 };
    const heads = [[1, 9, 2, 8, 0, 3, 1, 2]];
    const importance = { layers: [1], channels: [1, 1, 1, 1], heads, neurons: [[1, 1]] };
    expect(choose(importance, { ...full, heads: 4 }, full).heads).toEqual([[1, 3, 5, 7]]);
    expect(choose(importance, { ...full, heads: 4, kvHeads: 1 }, full).heads).toEqual([[0, 1, 2, 3]]);
  });
});

describe('losses of a student', () => {
  /** Gradients that arrive at parameters. */
  class Gradients {
    readonly grads: Map<Parameter, Tensor>;
    constructor(scope: Scope, parameters: readonly Parameter[]) {
      this.grads = new Map(parameters.map((p) => [p, scope.zeros('f32', p.value.shape)]));
    }
    leaves(tape: Tape, only: (parameter: Parameter) => boolean = () => true): void {
      for (const [parameter, grad] of this.grads) if (only(parameter)) tape.leaf(parameter.value, grad);
    }
  }

  const shape = { layers: 1, hidden: 24, heads: 2, kvHeads: 1, intermediate: 32 };
  async function prepared(
    body: (o: {
      scope: Scope;
      parameters: readonly Parameter[];
      losses: (loss: LossWeights, gradients?: Gradients, recompute?: boolean) => Promise<Losses>;
      open: OpenModel;
      student: Student;
    }) => Promise<void>,
  ): Promise<void> {
    await opened(archCase('llama'), async (open, scope) => {
      const choice = choose(await importanceOf(open, scope), shape, shapeOf(open.model));
      const student = await cut(open, choice, shape, scope);
      const map = startOfMap(open.model, choice, scope, 'f32')!;
      const teacher = await loadTeacher(open, env, 'f32', scope);
      const losses = (loss: LossWeights, gradients?: Gradients, recompute = false) =>
        pass({ ...student, device: env.device, teacher, hiddenOf: [1], map, loss, recompute }, ids, 4, 4, gradients);
      const parameters = [student.outer, ...student.blocks, map].flatMap((part) => part.parameters);
      await body({ scope, parameters, losses, open, student });
    });
  }

  test.each([
    [
      'hidden states through the map',
      { crossEntropy: 0, kl: 0, hidden: 1 },
      false,
      ['model.norm.weight', 'lm_head.weight'],
    ],
    ['KL at a temperature of 2', { crossEntropy: 0, kl: 1, hidden: 0, temperature: 2 }, false, ['hidden_map']],
    ['all together, activations computed again', { crossEntropy: 0.3, kl: 0.5, hidden: 2, temperature: 3 }, true, []],
  ])('have the gradients of differences: %s', async (_, loss, recompute, without) => {
    await prepared(async ({ scope, parameters, losses }) => {
      const gradients = new Gradients(scope, parameters);
      await losses(loss, gradients, recompute);
      const value = async () => {
        const { crossEntropy, kl, hidden } = await losses(loss);
        return loss.crossEntropy * crossEntropy + loss.kl * kl + loss.hidden * hidden;
      };
      for (const parameter of parameters) {
        const start = await parameter.value.float32();
        const grad = await gradients.grads.get(parameter)!.float32();
        const norm = Math.hypot(...grad);
        expect(norm > 0, parameter.name).toBe(!without.includes(parameter.name));
        if (norm === 0) continue;
        // Along the gradient itself the loss changes most: differences are then well above rounding.
        const at = async (step: number) => {
          const moved = start.map((v, i) => v + (step * grad[i]!) / norm);
          env.device.upload(parameter.value.buffer, 0, new Uint8Array(moved.buffer));
          return value();
        };
        const slope = ((await at(2e-2)) - (await at(-2e-2))) / 4e-2;
        await at(0);
        expect(Math.abs(slope / norm - 1), `${parameter.name}: ${slope} by differences, ${norm}`).toBeLessThan(0.03);
      }
    });
  });

  test('KL at a temperature is that of softened predictions, times its square', async () => {
    await prepared(async ({ losses, open, student, scope }) => {
      const temperature = 2.5;
      const { kl } = await losses({ crossEntropy: 0, kl: 1, hidden: 0, temperature });
      const [p, q] = [await teacherLogits(open, scope), await studentLogits(student)];
      const logSoftmax = (row: Float32Array) => {
        const all = Math.log(row.reduce((sum, v) => sum + Math.exp(v / temperature), 0));
        return Array.from(row, (v) => v / temperature - all);
      };
      let sum = 0;
      for (let t = 0; t < ids.length; t++) {
        const [a, b] = [p, q].map((logits) => logSoftmax(logits.subarray(64 * t, 64 * (t + 1))));
        a!.forEach((value, i) => (sum += Math.exp(value) * (value - b![i]!)));
      }
      expect(kl / ((temperature ** 2 * sum) / ids.length)).toBeCloseTo(1, 4);
    });
  });
});

describe('distill', () => {
  const options = (name: string, more: Partial<DistillOptions> = {}): DistillOptions => ({
    input: trainedModel('v1.0', 'v1.0_checkpoint.bin')!,
    out: join(folder, name),
    shape: { targetParams: 0.5, layers: 3 },
    init: 'teacher',
    calibration: { source: [fixture('samples.jsonl')], samples: 24, seqLen: 32, seed: 0 },
    ...{ epochs: 1, batch: 3, lr: 1e-3, warmup: 0.1, weightDecay: 0.01, gradClip: 1, kl: 1, hidden: 1, crossEntropy: 0.1 },
    ...{ temperature: 2, failOnAlarm: false, seed: 0 },
    tool: { name: 'deepseek-convert', version: 'test' },
    commandLine: 'deepseek-convert distill',
    ...more,
  }); // prettier-ignore
  /** The same of a model of two layers that computes in no time. */
  const tiny = (name: string, more: Partial<DistillOptions> = {}): DistillOptions =>
    options(name, {
      input: llama,
      shape: { layers: 1, hidden: 24 },
      calibration: { source: 'self', samples: 24, seqLen: 12, seed: 0 },
      ...more,
    });
  const llama = archCase('llama');
  const interrupted = (when: (step: ProgressStep) => boolean): JobEnv => {
    const abort = new AbortController();
    return { ...env, signal: abort.signal, log: { ...silentLog, progress: (step) => when(step) && abort.abort() } };
  };

  let whole: Record<string, string> = {};

  test('an ordinary checkpoint of half the size, better than its start', async () => {
    const result = await runDistill(options('whole'), env);
    whole = hashesOf(result.out);
    expect(existsSync(`${result.out}.part`)).toBe(false);
    expect(Math.abs(result.parameters / (0.5 * result.teacherParameters) - 1)).toBeLessThan(0.05);
    const { judgements, best, steps } = result.training;
    expect(steps).toHaveLength(8);
    expect(steps.every(({ kl, hidden }) => kl! > 0 && hidden! > 0)).toBe(true);
    const kept = judgements.find(({ step }) => step === best)!;
    expect(kept.loss).toBe(Math.min(...judgements.map(({ loss }) => loss)));
    expect(kept.loss).toBeLessThan(judgements[0]!.loss);
    // Cross-entropy is of the fp32 weights, the perplexity of the bf16 ones that are stored.
    expect(Math.log(result.perplexity.student) / kept.crossEntropy).toBeCloseTo(1, 2);
    expect(result.perplexity.teacher).toBeLessThan(result.perplexity.student);
    await opened(result.out, async ({ model, checkpoint }) => {
      expect(shapeOf(model)).toEqual(result.shape);
      expect(parametersOf(model)).toBe(result.parameters);
      expect(checkpoint.companions.some((path) => path.endsWith('tokenizer.json'))).toBe(true);
      await Promise.resolve();
    });
    const provenance = readFileSync(join(result.out, 'deepseek-convert.json'), 'utf8');
    expect(provenance).toContain('"influence"');
  }, 60_000);

  test('interrupted at its seventh step, it goes on to the same bytes', async () => {
    const job = options('resumed');
    const stop = ({ stage, done }: ProgressStep) => stage === 'distill' && done === 7;
    const error = await refusal(runDistill(job, interrupted(stop)));
    expect(error.exitCode).toBe(75);
    expect(existsSync(job.out)).toBe(false);
    const result = await runDistill(job, env);
    expect(result.resumed).toBe(true);
    expect(hashesOf(result.out)).toEqual(whole);
  }, 60_000);

  test('interrupted anywhere, a small one goes on to the same bytes; with other settings it is refused', async () => {
    const result = await runDistill(tiny('small'), env);
    const job = tiny('small-resumed');
    const stops: [string, number][] = [['importance', 3], ['distill', 1], ['distill', 4], ['distill', 5]]; // prettier-ignore
    for (const [stage, done] of stops) {
      const error = await refusal(
        runDistill(
          job,
          interrupted((step) => step.stage === stage && step.done >= done),
        ),
      );
      expect(error.exitCode).toBe(75);
    }
    await expect(runDistill({ ...job, temperature: 1 }, env)).rejects.toThrow(/recipe\.temperature: 2 -> 1/);
    expect(hashesOf((await runDistill(job, env)).out)).toEqual(hashesOf(result.out));
  }, 60_000);

  test('tokens to train on end it earlier, or take more rounds', async () => {
    const short = await runDistill(tiny('short', { tokens: 4 * 3 * 12, kl: 0, hidden: 0, crossEntropy: 1 }), env);
    expect(short.training.steps).toHaveLength(4);
    expect(short.tokens).toBe(4 * 3 * 12);
    expect(short.training.steps.every(({ kl, hidden }) => kl === null && hidden === null)).toBe(true);
    const { training } = await runDistill(tiny('long', { tokens: 10 * 3 * 12, init: 'random' }), env); // prettier-ignore
    expect(training.steps).toHaveLength(10);
    // As good as nothing: 64 tokens, all equally likely.
    expect(training.judgements[0]!.crossEntropy).toBeGreaterThan(Math.log(50));
  }, 60_000);

  test('a ruinous learning rate ends it with exit code 3 when asked, and else keeps the start', async () => {
    const error = await refusal(runDistill(tiny('alarm', { lr: 1e3, failOnAlarm: true }), env));
    expect(error.message).toMatch(/Gradient alarm: (exploding|non-finite).*the student/s);
    expect(error.exitCode).toBe(3);
    const { training } = await runDistill(tiny('ruin', { lr: 1e3 }), env);
    expect(training.best).toBe(0);
  }, 60_000);

  test.each([
    [{ out: 'student.bin' }, 2, /A student is a folder/],
    [{ shape: {} }, 2, /How large the student is to be is not said/],
    [{ kl: 0, hidden: 0, crossEntropy: 0 }, 2, /needs a loss/],
    [{ shape: { hidden: 1024 } }, 2, /--hidden is more than the teacher has/],
    [{ calibration: { source: [fixture('samples.jsonl')], samples: 3, seqLen: 32, seed: 0 } }, 1, /too little text/],
  ] as const)('refuses %j', async (more, exitCode, message) => {
    const error = await refusal(runDistill(options('refused', more), env));
    expect(error.message).toMatch(message);
    expect(error.exitCode).toBe(exitCode);
    expect(existsSync(join(folder, 'refused.part'))).toBe(false);
  });

  test.each([
    ['mixtral', /model_type mixtral: its layers have experts/],
    ['deepseek_v3', /model_type deepseek_v3: its layers have experts/],
    ['olmoe', /experts/],
  ])('refuses %s by name', async (name, message) => {
    const error = await refusal(runDistill(options('refused', { input: archCase(name) }), env));
    expect(error.exitCode).toBe(1);
    expect(error.message).toMatch(message);
  });
});
