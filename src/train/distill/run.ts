import { badUsage } from '../../base/errors.js';
import { exists } from '../../base/files.js';
import { Job, requireNoOutput, type Json } from '../../base/job.js';
import { short } from '../../base/text.js';
import type { JobEnv } from '../../backend/env.js';
import { calibrationTokens, type CalibrationSet } from '../../arch/calibration.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import type { Model } from '../../arch/types.js';
import { WeightReader } from '../../arch/weights.js';
import { isFileOutput } from '../../checkpoint/writer.js';
import { Scope } from '../../tensor/tensor.js';
import { defaultAdam } from '../../tune/parameters.js';
import { EndToEnd, type EndToEndOutcome } from '../end-to-end.js';
import { asJson } from '../output.js';
import {
  alarmWatch,
  heldOf,
  loadTeacher,
  microBatchOf,
  mustRecompute,
  onOthers,
  requireShares,
  sequencesOf,
} from '../setting.js';
import { loadTensors, saveTensors } from '../state.js';
import { choose, evenChoice, measureImportance, type Choice } from './importance.js';
import type { DistillOptions, DistillResult } from './options.js';
import { perplexityOf, writeStudent, type Written } from './output.js';
import { chooseShape, parametersOf, requirePrunable, shapeOf, studentModel, type Shape } from './shape.js';
import { cutStudent, randomStudent, startOfMap, type Student } from './student.js';

const stage = 'distill';
/** Importance is measured on so many tokens at most: more of them hardly change the order. */
const importanceTokens = 32768;

/** Everything that the phases share. */
interface Run {
  readonly options: DistillOptions;
  readonly env: JobEnv;
  readonly job: Job;
  readonly set: CalibrationSet;
  readonly teacher: OpenModel;
  readonly shape: Shape;
  readonly dtype: 'f32' | 'bf16';
  readonly held: number;
  readonly microBatch: number;
  readonly resumeHint: string;
}

/** What the journal keeps of a student's making. */
interface Chosen extends Choice {
  /** Block influence of each layer of the teacher; null: it was not asked. */
  readonly influence: readonly number[] | null;
}

/**
 * Makes a student of a dense teacher: its most important layers, hidden channels, heads and neurons, trained on the
 * teacher's predictions and hidden states (Muralidharan et al. 2024). Killed at any instant, the same call goes on and
 * ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`; `gate` when a gradient alarm is to fail the run.
 */
export async function runDistill(options: DistillOptions, env: JobEnv): Promise<DistillResult> {
  const started = performance.now();
  check(options);
  requireShares(env, options.batch);
  const teacher = await openModel(options.input, { config: options.config });
  try {
    requirePrunable(teacher);
    const { model } = teacher;
    const shape = chooseShape(model, options.shape);
    if (options.restart !== true && !(await exists(`${options.out}.part`)))
      await requireNoOutput(options.out, options.overwrite ?? false);
    env.log.info(`Student: ${describe(model, shape)}`);
    const seqLen = options.calibration.seqLen ?? Math.min(2048, model.context);
    const set = await calibrationTokens(teacher, { ...options.calibration, seqLen }, env);
    for (const notice of [...teacher.notes, ...set.notices]) env.log.warn(notice);
    env.log.info(`Training text: ${set.description}`);
    const held = heldOf(set);
    const dtype = options.dtype ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');
    const { out, overwrite, restart } = options;
    const recipe = fingerprint(options, teacher, shape, set, env, dtype);
    return await Job.run({ out, overwrite, restart, fingerprint: recipe }, async (job) => {
      const microBatch = microBatchOf(env, set, options.batch);
      const resumeHint = `Go on with: ${options.commandLine}`;
      const run = { options, env, job, set, teacher, shape, dtype, held, microBatch, resumeHint };
      const { chosen, training, perplexity } = await made(run, recipe);
      return {
        out: job.out,
        calibration: set.description,
        shape,
        parameters: parametersOf(studentModel(model, shape, chosen.layers)),
        teacherParameters: parametersOf(model),
        layers: options.init === 'teacher' ? chosen.layers : undefined,
        tokens: set.seqLen * sequencesIn(training.steps.length, set.n - held, options.batch),
        ...{ training, perplexity },
        notices: [...teacher.notes, ...set.notices],
        resumed: job.resumed,
        seconds: (performance.now() - started) / 1000,
      };
    });
  } finally {
    await teacher.close();
  }
}

