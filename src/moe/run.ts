import { resolve } from 'node:path';
import { ConvertError, badInput, badUsage } from '../base/errors.js';
import { Job, requireNoOutput, type Json } from '../base/job.js';
import { Random } from '../base/rng.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import { createWriter, isFileOutput } from '../checkpoint/writer.js';
import { calibrationTokens, type CalibrationSet } from '../arch/calibration.js';
import { openModel, type OpenModel } from '../arch/open.js';
import { blockResults, blockStep, eachBlock, streamBlocks } from '../arch/stream.js';
import { WeightReader } from '../arch/weights.js';
import { modelCard } from './card.js';
import type { Container } from './containers/types.js';
import { leastBalance, type MoeOptions } from './options.js';
import { describePlan, describeShape, dropRatioOf, makePlan, type MoePlan, type MoeRecipe } from './plan.js';
import { describeSearch, layerFromJson, toJson, totalsOf, type LayerReport, type MoeReport } from './report.js';
import { finishedLayers } from './reuse.js';
import { sampleBytes, tokensThatFit } from './sample.js';
import { searchShared, sharedCandidates, type SearchOptions, type SharedSearch } from './search-shared.js';
import { pieces, type MoeShape } from './shape.js';
import { StandingTest } from './standing-test.js';
import { convertCopies } from './upcycle.js';
import { SplitVisitor } from './visitor.js';
import { writeThrough } from './output.js';

/** Router fitting: found on dense-32m at 8 and 64 experts (docs/moe.md). */
const tuning = { rounds: 10, steps: 30, lambda: 1e-3 } as const;
/** The last fit has so many times the steps of one round's. */
const finalFactor = 5;
/** A router has one weight a channel and expert: fewer tokens than this many times the channels cannot hold them. */
const [leastTokens, goodTokens] = [2, 16] as const;
/** More tokens than this, and than the routers want, make clusters and routers slower but no better; the refit sees all. */
const sampleEnough = 65_536;
/** Larger than this the standing test has failed: something is wrong with the split itself. */
const exactnessLimit = 1e-3;

/** The plan alone, from headers. */
export async function previewMoe(options: MoeOptions): Promise<MoePlan> {
  const open = await openModel(options.input, { config: options.config });
  try {
    const recipe = plainRecipe(options);
    const plan = makePlan(open, recipe, isTorch(options.out));
    requireSplit(options, plan);
    if (options.shared !== 'auto') return plan;
    const tried = sharedCandidates(recipe, plan).map(({ shared }) => shared).join(', '); // prettier-ignore
    return { ...plan, notes: [...plan.notes, `How many of the ${pieces(plan.shape)} parts are shared is decided on calibration text: ${tried}.`] }; // prettier-ignore
  } finally {
    await open.close();
  }
}

export const isTorch = (out: string): boolean => isFileOutput(out) && !out.endsWith('.safetensors');

/**
 * Restructures a dense checkpoint into a mixture of experts, block by block. Killed at any instant, the same call goes
 * on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`.
 */
export async function runMoe(options: MoeOptions, env: JobEnv): Promise<MoeReport> {
  const started = performance.now();
  if (options.out.endsWith('.gguf')) throw badUsage('A mixture cannot be written as .gguf', { hint: 'Write a folder or a .bin, then convert it.' }); // prettier-ignore
  const open = await openModel(options.input, { config: options.config });
  try {
    const recipe = plainRecipe(options);
    const asked = makePlan(open, recipe, isTorch(options.out));
    requireSplit(options, asked);
    if (options.shared === 'auto') sharedCandidates(recipe, asked);
    for (const line of [...open.notes, ...describePlan(asked)]) env.log.info(line);
    const { reuse = false, restart = false, overwrite = false } = options;
    if (!restart && !reuse) await requireNoOutput(options.out, overwrite);
    const set = asked.method === 'split' ? await calibrate(options, open, env) : undefined;
    const print = fingerprint(options, asked, open, set, env);
    const decided = (search: SharedSearch | undefined) => {
      if (!search) return { options, open, set, print, plan: asked };
      const { shared, experts, active } = search.best;
      return { options, open, set, print, search, plan: makePlan(open, { ...recipe, shared, experts, active }, isTorch(options.out)) }; // prettier-ignore
    };
    const finished = reuse && !restart ? await finishedLayers(options.out, print) : undefined;
    if (finished) {
      return { ...unmeasured(decided(finished.sharedSearch)), ...finished, out: resolve(options.out), resumed: true, seconds: 0 }; // prettier-ignore
    }
    return await Job.run({ out: options.out, overwrite, restart, fingerprint: print }, async (job) => {
      const search = options.shared === 'auto' && set ? await searchOnce(job, open, set, searchOptions(options, recipe, env), env) : undefined; // prettier-ignore
      return await runJob({ ...decided(search), job, env, started });
    });
  } finally {
    await open.close();
  }
}

