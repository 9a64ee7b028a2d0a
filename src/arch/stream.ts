import { ConvertError } from '../base/errors.js';
import type { Job, Json } from '../base/job.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { Weights } from '../nn/calls.js';
import { Scope } from '../tensor/tensor.js';
import { BlockWalk, type BlockVisitor, type WalkOptions } from './block-walk.js';
import { forwardContext } from './context.js';
import { planGeometry, type Batch, type GeometryOptions } from './geometry.js';
import { States } from './states.js';
import type { Block, Model } from './types.js';
import type { WeightReader } from './weights.js';

export type { BlockVisitor, Site, TuningSite } from './block-walk.js';

/**
 * The block-by-block engine under `quantize` and `moe`. All calibration batches pass through a model one decoder layer
 * at a time; within a layer they advance in lockstep from one linear (or experts) call to the next, so that whoever
 * visits a call has every batch's input at hand before any batch sees the call's weights: one pass, and what a visitor
 * does to a weight is felt by everything behind it. Resident are one block's weights (and the next ones being read).
 */
export interface StreamOptions extends WalkOptions, GeometryOptions {
  readonly reader: WeightReader;
  /** Finished blocks and the states after them are kept here. */
  readonly job: Job;
  /** Names the steps of the journal and the progress lines: `quantize`. */
  readonly stage: string;
  /** Each block starts from what the blocks before it make with the weights that were read, whatever a visitor sets. */
  readonly independent?: boolean;
  readonly range?: BlockRange | undefined;
  /** The states after these blocks stay in the work folder. */
  readonly keep?: ReadonlySet<number>;
}

/** Some of a model's blocks, by their places in `model.blocks`. */
export interface BlockRange {
  readonly from: number;
  /** The first one behind. */
  readonly to: number;
  /** File of the states before the first one; undefined: those of the embedding. */
  readonly states: string | undefined;
}

/** File name of the states after a block. */
export const statesFile = (block: number | string): string => `hidden-${block}.bin`;
const cleanFile = (block: number | string): string => `clean-${block}.bin`;

/** Step name of a finished block in the journal. */
export const blockStep = (stage: string, index: number): string => `${stage} block ${index}`;

/** For states alone: nothing is looked at. */
const nobody: BlockVisitor = {
  visit: () => Promise.resolve(),
  finish: () => Promise.resolve({ data: null }),
};

/**
 * Runs the visitor over all blocks that are not done yet; without one, the states alone advance. Resumed work gives the
 * same bits as uninterrupted work: the states after a block are stored verbatim.
 * Errors: `interrupted` after an abort (finished blocks are saved), whatever the visitor throws.
 */
export async function streamBlocks(options: StreamOptions, visitor: BlockVisitor = nobody): Promise<void> {
  const { open, env, job, stage, reader, set, resumeHint, keep = new Set() } = options;
  const { model } = open;
  const blocks = model.blocks;
  const { from, to, states: start } = options.range ?? { from: 0, to: blocks.length, states: undefined };
  const first = blocks.findIndex(({ index }, i) => i >= from && i < to && !job.done(blockStep(stage, index)));
  if (first === -1) return;
  /** Nobody needs the states behind the last block. */
  const needed = (i: number): boolean => i < to - 1 || keep.has(blocks[i]!.index);
  // For a visitor that tunes: the states of the model that nobody visits go along, where they are not the same.
  const twice = visitor.tune !== undefined && options.independent !== true;
  const geometry = planGeometry({ ...options, twice });
  env.log.debug(`calibration: ${geometry.note}`);
  const statesIn = (file: typeof statesFile): States =>
    new States(env.device, {
      hidden: model.stateWidth,
      dtype: options.dtype,
      rows: geometry.batches.map((batch) => batch.rows * set.seqLen),
      resident: geometry.resident,
      path: (block) => job.statePath(file(block)),
    });
  await using states = statesIn(statesFile);
  await using clean = twice ? statesIn(cleanFile) : undefined;
  const all = clean ? [states, clean] : [states];
  for (const [one, file] of [
    [states, statesFile],
    [clean, cleanFile],
  ] as const) {
    if (first > from) await one?.load(job.statePath(file(blocks[first - 1]!.index)));
    else if (start !== undefined) await one?.load(start);
    else if (one) await embed(options, one, geometry.batches);
  }

  let ahead: Ahead | undefined;
  // A block counts as done when the states behind it are on disk. They go there while the next block computes, and where
  // that takes longer than computing, only so often that no more than a third of the time goes into it, and no more where
  // it would outlast the computing: a job that is killed then repeats those blocks.
  let finished: Finished[] = [];
  let reached = -1;
  let settled: Promise<void> = Promise.resolve();
  const begun = performance.now();
  let [busy, since, cost] = [false, begun, 0];
  const settle = async (): Promise<void> => {
    const done = finished;
    [finished, busy, since] = [[], true, performance.now()];
    const last = done.at(-1)!.i;
    const behind = needed(last) ? blocks[last]!.index : undefined;
    if (behind !== undefined) await Promise.all(all.map((one) => one.commit(behind)));
    await visitor.flush?.(blocks[last]!.index);
    // The last one first: of the blocks before it there are no states to go on from.
    for (const { i, seconds, data } of done.toReversed()) {
      await job.mark(blockStep(stage, blocks[i]!.index), { seconds: round(seconds), result: data });
    }
    for (const one of all) await one.forget(new Set(behind === undefined ? keep : [...keep, behind]));
    [busy, cost] = [false, performance.now() - since];
    for (const { i, seconds, detail } of done) {
      env.log.progress({
        stage,
        done: i - from + 1,
        total: to - from,
        detail: `${detail === undefined ? '' : `${detail}, `}${seconds.toFixed(1)} s`,
        data: { block: blocks[i]!.name, seconds: round(seconds), tokens: set.n * set.seqLen },
      });
    }
  };
  try {
    for (let i = first; i < to; i++) {
      const block = blocks[i]!;
      stopIfAborted(env, resumeHint);
      const started = performance.now();
      const current = ahead ?? readAhead(env, reader, i);
      ahead = undefined;
      const weights = await current.weights;
      using _weights = current.scope;
      if (i + 1 < to && geometry.readAhead) ahead = readAhead(env, reader, i + 1);
      const walk = new BlockWalk(options, visitor, block, weights, states, geometry);
      if (visitor.tune) {
        await walk.tune(clean ?? states, !needed(i));
        await clean?.next();
        if (!clean || needed(i)) await states.next();
      } else if (options.independent || visitor === nobody) {
        if (needed(i)) await walk.pass();
        if (visitor !== nobody) await walk.run(true);
        if (needed(i)) await states.next();
      } else await walk.run(!needed(i));
      if (needed(i)) reached = i;
      const { data, detail } = await visitor.finish(block, weights);
      finished.push({ i, seconds: (performance.now() - started) / 1000, data, detail });
      const left = ((performance.now() - begun) / (i + 1 - first)) * (to - 1 - i);
      const pays = !busy && performance.now() - since >= 2 * cost && left > cost;
      const due = !geometry.resident || keep.has(block.index) || pays;
      if (!due && i < to - 1) continue;
      await settled;
      settled = settle();
      settled.catch(() => (busy = false)); // reported where it is awaited, after the block under way
    }
    await settled;
    stopIfAborted(env, resumeHint);
  } finally {
    await settled.then(
      // Something ended the job between two commits: what is finished is saved.
      () => (finished.length > 0 && reached === finished.at(-1)!.i ? settle().catch(() => undefined) : undefined),
      () => undefined,
    );
    // The read of the next block may still be under way when something fails: its memory must outlive it.
    await ahead?.weights.catch(() => undefined);
    ahead?.scope[Symbol.dispose]();
  }
}

