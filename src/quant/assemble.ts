import { basename, join, resolve } from 'node:path';
import type { Job, Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { createWriter } from '../checkpoint/writer.js';
import { deliverParts } from '../checkpoint/sidecars.js';
import type { Accept, CheckpointWriter, TensorSink } from '../checkpoint/types.js';
import type { CalibrationSet } from '../arch/calibration.js';
import { blockResults, blockStep } from '../arch/stream.js';
import { WeightReader } from '../arch/weights.js';
import { deployment } from '../targets/deploy/emit.js';
import { measuredSection, modelCard } from './card.js';
import type { QuantizeOptions, QuantizeResult } from './options.js';
import type { QuantPlan } from './plan.js';
import { fingerprint, statesOf, type Prepared } from './prepare.js';
import { fromJson, type BlockReport } from './report.js';
import type { TargetWriter } from './visitor.js';

/** The stage whose steps in the journal are the finished blocks. */
export const stage = 'quantize';

/** A job under way. */
export interface Run {
  readonly options: QuantizeOptions;
  readonly prepared: Prepared;
  readonly set: CalibrationSet | undefined;
  readonly job: Job;
  readonly env: JobEnv;
  /** `performance.now()` when it began. */
  readonly started: number;
}

/**
 * Everything around the blocks: makes the outputs, writes what lies outside the blocks, lets `fill` write the blocks and
 * mark their steps, then reads the outputs back, compares, and gives them their name.
 */
export async function assemble(
  run: Run,
  fill: (targets: readonly TargetWriter[], reader: WeightReader, env: JobEnv) => Promise<void>,
): Promise<QuantizeResult> {
  const { options, prepared, job, env } = run;
  const { open, plan, targets } = prepared;
  const { model, checkpoint } = open;
  if (job.finished) {
    // Killed after the output got its name: only the work folder is left to remove.
    const result = resultOf(run, plan.totals.quantized);
    await job.remove();
    return result;
  }
  const before = model.blocks.filter(({ index }) => job.done(blockStep(stage, index))).length;
  if (before > 0) env.log.info(`Going on after block ${before} of ${model.blocks.length}`);
  const several = targets.length > 1;
  const writers: CheckpointWriter[] = [];
  try {
    const accepts = acceptances(run);
    for (const i of targets.keys()) writers.push(await writerOf(run, i, accepts[i]));
    env.log.debug(`${secondsSince(run.started)} s until the outputs are planned`);
    await withTargets(run, writers, async (opened, reader) => {
      // Embedding and head are copied beside the blocks, which end early when that fails.
      const failing = new AbortController();
      const outer = job.done('outer') ? Promise.resolve() : writeOuter(opened, job);
      outer.catch(() => failing.abort());
      const signal = AbortSignal.any([env.signal, failing.signal]);
      const filled = fill(opened, reader, { ...env, signal });
      await Promise.allSettled([filled, outer]);
      // What ended the other one early is the reason.
      await (failing.signal.aborted && !env.signal.aborted ? outer : filled);
      await outer;
    });
    env.log.debug(`${secondsSince(run.started)} s until the blocks are written`);
    await checkpoint.assertUnchanged();
    const blocks = reportsOf(run);
    const checking = performance.now();
    let verified = 0;
    for (const [i, target] of targets.entries()) {
      const { format } = target;
      await writers[i]!.flush();
      const folder = several ? join(job.outputFolder, format) : job.outputFolder;
      verified += await target.verify(folder, probesOf(blocks, format), env);
    }
    env.log.info(`Verified ${verified} quantized linears as they were read back, ${secondsSince(checking)} s`);
    const finishing = performance.now();
    // The one that is validated first: what was measured stands in the cards of the others too.
    const judged = judgedOf(run);
    for (const i of [judged, ...targets.keys()].filter((i, at, all) => i >= 0 && all.indexOf(i) === at)) {
      await writers[i]!.finish(provenanceReport(plan, blocks));
    }
    env.log.debug(`${secondsSince(finishing)} s until checksums and names are in place`);
    if (several) {
      const outputs = targets.map(({ format, output: { bytes } }) => ({ folder: format, bytes }));
      await deliverParts(job, { schema: 1, tool: options.tool, outputs });
    }
    const result = resultOf(run, verified);
    await job.remove();
    return result;
  } finally {
    for (const writer of writers) await writer.close();
  }
}

const secondsSince = (start: number): string => ((performance.now() - start) / 1000).toFixed(1);

/** What lies outside the blocks. */
async function writeOuter(opened: readonly TargetWriter[], job: Job): Promise<void> {
  for (const { target, writer } of opened) {
    await target.writeThrough(-1, writer);
    await writer.flush();
  }
  await job.mark('outer');
}

/** The output that is validated: the first that is a model; -1: none is. */
const judgedOf = ({ prepared: { targets } }: Run): number => targets.findIndex(({ format }) => format !== 'imatrix');

/**
 * How each output is judged: one is compared with the input, the others take its verdict over and say whether they hold
 * the same weights.
 */
function acceptances(run: Run): (Accept | undefined)[] {
  const { accept } = run.options;
  const { targets } = run.prepared;
  const judged = judgedOf(run);
  if (!accept) return targets.map(() => undefined);
  let verdict: Json | undefined;
  return targets.map(({ format }, i): Accept | undefined => {
    if (format === 'imatrix') return undefined;
    if (i === judged) return async (staged) => (verdict = await accept(staged));
    return () => {
      const on = targets[judged]!.format;
      const [own, other] = [format, on].map((one) => probesOf(reportsOf(run), one));
      const sameWeights = [...own!].every(([name, value]) => other!.get(name) === value);
      return Promise.resolve({ ...(verdict as Record<string, Json>), measuredOn: on, sameWeights });
    };
  });
}

/** Opens what brings the blocks into each output's form; `sinks` take the tensors, one for each target of the plan. */
export async function withTargets(
  { options, prepared, set, env }: Omit<Run, 'job' | 'started'>,
  sinks: readonly TensorSink[],
  body: (targets: readonly TargetWriter[], reader: WeightReader) => Promise<void>,
): Promise<void> {
  const dtype = set === undefined ? 'f32' : statesOf(options, prepared, env);
  const reader = new WeightReader(prepared.open, env.device, dtype);
  const targets = prepared.targets.map((target, i): TargetWriter => ({
    name: target.format,
    target: target.open(reader, env),
    writer: sinks[i]!,
  }));
  try {
    await body(targets, reader);
  } finally {
    for (const { target } of targets) await target.close?.();
  }
}

async function writerOf(run: Run, i: number, accept: Accept | undefined): Promise<CheckpointWriter> {
  const { options, prepared, set, job, env } = run;
  const { open, targets } = prepared;
  const { format, plan, output, writing } = targets[i]!;
  const { companions, files } = open.checkpoint;
  const card = modelCard(options, format, plan, set);
  const deployed = {
    name: basename(resolve(options.out)).replace(/\.gguf$/, ''),
    context: open.model.context,
    tensorParallel: Math.max(1, ...(options.tensorParallel ?? [])),
  };
  return await createWriter({
    ...writing,
    job,
    ...(targets.length > 1 && { part: format }),
    tensors: output.tensors.map(({ planned }) => planned),
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    companions,
    extraFiles: new Map([
      ['README.md', card],
      ...writing.extraFiles,
      ...deployment(options.emit ?? [], format, deployed),
    ]),
    ...(format !== 'imatrix' && {
      card: (validation: Json | undefined) => `${card}${measuredSection(reportsOf(run), validation)}`,
    }),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...fingerprint(options, prepared, set, env) },
      inputs: files,
    },
    accept,
  });
}

const reportsOf = ({ job, prepared }: Run): BlockReport[] =>
  blockResults(job, stage, prepared.open.model).map(({ result }) => fromJson(result));

/** What each linear must read back as: the codes' own values, or those that a target has in their place. */
const probesOf = (blocks: readonly BlockReport[], format: string): Map<string, string> =>
  new Map(blocks.flatMap(({ linears }) => linears.map(({ name, probe, probes }) => [name, probes?.[format] ?? probe])));

function resultOf({ prepared, set, job, started }: Run, verified: number): QuantizeResult {
  const { plan, output, inputBytes, notices, open } = prepared;
  const results = blockResults(job, stage, open.model);
  const blocks = results.map(({ result }) => fromJson(result));
  return {
    out: job.out,
    plan,
    outputBytes: output.bytes,
    inputBytes,
    blocks,
    calibration: set?.description,
    notices: [...notices, ...(set?.notices ?? [])],
    verified,
    resumed: job.resumed,
    seconds: (performance.now() - started) / 1000,
    stages: stagesOf(results.map(({ seconds }) => seconds), blocks), // prettier-ignore
  };
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
