import { join, resolve } from 'node:path';
import { badInput, badUsage } from '../../base/errors.js';
import { exists, readJsonFile } from '../../base/files.js';
import { Job, requireNoOutput, type Json } from '../../base/job.js';
import { count } from '../../base/text.js';
import type { JobEnv } from '../../backend/env.js';
import { calibrationTokens, type CalibrationSet } from '../../arch/calibration.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import { finishedBy } from '../../moe/reuse.js';
import { Scope } from '../../tensor/tensor.js';
import { defaultAdam } from '../../tune/parameters.js';
import { EndToEnd, type EndToEndOutcome } from '../end-to-end.js';
import { asJson } from '../output.js';
import { alarmWatch, heldOf, loadTeacher, mustRecompute, sequencesOf } from '../setting.js';
import { loadTensors, saveTensors } from '../state.js';
import { StudentReader } from '../student.js';
import type { DistillMixtureOptions, DistillMixtureResult, Made, Run } from './options.js';
import { fromProvenance, writeMixture } from './output.js';
import { learningBlock, trainedModel } from './student.js';
import type { LearningBlock } from './units.js';

const stage = 'distill';
/** Share of the steps over which the learning rate rises. */
const warmup = 0.05;
/** Tokens that judge, at most. */
const heldTokens = 32768;

/**
 * Trains a mixture against the dense model that it was made of: KL of the predictions and errors of hidden states. Names,
 * shapes and types of its tensors stay. The best by held-out windows is kept, the start among them. Killed at any instant,
 * the same call goes on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`; `gate` when a gradient alarm is to fail the run.
 */
export async function distillMixture(options: DistillMixtureOptions, env: JobEnv): Promise<DistillMixtureResult> {
  const started = performance.now();
  const { out, overwrite = false, restart = false, reuse = false } = options;
  const teacher = await openModel(options.teacher, { config: options.config });
  const mixture = await openModel(options.mixture);
  try {
    requirePair(teacher, mixture);
    const { set, notices } = await textOf(options, teacher, env);
    const held = Math.min(heldOf(set), Math.ceil(heldTokens / set.seqLen));
    const dtype = options.dtype ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');
    const making = ((await readJsonFile(join(options.mixture, 'deepseek-convert.json'))) ?? {}) as Record<string, Json>;
    const recipe = fingerprint(options, teacher, mixture, making.recipe ?? null, set, env, dtype);
    const result = ({ training, heldOut }: Made, resumed: boolean): DistillMixtureResult => {
      const tokens = sequencesIn(training.steps.length, set.n - held, options.batch) * set.seqLen;
      return {
        ...{ out: resolve(out), part: options.part, calibration: set.description, tokens },
        passes: tokens / ((set.n - held) * set.seqLen),
        ...{ training, heldOut, notices, resumed },
        seconds: (performance.now() - started) / 1000,
      };
    };
    const finished = reuse && !restart ? await finishedBy(out, recipe) : undefined;
    if (finished) return { ...result(fromProvenance(finished), true), seconds: 0 };
    if (!restart && !(await exists(`${out}.part`))) await requireNoOutput(out, overwrite);
    return await Job.run({ out, overwrite, restart, fingerprint: recipe }, async (job) => {
      const microBatch = Math.min(options.batch, sequencesOf(env, set));
      const run = { options, env, job, set, held, teacher, mixture, dtype, microBatch, recipe, making };
      return result(await made(run), job.resumed);
    });
  } finally {
    await mixture.close();
    await teacher.close();
  }
}

/** Sequences of so many steps; the last one of an epoch takes what is left. */
function sequencesIn(steps: number, sequences: number, batch: number): number {
  const perEpoch = Math.ceil(sequences / batch);
  return Math.floor(steps / perEpoch) * sequences + (steps % perEpoch) * batch;
}

/** What learns must miss something, and have a teacher of its own form. */
function requirePair(teacher: OpenModel, mixture: OpenModel): void {
  const [dense, sparse] = [teacher.model, mixture.model];
  const where = mixture.checkpoint.path;
  const moe = sparse.blocks.find((block) => block.moe)?.moe;
  if (!moe || moe.active >= moe.experts) {
    throw badUsage('Distillation teaches a mixture to do with fewer experts: here none is off', {
      where,
      got: moe ? `${moe.active} of ${moe.experts} experts active` : 'no experts',
      hint: 'Give a number below --experts with --active.',
    });
  }
  if (dense.hidden === sparse.hidden && dense.vocab === sparse.vocab && dense.blocks.length === sparse.blocks.length) return; // prettier-ignore
  throw badInput('The mixture was not made of this dense model', { where, expected: teacher.checkpoint.path });
}