const round = (seconds: number): number => Math.round(seconds * 1000) / 1000;

/** A block whose weights are stored, whose states may not be. */
interface Finished {
  readonly i: number;
  readonly seconds: number;
  readonly data: Json;
  readonly detail: string | undefined;
}

interface Ahead {
  readonly scope: Scope;
  readonly weights: Promise<Weights>;
}

function readAhead(env: JobEnv, reader: WeightReader, block: number): Ahead {
  const scope = new Scope(env.device);
  const weights = reader.block(block, scope);
  weights.catch(() => undefined); // reported where it is awaited
  return { scope, weights };
}

async function embed(options: StreamOptions, states: States, batches: readonly Batch[]): Promise<void> {
  const { open, env, reader, set } = options;
  using outer = new Scope(env.device);
  const weights = await reader.outer(outer);
  for (const [b, { from, rows }] of batches.entries()) {
    using scope = new Scope(env.device);
    const ids = set.tokens.subarray(from * set.seqLen, (from + rows) * set.seqLen);
    const tokens = scope.from('i32', [rows, set.seqLen], ids);
    const ctx = forwardContext(scope, open.model, weights, rows, set.seqLen);
    await states.put(b, open.model.embed(tokens, ctx), scope);
  }
  await states.next();
}

/** For jobs without states (plain rounding): the same journal, one block after another, the next one read ahead. */
export async function eachBlock(
  options: Pick<StreamOptions, 'open' | 'env' | 'reader' | 'job' | 'stage' | 'resumeHint' | 'range'>,
  visit: (block: Block, weights: Weights) => Promise<{ readonly data: Json; readonly detail?: string }>,
): Promise<void> {
  const { open, env, reader, job, stage, resumeHint } = options;
  const blocks = open.model.blocks;
  const { from, to } = options.range ?? { from: 0, to: blocks.length };
  const todo = blocks.flatMap(({ index }, i) => (i < from || i >= to || job.done(blockStep(stage, index)) ? [] : [i]));
  let ahead: Ahead | undefined;
  try {
    for (const [n, i] of todo.entries()) {
      stopIfAborted(env, resumeHint);
      const started = performance.now();
      const block = blocks[i]!;
      const current = ahead ?? readAhead(env, reader, i);
      ahead = undefined;
      const weights = await current.weights;
      using _weights = current.scope;
      const nextIndex = todo[n + 1];
      if (nextIndex !== undefined) ahead = readAhead(env, reader, nextIndex);
      const { data, detail } = await visit(block, weights);
      const seconds = (performance.now() - started) / 1000;
      await job.mark(blockStep(stage, block.index), { seconds: round(seconds), result: data });
      const facts = { block: block.name, seconds: round(seconds) };
      env.log.progress({ stage, done: i - from + 1, total: to - from, ...(detail === undefined ? {} : { detail }), data: facts }); // prettier-ignore
    }
  } finally {
    await ahead?.weights.catch(() => undefined);
    ahead?.scope[Symbol.dispose]();
  }
}

/** What `visit` returned for each block, in order; complete after `streamBlocks` or `eachBlock`. */
export function blockResults(
  job: Job,
  stage: string,
  { blocks }: Pick<Model, 'blocks'>,
): { seconds: number; result: Json }[] {
  return blocks.map((block) => {
    const data = job.data(blockStep(stage, block.index));
    if (data === undefined) throw new ConvertError('internal', `no journal entry for block ${block.index}`);
    return data as unknown as { seconds: number; result: Json };
  });
}
