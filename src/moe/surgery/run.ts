import { badInput, badUsage } from '../../base/errors.js';
import { Job, requireNoOutput, type Json } from '../../base/job.js';
import { stopIfAborted, type JobEnv } from '../../backend/env.js';
import { createWriter } from '../../checkpoint/writer.js';
import type { CheckpointWriter } from '../../checkpoint/types.js';
import { calibrationTokens, type CalibrationSet } from '../../arch/calibration.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import { blockResults, streamBlocks } from '../../arch/stream.js';
import { WeightReader } from '../../arch/weights.js';
import { writeThrough } from '../output.js';
import { toJson } from '../report.js';
import { isTorch, statesOf } from '../run.js';
import { tokensThatFit } from '../sample.js';
import { surgeryCard } from './card.js';
import type { SurgeryOptions } from './options.js';
import { describeSurgery, planSurgery, type SurgeryPlan } from './plan.js';
import { surgeryTotals, type SurgeryLayer, type SurgeryReport } from './report.js';
import { SurgeryVisitor } from './visitor.js';

/** Below two held-out stretches nothing could be judged. */
const leastTokens = 1024;
/** With fewer for each expert its worth is not well known. */
const goodTokensEach = 64;
/** A sample's rows lie there once, and in parts in the precision of the stream. */
const bytesOfRow = 8;
const stage = 'moe';

/** The plan alone, from headers. */
export async function previewSurgery(options: SurgeryOptions): Promise<SurgeryPlan> {
  const open = await openModel(options.input, { config: options.config });
  try {
    return planSurgery(open, options);
  } finally {
    await open.close();
  }
}

/**
 * Prunes or merges the experts of a mixture, block by block: each layer is decided on what the converted layers before
 * it give. Killed at any instant, the same call goes on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`.
 */
export async function runSurgery(options: SurgeryOptions, env: JobEnv): Promise<SurgeryReport> {
  const started = performance.now();
  if (options.out.endsWith('.gguf')) throw badUsage('A mixture cannot be written as .gguf', { hint: 'Write a folder or a .bin, then convert it.' }); // prettier-ignore
  const open = await openModel(options.input, { config: options.config });
  try {
    const plan = planSurgery(open, options);
    for (const line of [...open.notes, ...describeSurgery(plan)]) env.log.info(line);
    const { restart = false, overwrite = false, out } = options;
    if (!restart) await requireNoOutput(out, overwrite);
    const set = await calibrate(options, open, plan, env);
    const fingerprint = fingerprintOf(options, open, set, env);
    return await Job.run({ out, overwrite, restart, fingerprint }, async (job) => {
      const context = { options, open, plan, set, job, env };
      if (!job.finished) await runJob(context, fingerprint);
      const layers = layersOf(context);
      await job.remove();
      const notices = [...open.notes, ...plan.notes, ...set.notices];
      const seconds = (performance.now() - started) / 1000;
      return { out: job.out, plan, by: measure(options), layers, calibration: set.description, notices, resumed: job.resumed, seconds }; // prettier-ignore
    });
  } finally {
    await open.close();
  }
}

interface Context {
  readonly options: SurgeryOptions;
  readonly open: OpenModel;
  readonly plan: SurgeryPlan;
  readonly set: CalibrationSet;
  readonly job: Job;
  readonly env: JobEnv;
}

const measure = ({ by = 'error' }: SurgeryOptions) => by;

async function calibrate(
  { calibration }: SurgeryOptions,
  open: OpenModel,
  { experts: [experts], active }: SurgeryPlan,
  env: JobEnv,
): Promise<CalibrationSet> {
  if (!calibration) throw badUsage('Pruning and merging need calibration text');
  const seqLen = calibration.seqLen ?? Math.min(2048, open.model.context);
  const set = await calibrationTokens(open, { ...calibration, seqLen }, env);
  for (const notice of set.notices) env.log.warn(notice);
  env.log.info(`Calibration: ${set.description}`);
  const tokens = set.n * set.seqLen;
  const good = Math.max(leastTokens, Math.ceil((goodTokensEach * experts) / active));
  if (tokens < leastTokens) {
    throw badInput('Too little calibration text to judge experts by', {
      got: `${tokens} tokens`,
      expected: `at least ${leastTokens}, better ${good} (${goodTokensEach} for each of ${experts} experts, of which a token takes ${active})`,
      hint: `Add text with --calibration, or raise --samples to ${Math.ceil(good / seqLen)} of --seq-len ${seqLen}.`,
    });
  }
  if (tokens < good) env.log.warn(`${tokens} calibration tokens are few to judge ${experts} experts by: ${good} or more know better which to keep.`); // prettier-ignore
  return set;
}

function fingerprintOf(
  options: SurgeryOptions,
  open: OpenModel,
  set: CalibrationSet,
  env: JobEnv,
): Record<string, Json> {
  const { kind, keep, seed = 0, out, batchRows, shardSize } = options;
  return {
    command: 'moe',
    tool: options.tool.version,
    input: open.checkpoint.fingerprint,
    recipe: { kind, keep, by: measure(options), seed },
    format: formatOf(out),
    calibration: { text: set.hash, description: set.description },
    computing: { device: env.device.kind, states: statesOf(options, env), batchRows: batchRows ?? null },
    shardSize: shardSize ?? null,
  };
}

const formatOf = (out: string) => (isTorch(out) ? 'torch' : 'safetensors');

async function runJob(context: Context, fingerprint: Record<string, Json>): Promise<void> {
  const { options, open, plan, set, job } = context;
  const { checkpoint } = open;
  const writer = await createWriter({
    job,
    format: formatOf(options.out),
    tensors: plan.tensors.map(({ planned }) => planned),
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config: plan.config,
    companions: checkpoint.companions,
    extraFiles: new Map([...checkpoint.extraFiles, ['README.md', surgeryCard(options, measure(options), plan, set)]]),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...fingerprint },
      inputs: checkpoint.files,
    },
    accept: options.accept,
  });
  try {
    await convertBlocks(context, writer);
    await checkpoint.assertUnchanged();
    const layers = layersOf(context);
    await writer.finish({
      experts: toJson(plan.experts),
      totals: toJson(surgeryTotals(layers)),
      layers: toJson(layers),
      cost: toJson(plan.cost),
      notes: [...open.notes, ...plan.notes],
    });
  } finally {
    await writer.close();
  }
}

async function convertBlocks({ options, open, plan, set, job, env }: Context, writer: CheckpointWriter): Promise<void> {
  const dtype = statesOf(options, env);
  const reader = new WeightReader(open, env.device, dtype);
  if (!job.done('outer')) {
    await writeThrough(plan.tensors, -1, writer, reader, env.device);
    await writer.flush();
    await job.mark('outer');
  }
  const resumeHint = `Go on with: ${options.commandLine}`;
  const { seed = 0, batchRows, budget } = options;
  using visitor = new SurgeryVisitor({
    ...{ env, open, plan, by: measure(options), seed, writer, reader },
    sampleTokens: tokensThatFit(bytesOfRow * open.model.hidden, env, budget),
  });
  await streamBlocks(
    {
      ...{ open, env, reader, job, stage, resumeHint, set, dtype },
      ...(batchRows !== undefined && { batchRows }),
      ...(budget !== undefined && { budget }),
    },
    visitor,
  );
  stopIfAborted(env, resumeHint);
}

const layersOf = ({ job, open }: Context): SurgeryLayer[] =>
  blockResults(job, stage, open.model)
    .map(({ result }) => result as unknown as SurgeryLayer | null)
    .filter((layer) => layer !== null);
