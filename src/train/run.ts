import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { badInput, badUsage } from '../base/errors.js';
import { dtypeSize, elementCount } from '../base/dtype.js';
import { exists } from '../base/files.js';
import { Job, requireNoOutput, type Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { calibrationTokens, type CalibrationSet } from '../arch/calibration.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { inBasis, rotationEntry, rotationOf } from '../arch/rotate.js';
import { createWriter, isFileOutput } from '../checkpoint/writer.js';
import type { CheckpointWriter, PlannedTensor } from '../checkpoint/types.js';
import { quantize } from '../quant/run.js';
import { defaultRecipe } from '../quant/scheme.js';
import { Scope } from '../tensor/tensor.js';
import { defaultAdam, type AdamOptions } from '../tune/parameters.js';
import { requireTrainable } from '../tune/trainable.js';
import type { Codes, Learned, LearningWeights, Rates } from '../tune/weights.js';
import { codeTensors, trainBlocks, trainedCodes, type BlockRecord } from './blockwise.js';
import { EndToEnd, type EndToEndOutcome } from './end-to-end.js';
import type { QatOptions, QatResult } from './options.js';
import { asJson, sameTensors, storedNames, verifyCodes, writeCodes, writeRest, writeValue } from './output.js';
import {
  alarmWatch,
  heldOf,
  loadTeacher,
  microBatchOf,
  mustRecompute,
  onOthers,
  requireShares,
  sequencesOf,
  type AlarmWatch,
} from './setting.js';
import { loadTensors, saveTensors } from './state.js';
import { StudentReader } from './student.js';

const stage = 'qat end to end';
/** Relative to a weight's learning rate, which is in rounding cells. */
/** Where weights learn too, scales learn slowly: they would move all weights of a group at once (docs/training.md). */
const rates: Rates = { weights: 1, scales: 0.01, lora: 1 };
const ratesOf = ({ endToEnd }: QatOptions): Rates => (endToEnd === 'scales' ? { ...rates, scales: 0.1 } : rates);

/**
 * Rounding cells a step: a hundredth, and in long runs what lets a weight that is always pushed one way travel five cells
 * under the cosine, which halves the way (docs/training.md).
 */
const defaultRate = (steps: number): number => Math.min(0.01, 10 / steps);

/** Everything that the phases share. */
interface Run {
  readonly options: QatOptions;
  readonly env: JobEnv;
  readonly job: Job;
  readonly set: CalibrationSet;
  readonly teacher: OpenModel;
  /** What is trained: the input quantized, or the input itself. */
  readonly student: StudentReader;
  readonly dtype: 'f32' | 'bf16';
  readonly held: number;
  readonly microBatch: number;
  readonly adam: AdamOptions;
  readonly resumeHint: string;
}

/**
 * Quantization-aware training: from the GPTQ solution block by block, then optionally the whole model. Killed at any
 * instant, the same call goes on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`; `gate` when a gradient alarm is to fail the run.
 */
export async function runQat(options: QatOptions, env: JobEnv): Promise<QatResult> {
  const started = performance.now();
  check(options, env);
  const input = await openModel(options.input, { config: options.config });
  try {
    requirePlain(input, options);
    const teacher = await asRotated(input, options);
    requireTrainable(teacher);
    if (options.restart !== true && !(await exists(`${options.out}.part`)))
      await requireNoOutput(options.out, options.overwrite ?? false);
    const seqLen = options.calibration.seqLen ?? Math.min(2048, teacher.model.context);
    const set = await calibrationTokens(teacher, { ...options.calibration, seqLen }, env);
    for (const notice of [...teacher.notes, ...set.notices]) env.log.warn(notice);
    env.log.info(`Training text: ${set.description}`);
    const dtype = options.dtype ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');
    const { out, overwrite, restart } = options;
    const recipe = fingerprint(options, teacher, set, env, dtype, await startFingerprint(options));
    return await Job.run({ out, overwrite, restart, fingerprint: recipe }, (job) =>
      inJob(options, env, job, set, teacher, dtype, started),
    );
  } finally {
    await input.close();
  }
}

/** The blocks of the input and of the model to start from meet the same hidden states. */
async function asRotated(input: OpenModel, { from }: QatOptions): Promise<OpenModel> {
  if (from === undefined) return input;
  const [wanted, own] = [await rotationOf(from), await rotationOf(input.checkpoint.path)];
  if (own !== undefined && !isDeepStrictEqual(own, wanted)) {
    throw badInput('The model to start from does not have the rotation of the input', {
      where: from,
      got: wanted ? `${wanted.kind}, seed ${wanted.seed}` : 'none',
      expected: `${own.kind}, seed ${own.seed}`,
      hint: 'Name the model that both were made of as the input.',
    });
  }
  return inBasis(input, wanted);
}

function check(options: QatOptions, env: JobEnv): void {
  const { endToEnd, epochs, fakeQuant, from, out } = options;
  if (isFileOutput(out) && fakeQuant) {
    throw badUsage('A quantized model is a folder', { got: out, expected: 'a folder name for -o' });
  }
  if (!fakeQuant && endToEnd !== 'full') {
    throw badUsage('Without fake quantization there is only the training of all weights', {
      got: `--no-fake-quant --end-to-end ${endToEnd}`,
      expected: '--no-fake-quant --end-to-end full',
    });
  }
  if (!fakeQuant && from !== undefined) throw badUsage('--from does not go together with --no-fake-quant');
  if (epochs === 0 && endToEnd === 'none') throw badUsage('--epochs 0 with --end-to-end none trains nothing');
  if (env.group && endToEnd === 'none') {
    throw badUsage('Several devices train the whole model; block by block one device does all', {
      expected: '--end-to-end, or one device',
    });
  }
  requireShares(env, options.batch);
  if (endToEnd !== 'none' && options.crossEntropy === 0 && options.kl === 0) {
    throw badUsage('The whole model needs a loss', { expected: '--ce-weight or --kl-weight above 0' });
  }
}

function requirePlain(open: OpenModel, { input }: QatOptions): void {
  if (!open.layout) return;
  throw badInput('The model is quantized already', {
    where: input,
    got: open.layout.description,
    expected: 'the full-precision model: its outputs are what the quantized one learns from',
    hint: 'Name the full-precision model, and this one with --from.',
  });
}

/** Which quantized model the user starts from. */
async function startFingerprint({ from }: QatOptions): Promise<string | null> {
  if (from === undefined) return null;
  const open = await openModel(from);
  await open.close();
  return open.checkpoint.fingerprint;
}

/** Everything that decides the output's bytes. */
function fingerprint(
  options: QatOptions,
  teacher: OpenModel,
  set: CalibrationSet,
  env: JobEnv,
  dtype: string,
  from: string | null,
): Record<string, Json> {
  const { groupSize, fakeQuant, epochs, endToEnd, endToEndEpochs, batch, lr = null, endToEndLr = null, warmup } = options; // prettier-ignore
  const { weightDecay, gradClip, crossEntropy, kl, hidden, rank, cleanInputs, seed } = options;
  return {
    command: 'qat',
    tool: options.tool.version,
    input: teacher.checkpoint.fingerprint,
    recipe: {
      ...{ groupSize, fakeQuant, epochs, endToEnd, endToEndEpochs, batch, lr, endToEndLr, warmup, weightDecay },
      ...{ gradClip, crossEntropy, kl, hidden, rank, cleanInputs, seed },
      ...{ maxSteps: options.maxSteps ?? null, from },
    },
    calibration: { text: set.hash, description: set.description },
    computing: { device: env.device.kind, dtype },
    shardSize: options.shardSize ?? null,
  };
}

async function inJob(
  options: QatOptions,
  env: JobEnv,
  job: Job,
  set: CalibrationSet,
  teacher: OpenModel,
  dtype: 'f32' | 'bf16',
  started: number,
): Promise<QatResult> {
  const result = (
    blocks: readonly BlockRecord[],
    outcome: EndToEndOutcome | undefined,
    written: Written,
  ): QatResult => ({
    out: job.out,
    calibration: set.description,
    blocks,
    endToEnd: outcome,
    linears: written.linears,
    outputBytes: written.bytes,
    notices: [...teacher.notes, ...set.notices],
    resumed: job.resumed,
    seconds: (performance.now() - started) / 1000,
  });
  if (job.finished) {
    const { blocks, outcome, written } = job.data('written') as unknown as Finished;
    await job.remove();
    return result(blocks, outcome, written);
  }
  const start = options.fakeQuant ? await startOf(options, env, job) : undefined;
  const open = start === undefined ? teacher : await openModel(start);
  try {
    const student = new StudentReader(open, env.device, dtype);
    const run: Run = {
      ...{ options, env, job, set, teacher, student, dtype },
      held: heldOf(set),
      microBatch: Math.min(options.batch, sequencesOf(env, set)),
      adam: { ...defaultAdam, decay: options.weightDecay, clip: options.gradClip },
      resumeHint: `Go on with: ${options.commandLine}`,
    };
    const watch = alarmWatch(env, options.failOnAlarm, '--lr or --end-to-end-lr');
    const blocks = options.fakeQuant && options.epochs > 0 ? await blockwise(run, watch) : [];
    const outcome = options.endToEnd === 'none' ? undefined : await endToEnd(run, watch);
    const written = await write(run, blocks, outcome);
    const done = result(blocks, outcome, written);
    await job.remove();
    return done;
  } finally {
    if (open !== teacher) await open.close();
  }
}

/** The quantized model to start from: the user's, or GPTQ's in the work folder. */
async function startOf(options: QatOptions, env: JobEnv, job: Job): Promise<string> {
  if (options.from !== undefined) return options.from;
  const out = join(job.folder, 'state', 'start');
  if (job.done('start')) return out;
  if (!(await exists(out))) {
    await quantize(
      {
        input: options.input,
        ...(options.config !== undefined && { config: options.config }),
        out,
        recipe: { ...defaultRecipe, groupSize: options.groupSize },
        formats: ['compressed-tensors'],
        calibration: options.calibration,
        ...(options.dtype !== undefined && { states: options.dtype }),
        tool: options.tool,
        commandLine: options.commandLine,
      },
      env,
    );
  }
  await job.mark('start');
  return out;
}

async function blockwise(run: Run, watch: AlarmWatch): Promise<BlockRecord[]> {
  const { options, env, job, teacher, student, dtype, set, held, microBatch, adam, resumeHint } = run;
  const { epochs, batch, warmup, cleanInputs, seed } = options;
  const lr = options.lr ?? defaultRate(Math.ceil((set.n - held) / batch) * epochs);
  return await trainBlocks({
    ...{ env, job, teacher, student, dtype, held, microBatch, adam, resumeHint },
    ...{ tokens: set.tokens, n: set.n, length: set.seqLen },
    ...{ epochs, batch, lr, warmup, cleanInputs, seed, rates },
    onAlarm: (block, alarm) => watch(block, alarm),
  });
}

const finalPath = (job: Job, block: number): string => job.statePath(`final-${block}.bin`);
const values = (part: LearningWeights) => part.plain.map(({ parameter }) => parameter.value);

/** Codes that the training so far has led to. */
async function codesNow({ options, job, student }: Run, index: number, scope: Scope): Promise<Codes[]> {
  const block = student.open.model.blocks[index]!;
  if (job.done(stage)) {
    const codes = await student.codes(block, scope);
    await loadTensors(finalPath(job, index), codeTensors(codes));
    return codes;
  }
  return options.epochs > 0 ? await trainedCodes({ job, student }, block, scope) : await student.codes(block, scope);
}

/** What a device needs to train the whole model on it: the same on each. */
async function weightsOf(run: Run, scope: Scope) {
  const { options, student } = run;
  const { device } = scope;
  const { model } = student.open;
  const outer = options.fakeQuant ? await student.fixed(model.outer, scope) : await student.plain(undefined, scope);
  const blocks: LearningWeights[] = [];
  for (const block of model.blocks) {
    if (!options.fakeQuant) {
      blocks.push(await student.plain(block, scope));
      continue;
    }
    using work = new Scope(device);
    const codes = await codesNow(run, block.index, options.endToEnd === 'scales' ? scope : work);
    blocks.push(await student.quantized(block, scope, learnedOf(options), ratesOf(options), codes));
    await device.sync();
  }
  const teacher =
    options.kl + options.hidden > 0 && (await loadTeacher(run.teacher, { ...run.env, device }, run.dtype, scope));
  return { device, outer, blocks, ...(teacher && { teacher }) };
}

async function endToEnd(run: Run, watch: AlarmWatch): Promise<EndToEndOutcome> {
  const { options, env, job, student, dtype, set, held, adam, resumeHint } = run;
  const { crossEntropy, kl, hidden } = options;
  const known = job.data(stage);
  if (known !== undefined) return known as unknown as EndToEndOutcome;
  const { model } = student.open;
  using scope = new Scope(env.device);
  const steps = Math.min(
    Math.ceil((set.n - held) / options.batch) * options.endToEndEpochs,
    options.maxSteps ?? Infinity,
  );
  const first = await weightsOf(run, scope);
  using others = await onOthers(env, (on, inner) =>
    weightsOf({ ...run, env: on, student: new StudentReader(student.open, on.device, dtype) }, inner),
  );
  const microBatch = microBatchOf(env, set, options.batch);
  using training = new EndToEnd({
    ...{ env, stage, model, job, resumeHint, held, microBatch, adam, ...first, replicas: others.all },
    loss: { crossEntropy, kl, hidden },
    ...(hidden > 0 && { hiddenOf: model.blocks.map(({ index }) => index) }),
    byPredictions: crossEntropy + kl > 0,
    recompute: mustRecompute(env, model, dtype, microBatch * set.seqLen),
    ...{ tokens: set.tokens, n: set.n, length: set.seqLen },
    ...{ epochs: options.endToEndEpochs, batch: options.batch, warmup: options.warmup },
    lr: options.endToEndLr ?? (options.fakeQuant ? defaultRate(steps) : 1e-4),
    ...(options.maxSteps !== undefined && { maxSteps: options.maxSteps }),
    seed: options.seed,
    judgements: 4,
    onAlarm: (alarm) => watch('the whole model', alarm),
  });
  const outcome = await training.train();
  for (const [i, part] of first.blocks.entries()) {
    using work = new Scope(env.device);
    const trained = part.quantized.map((unit) => unit.result(work));
    await saveTensors(finalPath(job, i), [...codeTensors(trained), ...values(part)]);
  }
  await saveTensors(finalPath(job, -1), values(first.outer));
  await job.mark(stage, asJson(outcome));
  return outcome;
}

function learnedOf({ endToEnd, rank, seed }: QatOptions): Learned {
  return endToEnd === 'lora' ? { kind: 'lora', rank, seed } : { kind: endToEnd === 'scales' ? 'scales' : 'full' };
}

interface Written {
  readonly linears: number;
  readonly bytes: number;
}
interface Finished {
  readonly blocks: readonly BlockRecord[];
  readonly outcome: EndToEndOutcome | undefined;
  readonly written: Written;
}

async function write(run: Run, blocks: readonly BlockRecord[], outcome: EndToEndOutcome | undefined): Promise<Written> {
  const { options, env, job, set, teacher, student, dtype } = run;
  const { open } = student;
  const { checkpoint, model } = open;
  const tensors = sameTensors(open);
  const bytes = tensors.reduce((sum, { shape, dtype: of }) => sum + elementCount(shape) * dtypeSize(of), 0);
  const writer = await createWriter({
    job,
    format: 'safetensors',
    tensors,
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config: checkpoint.config,
    companions: checkpoint.companions,
    extraFiles: new Map([['README.md', card(run, blocks, outcome)]]),
    provenance: {
      tool: options.tool,
      recipe: {
        command: options.commandLine,
        ...fingerprint(options, teacher, set, env, dtype, await startFingerprint(options)),
      },
      inputs: teacher.checkpoint.files,
    },
    accept: options.accept,
  });
  try {
    const probes = options.fakeQuant ? await writeQuantized(run, writer) : await writePlain(run, writer, tensors);
    await teacher.checkpoint.assertUnchanged();
    await writer.flush();
    const shapes = new Map(model.blocks.flatMap((block) => block.linears.flat()).map((l) => [`${l.name}.weight`, [l.outFeatures, l.inFeatures] as const])); // prettier-ignore
    const linears = await verifyCodes(job.outputFolder, checkpoint.config, probes, (name) => shapes.get(name)!, env);
    if (linears > 0) env.log.info(`Verified ${linears} trained linears as they were read back`);
    const written = { linears, bytes };
    await job.mark('written', asJson({ blocks, outcome: outcome ?? null, written }));
    // No times: a resumed job writes the same bytes as an uninterrupted one.
    await writer.finish({
      blocks: asJson(blocks.map(({ seconds: _, ...rest }) => rest)),
      endToEnd: asJson(outcome ?? null),
      ...(await rotationEntry(options.from ?? options.input)),
    });
    return written;
  } finally {
    await writer.close();
  }
}

async function writeQuantized(run: Run, writer: CheckpointWriter): Promise<Map<string, string>> {
  const { open, device } = run.student;
  const probes = new Map<string, string>();
  for (const { index } of open.model.blocks) {
    using scope = new Scope(device);
    for (const codes of await codesNow(run, index, scope)) {
      for (const [name, hash] of await writeCodes(open, writer, codes)) probes.set(name, hash);
    }
  }
  await writeRest(open, writer, new Set(storedNames(open, probes.keys())));
  return probes;
}

async function writePlain(run: Run, writer: CheckpointWriter, tensors: readonly PlannedTensor[]) {
  const { job, student } = run;
  const learned = new Set<string>();
  for (const block of [undefined, ...student.open.model.blocks]) {
    using scope = new Scope(student.device);
    const part = await student.plain(block, scope);
    await loadTensors(finalPath(job, block?.index ?? -1), values(part));
    for (const { names, parameter } of part.plain) {
      await writeValue(student.open, writer, names, parameter.value);
      for (const name of names) learned.add(name);
    }
  }
  // A tied head that is stored all the same stays tied.
  const { model } = student.open;
  if (model.tied && tensors.some(({ name }) => name === 'lm_head.weight')) {
    using scope = new Scope(student.device);
    const part = await student.plain(undefined, scope);
    await loadTensors(finalPath(job, -1), values(part));
    const embedding = part.plain.find(({ names }) => names[0] === model.embedding)!;
    await writeValue(student.open, writer, ['lm_head.weight'], embedding.parameter.value);
    learned.add('lm_head.weight');
  }
  await writeRest(student.open, writer, learned);
  return new Map<string, string>();
}

/** README.md of the output. */
function card(run: Run, blocks: readonly BlockRecord[], outcome: EndToEndOutcome | undefined): string {
  const { options, set } = run;
  const { tool, fakeQuant, epochs, endToEnd, endToEndEpochs } = options;
  const lines = [
    `# ${fakeQuant ? 'INT4 by quantization-aware training' : 'Trained'}`,
    '',
    `Made by ${tool.name} ${tool.version}${fakeQuant ? ', from GPTQ codes, stored as compressed-tensors' : ''}.`,
    '',
    ...(blocks.length > 0 ? [`- block by block: ${epochs} epochs`] : []),
    ...(outcome ? [`- end to end (${endToEnd}): ${endToEndEpochs} epochs, step ${outcome.best} of ${outcome.steps.length} kept`] : []), // prettier-ignore
    `- text: ${set.description} (SHA-256 of the tokens ${set.hash})`,
    '',
    'Settings, losses and gradient norms stand in `deepseek-convert.json`.',
    '',
  ];
  return lines.join('\n');
}
