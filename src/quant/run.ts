import { badUsage } from '../base/errors.js';
import { resolve } from 'node:path';
import { exists, formatBytes } from '../base/files.js';
import { Job, requireNoOutput, type Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { createWriter, isFileOutput } from '../checkpoint/writer.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import { layoutWriters } from '../layout/detect.js';
import type { LayoutName, LayoutWriter } from '../layout/types.js';
import { calibrationTokens, type CalibrationSet } from '../arch/calibration.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { blockResults, blockStep, eachBlock, streamBlocks } from '../arch/stream.js';
import { WeightReader } from '../arch/weights.js';
import { modelCard } from './card.js';
import type { QuantizeOptions, QuantizePreview, QuantizeResult } from './options.js';
import { refuseInGguf } from './blocks.js';
import { planGgufOutput, type GgufOutput } from './gguf.js';
import { planOutput } from './output.js';
import { makePlan, type Holder, type QuantPlan } from './plan.js';
import { fromJson, type BlockReport } from './report.js';
import { checkRecipe, type Recipe } from './scheme.js';
import { defaultScope } from './select.js';
import { layoutTarget, type Target } from './target.js';
import { verifyGguf, verifyLinears } from './verify.js';
import { QuantVisitor } from './visitor.js';

interface Prepared extends QuantizePreview {
  readonly open: OpenModel;
  /** Present where the output is a GGUF file. */
  readonly gguf?: GgufOutput;
  readonly recipe: Recipe;
  readonly scope: string;
}

async function prepare(options: QuantizeOptions): Promise<Prepared> {
  const { input, format, config, keep = [] } = options;
  checkRecipe(options.recipe);
  const gguf = format === 'gguf';
  const layout = format === 'gguf' ? undefined : layoutWriters[format];
  if (!gguf && layout === undefined) throw badUsage(`--format ${format} cannot be written`, { expected: Object.keys(layoutWriters).join(', ') }); // prettier-ignore
  if (!gguf && isFileOutput(options.out)) {
    throw badUsage('A quantized model is a folder', {
      got: options.out,
      expected: 'a folder name for -o, without an extension such as .bin',
      hint: `${format} keeps its settings in config.json beside the weights.`,
    });
  }
  if (gguf && isFileOutput(options.out) && !options.out.endsWith('.gguf')) {
    throw badUsage('The output is a GGUF file', {
      got: options.out,
      expected: 'a name that ends in .gguf, or a folder',
    });
  }
  const freeSign = options.recipe.search.freeSign && (layout?.signedScales ?? true);
  const { blocks, ...common } = { ...options.recipe, search: { ...options.recipe.search, freeSign } };
  const recipe: Recipe = gguf ? { ...common, blocks: blocks ?? 'q4_k' } : common;
  const open = await openModel(input, { config });
  const scope = options.scope ?? defaultScope(open.model.modelType);
  const holder: Holder = layout ?? { refuse: refuseInGguf };
  const plan = makePlan(open.model, open.checkpoint, recipe, { scope, keep }, holder);
  const file = recipe.blocks && (await planGgufOutput(open, plan, recipe.blocks));
  const output = file?.plan ?? planOutput(open, plan, layout!);
  const inputBytes = [...open.checkpoint.tensors.values()].reduce((sum, { span }) => sum + span.bytes, 0);
  return {
    open,
    model: open.model,
    ...(file && { gguf: file }),
    recipe,
    scope,
    plan,
    output,
    inputBytes,
    notices: [...open.notes, ...plan.notes, ...(file?.notes ?? [])],
  };
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
    const job = await Job.open({
      out: options.out,
      fingerprint: fingerprint(options, prepared, set, env),
      ...(options.overwrite !== undefined && { overwrite: options.overwrite }),
      ...(options.restart !== undefined && { restart: options.restart }),
    });
    try {
      return await runJob(options, prepared, set, job, env, started);
    } catch (error) {
      await job.fail();
      throw error;
    } finally {
      await job.close();
    }
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
  { open, recipe, scope }: Prepared,
  set: CalibrationSet | undefined,
  env: JobEnv,
): Record<string, Json> {
  return {
    command: 'quantize',
    tool: options.tool.version,
    input: open.checkpoint.fingerprint,
    recipe: JSON.parse(JSON.stringify(recipe)) as Json,
    selection: { scope, keep: options.keep ?? [] },
    format: options.format,
    calibration: set === undefined ? null : { text: set.hash, description: set.description },
    computing: { device: env.device.kind, states: statesOf(options, env), batchRows: options.batchRows ?? null },
    shardSize: options.shardSize ?? null,
  };
}

const layoutOf = ({ format }: QuantizeOptions): LayoutWriter => layoutWriters[format as LayoutName];

const statesOf = ({ states }: QuantizeOptions, env: JobEnv): 'f32' | 'bf16' =>
  states ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');

async function runJob(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  env: JobEnv,
  started: number,
): Promise<QuantizeResult> {
  const { open, plan, output, gguf } = prepared;
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
  const { quantization_config: _q, compression_config: _c, ...plainConfig } = checkpoint.config;
  const layout = gguf ? undefined : layoutOf(options);
  const config = { ...plainConfig, ...plan.config, ...(layout && { quantization_config: layout.config(plan.use) }) };
  const writer = await createWriter({
    job,
    format: gguf ? 'gguf' : 'safetensors',
    ...(gguf && { gguf: gguf.metadata }),
    tensors: output.tensors.map(({ planned }) => planned),
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config,
    companions: checkpoint.companions,
    extraFiles: new Map([['README.md', modelCard(options, prepared, set)]]),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...fingerprint(options, prepared, set, env) },
      inputs: checkpoint.files,
    },
    accept: options.accept,
  });
  try {
    await runBlocks(options, prepared, set, job, writer, env);
    await checkpoint.assertUnchanged();
    await writer.flush();
    const blocks = blockResults(job, stage, model).map(({ result }) => fromJson(result));
    const probes = new Map(blocks.flatMap(({ linears }) => linears.map(({ name, probe }) => [name, probe] as const)));
    const checking = performance.now();
    const verified = gguf
      ? await verifyGguf(job.outputFolder, plan, probes, env)
      : await verifyLinears(job.outputFolder, config, plan, probes, env);
    env.log.info(`Verified ${verified} quantized linears as they were read back, ${seconds(checking)}`);
    await writer.finish(provenanceReport(plan, blocks));
    const result = done(verified);
    await job.remove();
    return result;
  } finally {
    await writer.close();
  }
}

