import { badUsage } from '../base/errors.js';
import { basename, join, resolve } from 'node:path';
import type { FloatDType } from '../base/dtype.js';
import { exists, formatBytes } from '../base/files.js';
import { Job, requireNoOutput, type Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { createWriter, isFileOutput } from '../checkpoint/writer.js';
import { deliverParts } from '../checkpoint/sidecars.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import { calibrationTokens, type CalibrationSet } from '../arch/calibration.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { blockResults, blockStep, eachBlock, streamBlocks } from '../arch/stream.js';
import { WeightReader } from '../arch/weights.js';
import { checkEmitted, deployment } from '../targets/deploy/emit.js';
import { measuredSection, modelCard } from './card.js';
import { chooseBits } from './choose.js';
import type { QuantizeOptions, QuantizePreview, QuantizeResult } from './options.js';
import { checkFormats, holderOf, planTarget, requireOneScheme, storedScales, type PlannedTarget } from './formats.js';
import { sampledDigest } from './input.js';
import { makePlan, type QuantPlan } from './plan.js';
import { fromJson, type BlockReport } from './report.js';
import { checkRecipe, type Recipe, type SchemeChange } from './scheme.js';
import { defaultScope } from './select.js';
import { requireShares } from './shares.js';
import { QuantVisitor, type TargetWriter } from './visitor.js';

interface Prepared extends QuantizePreview {
  readonly open: OpenModel;
  readonly targets: readonly PlannedTarget[];
  readonly recipe: Recipe;
  readonly scope: string;
  /** Tells inputs of the same shape apart. */
  readonly weights: string;
}

async function prepare(options: QuantizeOptions): Promise<Prepared> {
  const { input, formats, config } = options;
  checkRecipe(options.recipe);
  checkFormats(formats, options.out, options.recipe);
  checkEmitted(options.emit ?? [], formats, isFileOutput(options.out));
  requireFoldable(options);
  // Block types decide the codes where GGUF is the only output; beside others, it follows their codes.
  const alone = formats.length === 1 && formats[0] === 'gguf';
  const { blocks, mixture, ...common } = options.recipe;
  const recipe: Recipe = alone ? { ...common, blocks: blocks ?? 'q4_k', ...(mixture && { mixture }) } : common;
  const open = await openModel(input, { config });
  try {
    const scope = options.scope ?? defaultScope(open.model.modelType);
    const weights = await sampledDigest(open.checkpoint.files);
    return await planAll(options, { open, recipe, scope, weights });
  } catch (error) {
    await open.close();
    throw error;
  }
}

/** The plan of the codes and of every output; `chosen`: bits by measured sensitivity. */
async function planAll(
  options: QuantizeOptions,
  { open, recipe, scope, weights }: Pick<Prepared, 'open' | 'recipe' | 'scope' | 'weights'>,
  chosen?: ReadonlyMap<string, SchemeChange>,
): Promise<Prepared> {
  const { formats, keep = [] } = options;
  const selection = { scope, keep };
  const alone = recipe.blocks !== undefined;
  const plan = makePlan(open.model, open.checkpoint, recipe, selection, holderOf(formats), chosen);
  requireOneScheme(formats, plan);
  requireShares(plan, open.model, formats, options.tensorParallel ?? []);
  const targets: PlannedTarget[] = [];
  for (const format of formats) targets.push(await planTarget(format, open, plan, options.recipe, selection, alone));
  const inputBytes = [...open.checkpoint.tensors.values()].reduce((sum, { span }) => sum + span.bytes, 0);
  const outputs = targets.map(({ output }) => output);
  return {
    ...{ open, model: open.model, targets, recipe, scope, weights, plan, inputBytes },
    output: {
      tensors: outputs.flatMap(({ tensors }) => tensors),
      through: outputs[0]!.through,
      bytes: outputs.reduce((sum, { bytes }) => sum + bytes, 0),
    },
    notices: [...open.notes, ...plan.notes, ...targets.flatMap(({ notes }) => notes), ...later(recipe, chosen)],
  };
}

const later = ({ targetBpw }: Recipe, chosen: unknown): string[] =>
  targetBpw === undefined || chosen !== undefined
    ? []
    : [`Bits are chosen from measured sensitivities when the job runs: ${targetBpw} a weight on average.`];

/** Containers that name and arrange norms in their own way cannot take up scales. */
function requireFoldable({ recipe: { method }, formats }: QuantizeOptions): void {
  const other = formats.find((format) => format === 'gguf' || format === 'onnx');
  if (other === undefined || !method.startsWith('awq')) return;
  throw badUsage(`--method ${method} does not go together with --format ${other}`, {
    expected: 'compressed-tensors, gptq, awq or safetensors',
    hint: 'Use --method gptq, which is better, or convert the result of --format safetensors.',
  });
}

/** The plan alone: what becomes of each tensor, sizes. Reads headers only. */
export async function previewQuantize(options: QuantizeOptions): Promise<QuantizePreview> {
  const { open, ...preview } = await prepare(options);
  await open.close();
  return preview;
}

/**
 * Quantizes a checkpoint block by block into a folder that is verified before it gets its name. Killed at any instant,
 * the same call goes on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`; `gate` when too many experts saw no token.
 */
export async function quantize(options: QuantizeOptions, env: JobEnv): Promise<QuantizeResult> {
  const started = performance.now();
  const prepared = await prepare(options);
  const { open } = prepared;
  try {
    for (const notice of prepared.notices) env.log.info(notice);
    if (options.restart !== true) await requireNoOutputYet(options);
    const set = await calibrate(options, prepared, env);
    const { out, overwrite, restart, commandLine } = options;
    const recipe = fingerprint(options, prepared, set, env);
    return await Job.run({ out, overwrite, restart, fingerprint: recipe }, async (job) => {
      const states = statesOf(options, prepared, env);
      const chosen = set && (await chooseBits({ ...prepared, set, job, env, states, commandLine }));
      const final = chosen ? await planAll(options, prepared, chosen) : prepared;
      return await runJob(options, final, set, job, env, started);
    });
  } finally {
    await open.close();
  }
}

/** Before minutes of sampling. With a work folder there, the job itself knows whether the output is its own. */
async function requireNoOutputYet({ out, overwrite = false }: QuantizeOptions): Promise<void> {
  if (!(await exists(`${resolve(out)}.part`))) await requireNoOutput(out, overwrite);
}

async function calibrate(
  { calibration, recipe }: QuantizeOptions,
  { open }: Prepared,
  env: JobEnv,
): Promise<CalibrationSet | undefined> {
  if (calibration === undefined) {
    if (recipe.method === 'rtn') return undefined;
    throw badUsage(`--method ${recipe.method} needs calibration text`);
  }
  const seqLen = calibration.seqLen ?? Math.min(2048, open.model.context);
  const set = await calibrationTokens(open, { ...calibration, seqLen }, env);
  for (const notice of set.notices) env.log.warn(notice);
  env.log.info(`Calibration: ${set.description}`);
  return set;
}

function fingerprint(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  env: JobEnv,
): Record<string, Json> {
  const { open, recipe, scope, weights } = prepared;
  return {
    command: 'quantize',
    tool: options.tool.version,
    input: open.checkpoint.fingerprint,
    weights,
    recipe: JSON.parse(JSON.stringify(recipe)) as Json,
    selection: { scope, keep: options.keep ?? [] },
    allExperts: options.calibrateAllExperts ?? false,
    formats: [...options.formats],
    ...(options.formats.length > 1 && { blocks: options.recipe.mixture ?? options.recipe.blocks ?? null }),
    calibration: set === undefined ? null : { text: set.hash, description: set.description },
    computing: {
      device: env.device.kind,
      states: statesOf(options, prepared, env),
      batchRows: options.batchRows ?? null,
    },
    shardSize: options.shardSize ?? null,
  };
}

/** Default: bf16 (f32 for models of other types on the CPU): what rounding a state adds is lost in what INT4 adds. */
export function statesOf(
  { states }: Pick<QuantizeOptions, 'states'>,
  { plan }: Pick<QuantizePreview, 'plan'>,
  { device }: Pick<JobEnv, 'device'>,
): 'f32' | 'bf16' {
  if (states !== undefined) return states;
  const exact = device.kind === 'cpu' && [...plan.linears.values()].some(({ dtype }) => dtype !== 'bf16');
  return exact ? 'f32' : 'bf16';
}

async function runJob(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  env: JobEnv,
  started: number,
): Promise<QuantizeResult> {
  const { open, plan, output, targets } = prepared;
  const { model, checkpoint } = open;
  const done = (verified: number): QuantizeResult => {
    const results = blockResults(job, stage, model);
    const blocks = results.map(({ result }) => fromJson(result));
    return {
      out: job.out,
      plan,
      outputBytes: output.bytes,
      inputBytes: prepared.inputBytes,
      blocks,
      calibration: set?.description,
      notices: [...prepared.notices, ...(set?.notices ?? [])],
      verified,
      resumed: job.resumed,
      seconds: (performance.now() - started) / 1000,
      stages: stagesOf(results.map(({ seconds }) => seconds), blocks), // prettier-ignore
    };
  };
  if (job.finished) {
    // Killed after the output got its name: only the work folder is left to remove.
    const result = done(plan.totals.quantized);
    await job.remove();
    return result;
  }
  if (job.resumed) {
    const before = model.blocks.filter(({ index }) => job.done(blockStep(stage, index))).length;
    env.log.info(`Going on after block ${before} of ${model.blocks.length}`);
  }
  const several = targets.length > 1;
  const emit = options.emit ?? [];
  const deployed = {
    name: basename(resolve(options.out)).replace(/\.gguf$/, ''),
    context: model.context,
    tensorParallel: Math.max(1, ...(options.tensorParallel ?? [])),
  };
  const writers: CheckpointWriter[] = [];
  try {
    for (const [i, { format, output: own, writing }] of targets.entries()) {
      const card = modelCard(options, format, prepared, set);
      const writer = await createWriter({
        ...writing,
        job,
        ...(several && { part: format }),
        tensors: own.tensors.map(({ planned }) => planned),
        ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
        companions: checkpoint.companions,
        extraFiles: new Map([['README.md', card], ...writing.extraFiles, ...deployment(emit, format, deployed)]),
        card: (validation) => `${card}${measuredSection(reportsOf(job, model), validation)}`,
        provenance: {
          tool: options.tool,
          recipe: { command: options.commandLine, ...fingerprint(options, prepared, set, env) },
          inputs: checkpoint.files,
        },
        // The others hold the same codes, or say in the report how they differ.
        accept: i === 0 ? options.accept : undefined,
      });
      writers.push(writer);
    }
    await runBlocks(options, prepared, set, job, writers, env);
    await checkpoint.assertUnchanged();
    const blocks = blockResults(job, stage, model).map(({ result }) => fromJson(result));
    const checking = performance.now();
    let verified = 0;
    for (const [i, target] of targets.entries()) {
      const { format } = target;
      await writers[i]!.flush();
      const folder = several ? join(job.outputFolder, format) : job.outputFolder;
      verified += await target.verify(folder, probesOf(blocks, format), env);
    }
    env.log.info(`Verified ${verified} quantized linears as they were read back, ${seconds(checking)}`);
    for (const writer of writers) await writer.finish(provenanceReport(plan, blocks));
    if (several) {
      const outputs = targets.map(({ format, output: { bytes } }) => ({ folder: format, bytes }));
      await deliverParts(job, { schema: 1, tool: options.tool, outputs });
    }
    const result = done(verified);
    await job.remove();
    return result;
  } finally {
    for (const writer of writers) await writer.close();
  }
}

const reportsOf = (job: Job, model: OpenModel['model']): BlockReport[] =>
  blockResults(job, stage, model).map(({ result }) => fromJson(result));

/** What each linear must read back as: the codes' own values, or those that a target has in their place. */
const probesOf = (blocks: readonly BlockReport[], format: string): Map<string, string> =>
  new Map(blocks.flatMap(({ linears }) => linears.map(({ name, probe, probes }) => [name, probes?.[format] ?? probe])));

export type { QuantizeOptions, QuantizePreview, QuantizeResult } from './options.js';

const stage = 'quantize';

const seconds = (since: number): string => `${((performance.now() - since) / 1000).toFixed(1)} s`;

async function runBlocks(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  writers: readonly CheckpointWriter[],
  env: JobEnv,
): Promise<void> {
  const reader = new WeightReader(
    prepared.open,
    env.device,
    set === undefined ? 'f32' : statesOf(options, prepared, env),
  );
  const targets = prepared.targets.map((target, i): TargetWriter => ({
    name: target.format,
    target: target.open(reader, env),
    writer: writers[i]!,
  }));
  try {
    await blocksInto(targets, reader, options, prepared, set, job, env);
  } finally {
    for (const { target } of targets) await target.close?.();
  }
}

async function blocksInto(
  targets: readonly TargetWriter[],
  reader: WeightReader,
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  env: JobEnv,
): Promise<void> {
  const { open, plan, recipe } = prepared;
  const { model } = open;
  const dtype = statesOf(options, prepared, env);
  if (!job.done('outer')) {
    for (const { target, writer } of targets) {
      await target.writeThrough(-1, writer);
      await writer.flush();
    }
    await job.mark('outer');
  }
  const uncoveredBefore = model.blocks
    .filter(({ index }) => job.done(blockStep(stage, index)))
    .reduce((sum, { index }) => {
      const { result } = job.data(blockStep(stage, index)) as { result: Json };
      return sum + (fromJson(result).coverage?.uncovered ?? 0);
    }, 0);
  using visitor = new QuantVisitor({
    env,
    plan,
    recipe,
    targets,
    plannedDType: plannedDTypes(prepared),
    scales: storedScales(options.formats),
    maxUncovered: options.maxUncovered ?? 0.1,
    calibrateAllExperts: options.calibrateAllExperts ?? false,
    experts: model.blocks.reduce((sum, { moe }) => sum + (moe?.experts ?? 0), 0),
    uncoveredBefore,
  });
  const common = { open, env, reader, job, stage, resumeHint: `Go on with: ${options.commandLine}` };
  if (set === undefined) {
    await eachBlock(common, async (block, weights) => {
      for (const linears of block.linears) await visitor.quantize(linears, weights, { statistics: undefined });
      return await visitor.finish(block);
    });
    return;
  }
  await streamBlocks(
    {
      ...common,
      set,
      dtype,
      ...(options.batchRows !== undefined && { batchRows: options.batchRows }),
      ...(options.budget !== undefined && { budget: options.budget }),
    },
    visitor,
  );
}

function plannedDTypes({ output }: Prepared): (name: string) => FloatDType {
  const types = new Map(output.tensors.map(({ planned }) => [planned.name, planned.dtype]));
  return (name) => (types.get(name) ?? 'bf16') as FloatDType;
}

function provenanceReport(plan: QuantPlan, blocks: readonly BlockReport[]): Record<string, Json> {
  const left = [...plan.linears.values()].flatMap(({ linear, reason }) => (reason ? [{ name: linear.name, reason }] : [])); // prettier-ignore
  // No times: a resumed job writes the same bytes as an uninterrupted one.
  const linears = blocks.flatMap((block) => block.linears).map(({ seconds: _, ...linear }) => linear);
  return {
    linears: JSON.parse(JSON.stringify(linears)) as Json,
    leftInHighPrecision: left,
    experts: JSON.parse(JSON.stringify(blocks.flatMap(({ coverage }) => coverage ?? []))) as Json,
    notes: [...plan.notes],
  };
}

function stagesOf(blockSeconds: readonly number[], blocks: readonly BlockReport[]): Record<string, number> {
  const stages: Record<string, number> = {};
  for (const block of blocks) {
    for (const [name, value] of Object.entries(block.stages)) stages[name] = (stages[name] ?? 0) + value;
  }
  const named = Object.values(stages).reduce((sum, value) => sum + value, 0);
  const all = blockSeconds.reduce((sum, value) => sum + value, 0);
  return { forward: Math.max(0, all - named), ...stages };
}

/** One paragraph for people. */
export function summary(result: QuantizeResult): string {
  const { plan, outputBytes, inputBytes } = result;
  const { quantized, left, bitsPerWeight } = plan.totals;
  return (
    `${quantized} linears at ${bitsPerWeight.toFixed(2)} bits, ${left} left in high precision; ` +
    `${formatBytes(inputBytes)} -> ${formatBytes(outputBytes)}`
  );
}