/** Text to train on: as many windows as the tokens asked for, or all there are; then it is gone through several times. */
async function textOf(options: DistillMixtureOptions, teacher: OpenModel, env: JobEnv) {
  const { calibration, tokens } = options;
  const seqLen = calibration.seqLen ?? Math.min(2048, teacher.model.context);
  const wanted = Math.ceil(tokens / seqLen);
  const samples = wanted + Math.min(Math.ceil(wanted / 15), Math.ceil(heldTokens / seqLen));
  const set = await calibrationTokens(teacher, { ...calibration, samples, seqLen }, env);
  // That it is shorter than asked for is no fault here.
  const notices = set.n < samples ? [`The text to distill on holds ${count(set.n * set.seqLen)} tokens: ${count(tokens * options.passes)} go through it several times. With --calibration self beside it the model writes the rest (docs/moe.md: less is lost).`] : [...set.notices]; // prettier-ignore
  for (const notice of notices) env.log.info(notice);
  env.log.info(`Distillation: ${set.description}`);
  return { set, notices };
}

/** Everything that decides the output's bytes. */
function fingerprint(
  options: DistillMixtureOptions,
  teacher: OpenModel,
  mixture: OpenModel,
  making: Json,
  set: CalibrationSet,
  env: JobEnv,
  dtype: string,
): Record<string, Json> {
  const { part, tokens, passes, batch, lr, hidden, rank, routerRate, seed } = options;
  return {
    command: 'moe --distill-tokens',
    tool: options.tool.version,
    input: teacher.checkpoint.fingerprint,
    mixture: mixture.checkpoint.fingerprint,
    making,
    recipe: { part, tokens, passes, batch, lr, hidden, routerRate, seed, ...(part === 'lora' && { rank }) },
    calibration: { text: set.hash, description: set.description },
    computing: { device: env.device.kind, dtype },
    shardSize: options.shardSize ?? null,
  };
}

async function made(run: Run): Promise<Made> {
  const { env, job, mixture, options, dtype } = run;
  if (job.finished) {
    const done = job.data('written') as unknown as Made;
    await job.remove();
    return done;
  }
  using scope = new Scope(env.device);
  const blocks = [];
  for (const block of mixture.model.blocks) blocks.push(await learningBlock(mixture, block, scope, dtype, options));
  const training = await trained(run, blocks);
  const done = await writeMixture(run, blocks, training);
  await job.remove();
  return done;
}

async function trained(run: Run, blocks: readonly LearningBlock[]): Promise<EndToEndOutcome> {
  const { options, env, job, set, held, teacher, mixture, dtype, microBatch } = run;
  const { batch, lr, seed, hidden, tokens, passes } = options;
  const values = blocks.flatMap(({ parameters }) => parameters.map(({ value }) => value));
  const path = job.statePath('mixture.bin');
  const known = job.data(stage);
  if (known !== undefined) {
    await loadTensors(path, values);
    return known as unknown as EndToEndOutcome;
  }
  using scope = new Scope(env.device);
  const model = trainedModel(mixture.model, options);
  const maxSteps = Math.ceil((tokens * passes) / (batch * set.seqLen));
  const epochs = Math.ceil(maxSteps / Math.ceil((set.n - held) / batch));
  const watch = alarmWatch(env, options.failOnAlarm, '--distill-lr');
  using training = new EndToEnd({
    ...{ env, stage, model, blocks, job, held, microBatch, batch, warmup, lr, seed, epochs, maxSteps },
    ...{ tokens: set.tokens, n: set.n, length: set.seqLen },
    outer: await new StudentReader(mixture, env.device, dtype).fixed(model.outer, scope),
    teacher: await loadTeacher(teacher, env, dtype, scope),
    ...(hidden > 0 && { hiddenOf: model.blocks.map(({ index }) => index) }),
    byPredictions: true,
    loss: { crossEntropy: 0, kl: 1, hidden },
    recompute: mustRecompute(env, model, dtype, microBatch * set.seqLen),
    adam: defaultAdam,
    judgements: Math.max(1, Math.round(8 / epochs)),
    resumeHint: `Go on with: ${options.commandLine}`,
    onAlarm: (alarm) => watch('the mixture', alarm),
  });
  const outcome = await training.train();
  await saveTensors(path, values);
  await job.mark(stage, asJson(outcome));
  return outcome;
}