export type { QuantizeOptions, QuantizePreview, QuantizeResult } from './options.js';

const stage = 'quantize';

const seconds = (since: number): string => `${((performance.now() - since) / 1000).toFixed(1)} s`;

async function runBlocks(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  writer: CheckpointWriter,
  env: JobEnv,
): Promise<void> {
  const { open, output, gguf } = prepared;
  const reader = new WeightReader(open, env.device, set === undefined ? 'f32' : statesOf(options, env));
  const file = gguf?.target(env);
  const target: Target = file ?? layoutTarget(layoutOf(options), output, reader, env);
  try {
    await blocksInto(target, reader, options, prepared, set, job, writer, env);
  } finally {
    await file?.close();
  }
}

async function blocksInto(
  target: Target,
  reader: WeightReader,
  options: QuantizeOptions,
  { open, plan, recipe }: Prepared,
  set: CalibrationSet | undefined,
  job: Job,
  writer: CheckpointWriter,
  env: JobEnv,
): Promise<void> {
  const { model } = open;
  const dtype = statesOf(options, env);
  if (!job.done('outer')) {
    await target.writeThrough(-1, writer);
    await writer.flush();
    await job.mark('outer');
  }
  const uncoveredBefore = model.blocks
    .filter(({ index }) => job.done(blockStep(stage, index)))
    .reduce((sum, { index }) => {
      const { result } = job.data(blockStep(stage, index)) as { result: Json };
      return sum + (fromJson(result).coverage?.uncovered ?? 0);
    }, 0);
  const visitor = new QuantVisitor({
    env,
    plan,
    recipe,
    target,
    writer,
    maxUncovered: options.maxUncovered ?? 0.1,
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