interface Context {
  readonly options: MoeOptions;
  readonly open: OpenModel;
  readonly plan: MoePlan;
  readonly set: CalibrationSet | undefined;
  readonly search?: SharedSearch;
  readonly print: Record<string, Json>;
  readonly job: Job;
  readonly env: JobEnv;
  readonly started: number;
}

/** The search as the job's first step: a run that goes on finds what an earlier one found. */
async function searchOnce(
  job: Job,
  open: OpenModel,
  set: CalibrationSet,
  options: SearchOptions,
  env: JobEnv,
): Promise<SharedSearch> {
  const known = job.data(searchStep) as unknown as SharedSearch | undefined;
  const search = known ?? (await searchShared(open, set, options, env));
  if (!known) await job.mark(searchStep, toJson(search));
  env.log.info(describeSearch(search));
  return search;
}

async function calibrate(options: MoeOptions, open: OpenModel, env: JobEnv): Promise<CalibrationSet> {
  const { calibration } = options;
  if (!calibration) throw badUsage('--method split needs calibration text');
  const seqLen = calibration.seqLen ?? Math.min(2048, open.model.context);
  const set = await calibrationTokens(open, { ...calibration, seqLen }, env);
  for (const notice of set.notices) env.log.warn(notice);
  env.log.info(`Calibration: ${set.description}`);
  const [tokens, { hidden }] = [set.n * set.seqLen, open.model];
  const enough = (times: number) => `${times * hidden} (${times} x the ${hidden} channels)`;
  // Below two held-out stretches nothing could be judged.
  if (tokens < Math.max(leastTokens * hidden, 1024)) {
    throw badInput('Too little calibration text for the routers', {
      got: `${tokens} tokens`,
      expected: `at least ${leastTokens * hidden < 1024 ? '1024' : enough(leastTokens)}, better ${enough(goodTokens)}`,
      hint: `Add text with --calibration, or raise --samples to ${Math.ceil((goodTokens * hidden) / seqLen)} of --seq-len ${seqLen}.`,
    });
  }
  if (tokens < goodTokens * hidden) {
    env.log.warn(`${tokens} calibration tokens are few for routers over ${hidden} channels: ${enough(goodTokens)} or more give better ones.`); // prettier-ignore
  }
  return set;
}

/** A fixed choice of experts, and balanced loads, have to stand in the selection bias. */
function requireSplit({ split = 'fitted', method, balance }: MoeOptions, { container, shape }: MoePlan): void {
  if (balance !== undefined) requireBalance(balance, method === 'split' ? split : method, container, shape);
  if (split !== 'fitted' && method !== 'split') throw badUsage(`--split ${split} goes with --method split`, { got: `--method ${method}` }); // prettier-ignore
  if (split !== 'static' || container.selectionBias) return;
  throw badUsage(`The container ${container.name} cannot hold a static mask: its router has no selection bias`, {
    hint: 'Use --container glm4_moe.',
  });
}

function requireBalance(bound: number, kind: string, container: Container, { active, routed }: MoeShape): void {
  const got = `--balance ${bound}`;
  if (!(bound >= leastBalance)) throw badUsage('--balance is the largest MaxVio to be left', { got, expected: `at least ${leastBalance}` }); // prettier-ignore
  if (kind !== 'fitted')
    throw badUsage('--balance evens out what a fitted router does', { got: `${got} with ${kind}` });
  if (active === routed) throw badUsage('With all experts active every load is the same', { got, expected: `--active below ${routed}` }); // prettier-ignore
  if (container.selectionBias) return;
  throw badUsage(`The container ${container.name} cannot balance loads: its router has no selection bias`, {
    got,
    hint: 'Use --container glm4_moe.',
  });
}