/** Sequences of so many steps; the last one of an epoch takes what is left. */
function sequencesIn(steps: number, sequences: number, batch: number): number {
  const perEpoch = Math.ceil(sequences / batch);
  return Math.floor(steps / perEpoch) * sequences + (steps % perEpoch) * batch;
}

function check({ out, shape, kl, hidden, crossEntropy }: DistillOptions): void {
  if (isFileOutput(out)) throw badUsage('A student is a folder', { got: out, expected: 'a folder name for -o' });
  if (Object.keys(shape).length === 0) {
    throw badUsage('How large the student is to be is not said', {
      expected: '--target-params, or sizes: --layers, --hidden, --heads, --kv-heads, --intermediate',
    });
  }
  if (kl === 0 && hidden === 0 && crossEntropy === 0) {
    throw badUsage('Training needs a loss', { expected: '--kl-weight, --hidden-weight or --ce-weight above 0' });
  }
}

function describe(teacher: Model, shape: Shape): string {
  const { layers, hidden, heads, kvHeads, intermediate } = shape;
  const parameters = parametersOf(studentModel(teacher, shape, shapeKept(shape)));
  return `${short(parameters)} parameters (teacher: ${short(parametersOf(teacher))}), ${layers} layers, ${hidden} wide, ${heads} heads on ${kvHeads}, ${intermediate} neurons`;
}

/** Any layers, where only their number matters. */
const shapeKept = ({ layers }: Shape): number[] => Array.from({ length: layers }, (_, i) => i);

/** Everything that decides the output's bytes. */
function fingerprint(
  options: DistillOptions,
  teacher: OpenModel,
  shape: Shape,
  set: CalibrationSet,
  env: JobEnv,
  dtype: string,
): Record<string, Json> {
  const { init, epochs, tokens = null, batch, lr, warmup, weightDecay, gradClip } = options;
  const { kl, hidden, crossEntropy, temperature, seed } = options;
  return {
    command: 'distill',
    tool: options.tool.version,
    input: teacher.checkpoint.fingerprint,
    recipe: {
      ...{ shape: { ...shape }, init, epochs, tokens, batch, lr, warmup, weightDecay, gradClip },
      ...{ kl, hidden, crossEntropy, temperature, seed },
    },
    calibration: { text: set.hash, description: set.description },
    computing: { device: env.device.kind, dtype },
    shardSize: options.shardSize ?? null,
  };
}

interface Made extends Written {
  readonly chosen: Chosen;
  readonly training: EndToEndOutcome;
}

async function made(run: Run, recipe: Record<string, Json>): Promise<Made> {
  const { options, env, job, set, teacher, held, dtype } = run;
  if (job.finished) {
    const done = job.data('written') as unknown as Made;
    await job.remove();
    return done;
  }
  const chosen = await chosenParts(run);
  using scope = new Scope(env.device);
  const student = await studentOf(run, chosen, scope);
  const training = await trained(run, student, chosen);
  const judging = {
    tokens: set.tokens.subarray((set.n - held) * set.seqLen),
    ...{ length: set.seqLen, env, dtype, microBatch: run.microBatch },
  };
  const written = await writeStudent({
    ...{ options, env, job, set, teacher, student, recipe, judging },
    report: asJson({ pruning: options.init === 'random' ? null : chosen, training }),
    teacherPerplexity: await perplexityOf(teacher, judging),
    mark: async (perplexity) => job.mark('written', asJson({ chosen, training, perplexity })),
  });
  await job.remove();
  return { chosen, training, ...written };
}