const refits = (o: MoeOptions): boolean => o.method === 'split' && o.active < o.experts && (o.refit ?? true);
export const statesOf = ({ states }: Pick<MoeOptions, 'states'>, env: JobEnv): 'f32' | 'bf16' =>
  states ?? (env.device.kind === 'cpu' ? 'f32' : 'bf16');

/** What stays the same whatever number of shared experts is found. */
const searchedShape = ({ routed, active, shared, ...rest }: MoeShape) => ({
  ...rest,
  ...{ parts: routed + shared, on: active + shared, shared: 'auto' },
});

function fingerprint(
  options: MoeOptions,
  plan: MoePlan,
  open: OpenModel,
  set: CalibrationSet | undefined,
  env: JobEnv,
): Record<string, Json> {
  return {
    command: 'moe',
    tool: options.tool.version,
    input: open.checkpoint.fingerprint,
    recipe: {
      method: plan.method,
      container: plan.container.name,
      shape: toJson(options.shared === 'auto' ? searchedShape(plan.shape) : plan.shape),
      dense: [...plan.source.dense],
      refit: refits(options),
      ...splitOptions(options),
      ...(plan.method === 'drop' && { dropRatio: dropRatioOf(options) }),
    },
    format: isTorch(options.out) ? 'torch' : 'safetensors',
    calibration: set === undefined ? null : { text: set.hash, description: set.description },
    computing: { device: env.device.kind, states: statesOf(options, env), batchRows: options.batchRows ?? null },
    shardSize: options.shardSize ?? null,
  };
}

const splitOptions = (o: MoeOptions) => ({
  lambda: o.lambda ?? tuning.lambda,
  rounds: o.rounds ?? tuning.rounds,
  steps: o.steps ?? tuning.steps,
  finalSteps: finalFactor * (o.steps ?? tuning.steps),
  seed: o.seed ?? 0,
  ...(o.balance !== undefined && { balance: o.balance }),
  ...(o.split !== undefined && o.split !== 'fitted' && { kind: o.split }),
});

const searchOptions = (options: MoeOptions, recipe: MoeRecipe, env: JobEnv): SearchOptions => ({
  ...{ recipe, split: splitOptions(options), refit: refits(options), dtype: statesOf(options, env) },
  ...{ budget: options.budget, torch: isTorch(options.out), resumeHint: `Begin again with: ${options.commandLine}` },
});

/** The recipe with the container's default number of shared experts where the number is to be searched. */
const plainRecipe = ({ shared, ...options }: MoeOptions): MoeRecipe => ({
  ...options,
  ...(shared !== undefined && shared !== 'auto' && { shared }),
});

const [stage, searchStep] = ['moe', 'shared-search'] as const;

async function runJob(context: Context): Promise<MoeReport> {
  const { options, open, plan, set, print, job, env } = context;
  const { model, checkpoint } = open;
  if (job.finished) {
    const report = reportOf(context);
    await job.remove();
    return report;
  }
  const before = model.blocks.filter(({ index }) => job.done(blockStep(stage, index))).length;
  if (before > 0) env.log.info(`Going on after block ${before} of ${model.blocks.length}`);
  const writer = await createWriter({
    job,
    format: isTorch(options.out) ? 'torch' : 'safetensors',
    tensors: plan.tensors.map(({ planned }) => planned),
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config: plan.config,
    companions: checkpoint.companions,
    extraFiles: new Map([['README.md', modelCard(options, plan, set)]]),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...print },
      inputs: checkpoint.files,
    },
    accept: options.accept,
  });
  try {
    await convertBlocks(context, writer);
    await checkpoint.assertUnchanged();
    const report = reportOf(context);
    requireExact(report);
    await writer.finish(provenanceOf(report));
    await job.remove();
    return { ...report, seconds: (performance.now() - context.started) / 1000 };
  } finally {
    await writer.close();
  }
}