/** The student as it begins, on the scope's device: the same on each. */
async function studentOf({ options, teacher, shape, dtype }: Run, chosen: Chosen, scope: Scope): Promise<Student> {
  const model = studentModel(teacher.model, shape, chosen.layers);
  if (options.init === 'random') return await randomStudent(model, options.seed, scope, dtype);
  return await cutStudent(teacher.model, new WeightReader(teacher, scope.device, dtype), model, chosen, scope, dtype);
}

/** Which parts of the teacher make the student. */
async function chosenParts(run: Run): Promise<Chosen> {
  const { options, env, job, set, teacher, shape, dtype, held, resumeHint } = run;
  const known = job.data('importance');
  if (known !== undefined) return known as unknown as Chosen;
  const full = shapeOf(teacher.model);
  if (options.init === 'random') return { ...evenChoice(shape, full), influence: null };
  using scope = new Scope(env.device);
  const importance = await measureImportance({
    ...{ env, tokens: set.tokens, length: set.seqLen, resumeHint },
    microBatch: sequencesOf(env, set),
    teacher: await loadTeacher(teacher, env, dtype, scope),
    n: Math.min(set.n - held, Math.max(1, Math.floor(importanceTokens / set.seqLen))),
  });
  const chosen = { ...choose(importance, shape, full), influence: importance.layers };
  await job.mark('importance', asJson(chosen));
  return chosen;
}

/** The teacher's block whose output each block of the student is to have: all layers that were left out behind it too. */
export const comparedWith = (layers: readonly number[], all: number): number[] =>
  layers.map((_, i) => (layers[i + 1] ?? all) - 1);

async function trained(run: Run, student: Student, chosen: Chosen): Promise<EndToEndOutcome> {
  const { options, env, job, set, teacher, dtype, held, microBatch, resumeHint } = run;
  const { model, outer, blocks } = student;
  const { batch, warmup, lr, seed, kl, hidden, crossEntropy, temperature, tokens } = options;
  const values = [outer, ...blocks].flatMap(({ parameters }) => parameters.map(({ value }) => value));
  const known = job.data(stage);
  if (known !== undefined) {
    await loadTensors(job.statePath('student.bin'), values);
    return known as unknown as EndToEndOutcome;
  }
  using scope = new Scope(env.device);
  /** What a device needs to train a student on it. */
  const around = async ({ outer, blocks }: Student, on: JobEnv, inner: Scope) => {
    const guide = kl > 0 || hidden > 0 ? await loadTeacher(teacher, on, dtype, inner) : undefined;
    const map = hidden > 0 ? startOfMap(teacher.model, chosen, inner, dtype) : undefined;
    return { device: on.device, outer, blocks, ...(guide && { teacher: guide }), ...(map && { map }) };
  };
  const first = await around(student, env, scope);
  using others = await onOthers(env, async (on, inner) => around(await studentOf(run, chosen, inner), on, inner));
  const maxSteps = tokens === undefined ? undefined : Math.ceil(tokens / (batch * set.seqLen));
  const watch = alarmWatch(env, options.failOnAlarm, '--lr');
  using training = new EndToEnd({
    ...{ env, stage, model, job, resumeHint, held, microBatch, batch, warmup, lr, seed },
    ...{ tokens: set.tokens, n: set.n, length: set.seqLen },
    ...{ ...first, replicas: others.all },
    ...(hidden > 0 && { hiddenOf: comparedWith(chosen.layers, teacher.model.blocks.length) }),
    loss: { crossEntropy, kl, hidden, temperature },
    recompute: mustRecompute(env, model, dtype, microBatch * set.seqLen),
    epochs: maxSteps === undefined ? options.epochs : Math.ceil(maxSteps / Math.ceil((set.n - held) / batch)),
    ...(maxSteps !== undefined && { maxSteps }),
    adam: { ...defaultAdam, decay: options.weightDecay, clip: options.gradClip },
    judgements: 4,
    onAlarm: (alarm) => watch('the student', alarm),
  });
  const outcome = await training.train();
  await saveTensors(job.statePath('student.bin'), values);
  await job.mark(stage, asJson(outcome));
  return outcome;
}