async function convertBlocks(context: Context, writer: CheckpointWriter): Promise<void> {
  const { options, open, plan, set, job, env } = context;
  const dtype = statesOf(options, env);
  const reader = new WeightReader(open, env.device, set === undefined ? 'f32' : dtype);
  if (!job.done('outer')) {
    await writeThrough(plan.tensors, -1, writer, reader, env.device);
    await writer.flush();
    await job.mark('outer');
  }
  if (job.done('checked')) return;
  const { blocks, hidden } = open.model;
  const tokens = set?.tokens.subarray(0, set.seqLen) ?? randomTokens(open, options.seed ?? 0);
  using check = new StandingTest(env, job, open, plan, refits(options) || plan.method === 'drop', tokens);
  // Blocks are marked together, the last one first: the work goes on behind the last of those without a gap.
  const todo = blocks.findIndex(({ index }) => !job.done(blockStep(stage, index)));
  await check.begin((todo === -1 ? blocks.at(-1) : blocks[todo - 1])?.index);
  const common = { open, env, reader, job, stage, resumeHint: `Go on with: ${options.commandLine}` };
  if (set === undefined) {
    const copies = { env, plan, writer, reader, check, seed: options.seed ?? 0, dropRatio: dropRatioOf(options) };
    await eachBlock(common, (block, weights) => convertCopies(block, weights, copies));
  } else {
    await using visitor = new SplitVisitor({
      env,
      plan,
      split: splitOptions(options),
      refit: refits(options),
      writer,
      reader,
      sampleTokens: Math.min(
        tokensThatFit(sampleBytes(hidden, plan.shape.ffn, plan.shape.routed), env, options.budget),
        Math.max(sampleEnough, goodTokens * hidden),
      ),
      budget: options.budget,
      check,
    });
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
  stopIfAborted(env, common.resumeHint);
  await job.mark('checked', toJson(await check.end()));
}

function randomTokens({ model }: OpenModel, seed: number): Int32Array {
  const random = new Random(seed, 4);
  return Int32Array.from({ length: Math.min(128, model.context) }, () => random.below(model.vocab));
}

function reportOf(context: Context): MoeReport {
  const { open, plan, job, started } = context;
  const layers = blockResults(job, stage, open.model)
    .map(({ result }) => result)
    .filter((result) => result !== null)
    .map(layerFromJson);
  const exactness = job.data('checked') as unknown as MoeReport['exactness'];
  return {
    ...unmeasured(context),
    out: job.out,
    layers: plan.method === 'split' ? layers : [],
    exactness,
    resumed: job.resumed,
    seconds: (performance.now() - started) / 1000,
  };
}

/** What a report says whatever came out. */
const unmeasured = ({
  options,
  plan,
  open,
  set,
  search,
}: Pick<Context, 'options' | 'plan' | 'open' | 'set' | 'search'>) => ({
  plan,
  ...(search && { sharedSearch: search }),
  refit: refits(options),
  calibration: set?.description,
  notices: [...open.notes, ...plan.notes, ...(set?.notices ?? [])],
});

/** A split that is not the dense model with all experts on is no output. */
function requireExact({ exactness, plan }: MoeReport): void {
  const rounding = plan.dtype !== 'f32' && !Number.isInteger(Math.log2(plan.weighting.routedDown)) ? 10 : 1;
  if (exactness && exactness.split.relative <= exactnessLimit * rounding) return;
  throw new ConvertError('internal', 'With all experts on the mixture is not the dense model', {
    got: `relative difference of the logits ${exactness?.split.relative.toExponential(2) ?? 'unknown'}`,
    expected: `at most ${exactnessLimit * rounding}`,
    hint: 'Please report this; the unfinished output was kept.',
  });
}

function provenanceOf(report: MoeReport): Record<string, Json> {
  const { layers, exactness, plan } = report;
  return {
    shape: describeShape(plan.shape),
    allExpertsOn: toJson(exactness ?? null),
    ...(report.sharedSearch && { sharedSearch: toJson(report.sharedSearch) }),
    ...(layers.length > 0 && { totals: toJson(totalsOf(layers)) }),
    layers: toJson(layers),
    cost: toJson(plan.cost),
    notes: [...report.notices],
  };
}

export type { LayerReport, MoeOptions, MoeReport };
