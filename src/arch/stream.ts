import { ConvertError, bug } from '../base/errors.js';
import type { Job, Json } from '../base/job.js';
import { formatBytes } from '../base/files.js';
import { dtypeSize } from '../base/dtype.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import { answer } from '../nn/run.js';
import type { Call, Calls, ExpertsCall, ForwardContext, LinearCall, LinearSpec, Weights } from '../nn/calls.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { CalibrationSet } from './calibration.js';
import { forwardContext } from './context.js';
import type { OpenModel } from './open.js';
import { States } from './states.js';
import type { Block, Model } from './types.js';
import type { WeightReader } from './weights.js';

/**
 * The block-by-block engine under `quantize` and `moe`. All calibration batches pass through a model one decoder layer
 * at a time; within a layer they advance in lockstep from one linear (or experts) call to the next, so that whoever
 * visits a call has every batch's input at hand before any batch sees the call's weights: one pass, and what a visitor
 * does to a weight is felt by everything behind it. Resident are one block's weights (and the next ones being read).
 */
export interface StreamOptions {
  readonly open: OpenModel;
  readonly env: JobEnv;
  readonly reader: WeightReader;
  readonly set: CalibrationSet;
  /** Of the hidden states. */
  readonly dtype: 'f32' | 'bf16';
  /** Finished blocks and the states after them are kept here. */
  readonly job: Job;
  /** Names the steps of the journal and the progress lines: `quantize`. */
  readonly stage: string;
  /** Sequences a batch; default: about 2,048 tokens on the CPU, 16,384 on a GPU. */
  readonly batchRows?: number;
  /** Bytes of device memory that states and suspended batches may take; default: 60% of what is free. */
  readonly budget?: number;
  /** The command that goes on with an interrupted job. */
  readonly resumeHint: string;
}

export interface BlockVisitor {
  /** Whether all batches wait at this call for `visit`; default: at every linear and experts call. */
  holds?(call: LinearCall | ExpertsCall, block: Block): boolean;
  /** All batches stand before this call; `site.weights.set` decides what they will meet. */
  visit(site: Site): Promise<void>;
  /** Answers a call of one batch in place of the weights; undefined leaves it to them. */
  answer?(call: Call, ctx: ForwardContext, block: Block): unknown;
  /**
   * All batches are through the block. Whatever the visitor wrote must be durable when this resolves; what it returns
   * goes into the journal with the block.
   */
  finish(block: Block, weights: Weights): Promise<{ readonly data: Json; readonly detail?: string }>;
}

/** One call at which all batches of a block stand. */
export interface Site {
  readonly block: Block;
  /** Position among the held calls of the block. */
  readonly index: number;
  readonly kind: 'linear' | 'experts';
  /** linears[j]: those that share the input; for experts linears[j][e]. */
  readonly linears: readonly LinearSpec[] | readonly (readonly LinearSpec[])[];
  readonly weights: Weights;
  /** Tokens of all batches together. */
  readonly tokens: number;
  /**
   * Hands out the calls of all batches, in order; `call.x` is valid until the handler's promise resolves. May be used
   * several times. Under a tight budget each use recomputes the block up to here: use it as seldom as you can.
   */
  each(handle: (call: LinearCall | ExpertsCall, batch: number) => void | Promise<void>): Promise<void>;
}

/** Step name of a finished block in the journal. */
export const blockStep = (stage: string, index: number): string => `${stage} block ${index}`;

/**
 * Runs the visitor over all blocks that are not done yet. Resumed work gives the same bits as uninterrupted work: the
 * states after a block are stored verbatim.
 * Errors: `interrupted` after an abort (finished blocks are saved), whatever the visitor throws.
 */
export async function streamBlocks(options: StreamOptions, visitor: BlockVisitor): Promise<void> {
  const { open, env, job, stage, reader, set, resumeHint } = options;
  const { model } = open;
  const blocks = model.blocks;
  const first = blocks.findIndex((block) => !job.done(blockStep(stage, block.index)));
  if (first === -1) return;
  const geometry = planMemory(options);
  env.log.debug(`calibration: ${geometry.note}`);
  await using states = new States(env.device, {
    hidden: model.stateWidth,
    dtype: options.dtype,
    rows: geometry.batches.map((batch) => batch.rows * set.seqLen),
    resident: geometry.resident,
    path: (block) => job.statePath(`hidden-${block}.bin`),
  });
  if (first === 0) await embed(options, states, geometry.batches);
  else await states.load(blocks[first - 1]!.index);

  let ahead: Ahead | undefined;
  // A block counts as done when the states behind it are on disk. They go there while the next block computes, and where
  // that takes longer than computing, only so often that no more than a third of the time goes into it: a job that is
  // killed then repeats those blocks.
  let finished: Finished[] = [];
  let reached = -1;
  let settled: Promise<void> = Promise.resolve();
  let [busy, since, cost] = [false, performance.now(), 0];
  const settle = async (): Promise<void> => {
    const done = finished;
    [finished, busy, since] = [[], true, performance.now()];
    const last = done.at(-1)!.i;
    const behind = last < blocks.length - 1 ? blocks[last]!.index : undefined; // nobody needs those behind the last block
    if (behind !== undefined) await states.commit(behind);
    for (const { i, seconds, data } of done) {
      await job.mark(blockStep(stage, blocks[i]!.index), { seconds: round(seconds), result: data });
    }
    await states.forget(behind);
    [busy, cost] = [false, performance.now() - since];
    for (const { i, seconds, detail } of done) {
      env.log.progress({
        stage,
        done: i + 1,
        total: blocks.length,
        detail: `${detail === undefined ? '' : `${detail}, `}${seconds.toFixed(1)} s`,
        data: { block: blocks[i]!.name, seconds: round(seconds) },
      });
    }
  };
  try {
    for (const [i, block] of blocks.entries()) {
      if (i < first) continue;
      stopIfAborted(env, resumeHint);
      const started = performance.now();
      const current = ahead ?? readAhead(env, reader, i);
      ahead = undefined;
      const weights = await current.weights;
      using _weights = current.scope;
      if (i + 1 < blocks.length && geometry.readAhead) ahead = readAhead(env, reader, i + 1);
      const walk = new BlockWalk(options, visitor, block, weights, states, geometry);
      await walk.run(i === blocks.length - 1);
      if (i < blocks.length - 1) reached = i;
      const { data, detail } = await visitor.finish(block, weights);
      finished.push({ i, seconds: (performance.now() - started) / 1000, data, detail });
      const due = !geometry.resident || (!busy && performance.now() - since >= 2 * cost);
      if (!due && i < blocks.length - 1) continue;
      await settled;
      settled = settle();
      settled.catch(() => undefined); // reported where it is awaited
    }
    await settled;
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

interface Batch {
  /** First sequence and how many. */
  readonly from: number;
  readonly rows: number;
}

interface Geometry {
  readonly batches: readonly Batch[];
  /** States stay on the device between blocks. */
  readonly resident: boolean;
  /** Batches stay suspended at a call; else the block is recomputed up to it. */
  readonly hold: boolean;
  readonly readAhead: boolean;
  readonly note: string;
}

/** Values that one token's suspended forward pass holds at the widest call, states included. */
function suspendedWidth(model: Model): number {
  let widest = model.stateWidth;
  for (const block of model.blocks) {
    for (const linears of block.linears) {
      const { inFeatures, role } = linears[0]!;
      const copies = role === 'expert' ? (block.moe?.active ?? 1) : 1;
      widest = Math.max(widest, inFeatures * copies + (role === 'expert' ? model.hidden * 2 : 0));
    }
  }
  return widest + 2 * model.stateWidth;
}

function planMemory({ open, env, set, dtype, batchRows, budget }: StreamOptions): Geometry {
  const perBatch = env.device.kind === 'cpu' ? 2048 : 16384;
  const rows = batchRows ?? Math.max(1, Math.min(set.n, Math.floor(perBatch / set.seqLen)));
  const batches: Batch[] = [];
  for (let from = 0; from < set.n; from += rows) batches.push({ from, rows: Math.min(rows, set.n - from) });

  const { memory } = env.device.info() as { memory?: { free?: number } };
  const limit = env.device.memory().limit;
  const free = Math.min(memory?.free ?? Infinity, limit > 0 ? limit : Infinity);
  const allowed = budget ?? (Number.isFinite(free) ? 0.6 * free : Infinity);
  const tokens = set.n * set.seqLen;
  const size = dtypeSize(dtype);
  const stateBytes = tokens * open.model.stateWidth * size;
  const heldBytes = tokens * suspendedWidth(open.model) * size;
  const hold = heldBytes <= allowed;
  const resident = hold || 2 * stateBytes <= allowed;
  const readAhead = heldBytes <= allowed / 2;
  const how = hold ? 'held on the device' : resident ? 'recomputed from call to call' : 'read from the work folder';
  const note = `${tokens} tokens in ${batches.length} batches, ${how} (${formatBytes(hold ? heldBytes : stateBytes)} of ${formatBytes(allowed)})`;
  return { batches, resident, hold, readAhead, note };
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

/** A forward pass of one batch through one block, suspended at a call. */
interface Suspended {
  readonly calls: Calls<Tensor>;
  readonly ctx: ForwardContext;
  readonly scope: Scope;
  step: IteratorResult<Call, Tensor>;
}

/** One block: all batches from call to call, the visitor between. */
class BlockWalk {
  readonly #answer: (call: Call, ctx: ForwardContext) => unknown;

  constructor(
    readonly options: StreamOptions,
    readonly visitor: BlockVisitor,
    readonly block: Block,
    readonly weights: Weights,
    readonly states: States,
    readonly geometry: Geometry,
  ) {
    this.#answer = (call, ctx) => visitor.answer?.(call, ctx, block) ?? answer(call, ctx);
  }

  /** `last`: nobody needs the states after this block, so the batches end at the last held call. */
  async run(last: boolean): Promise<void> {
    const held = this.geometry.hold ? await this.#startAll() : undefined;
    try {
      for (let index = 0; ; index++) {
        const site = await this.#siteAt(index, held);
        if (site === undefined) break;
        stopIfAborted(this.options.env, this.options.resumeHint);
        await this.visitor.visit(site);
        if (held) for (const one of held) await this.#advance(one);
      }
      if (!last) await this.#collect(held);
      else if (held) for (const one of held) if (!one.step.done) throw bug('a batch stopped before its block ended');
    } finally {
      for (const one of held ?? []) one.scope[Symbol.dispose]();
    }
  }

  async #startAll(): Promise<Suspended[]> {
    const all: Suspended[] = [];
    for (let b = 0; b < this.geometry.batches.length; b++) all.push(await this.#start(b));
    return all;
  }

  /** Batch `b` from the block's beginning to its first held call. */
  async #start(b: number): Promise<Suspended> {
    const { open, env, set } = this.options;
    const scope = new Scope(env.device);
    const { from, rows } = this.geometry.batches[b]!;
    const tokens = set.tokens.subarray(from * set.seqLen, (from + rows) * set.seqLen);
    const ctx = forwardContext(scope, open.model, this.weights, rows, set.seqLen, { tokens });
    const calls = this.block.forward(await this.states.get(b, scope), ctx);
    const one: Suspended = { calls, ctx, scope, step: calls.next() };
    await this.#run(one);
    return one;
  }

  /** Answers the call at which the batch stands and runs it to its next held call. */
  async #advance(one: Suspended): Promise<void> {
    if (one.step.done) return;
    one.step = one.calls.next(this.#answer(one.step.value, one.ctx));
    await this.#run(one);
  }

  async #run(one: Suspended): Promise<void> {
    while (!one.step.done && this.#heldCall(one.step.value) === undefined) {
      one.step = one.calls.next(this.#answer(one.step.value, one.ctx));
    }
    // Ops are only enqueued: without this wait a fast producer would fill the device's memory with what is to come.
    await this.options.env.device.sync();
  }

  #heldCall(call: Call): LinearCall | ExpertsCall | undefined {
    if (call.kind !== 'linear' && call.kind !== 'experts') return undefined;
    return (this.visitor.holds?.(call, this.block) ?? true) ? call : undefined;
  }

  async #siteAt(index: number, held: readonly Suspended[] | undefined): Promise<Site | undefined> {
    const probe = held?.[0] ?? (await this.#replay(0, index));
    const call = probe.step.done ? undefined : this.#heldCall(probe.step.value);
    if (held === undefined) probe.scope[Symbol.dispose]();
    if (call === undefined) return undefined;
    return {
      block: this.block,
      index,
      kind: call.kind,
      linears: call.linears,
      weights: this.weights,
      tokens: this.options.set.n * this.options.set.seqLen,
      each: async (handle) => {
        for (let b = 0; b < this.geometry.batches.length; b++) {
          const one = held?.[b] ?? (await this.#replay(b, index));
          try {
            const at = one.step.done ? undefined : this.#heldCall(one.step.value);
            if (at === undefined || !sameCall(at, call)) {
              throw bug(`batch ${b} of ${this.block.name} left the lockstep`, { expected: nameOf(call) });
            }
            await handle(at, b);
            if (held === undefined) await this.options.env.device.sync();
          } finally {
            if (held === undefined) one.scope[Symbol.dispose]();
          }
        }
      },
    };
  }

  /** Batch `b` at the held call `index`, from the block's beginning, with the weights as they are now. */
  async #replay(b: number, index: number): Promise<Suspended> {
    const one = await this.#start(b);
    for (let i = 0; i < index; i++) await this.#advance(one);
    return one;
  }

  async #collect(held: readonly Suspended[] | undefined): Promise<void> {
    for (let b = 0; b < this.geometry.batches.length; b++) {
      const one = held?.[b] ?? (await this.#start(b));
      while (!one.step.done) await this.#advance(one);
      await this.states.put(b, one.step.value, one.scope);
      one.scope[Symbol.dispose]();
    }
    await this.states.next();
  }
}

const nameOf = (call: LinearCall | ExpertsCall): string => {
  const first = call.kind === 'linear' ? call.linears[0] : call.linears[0]?.[0];
  return `${call.kind} ${first?.name ?? '?'}`;
};

const sameCall = (a: LinearCall | ExpertsCall, b: LinearCall | ExpertsCall): boolean => nameOf(a) === nameOf(b);

/** For jobs without states (plain rounding): the same journal, one block after another, the next one read ahead. */
export async function eachBlock(
  options: Pick<StreamOptions, 'open' | 'env' | 'reader' | 'job' | 'stage' | 'resumeHint'>,
  visit: (block: Block, weights: Weights) => Promise<{ readonly data: Json; readonly detail?: string }>,
): Promise<void> {
  const { open, env, reader, job, stage, resumeHint } = options;
  const blocks = open.model.blocks;
  const todo = blocks.flatMap((block, i) => (job.done(blockStep(stage, block.index)) ? [] : [i]));
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
      env.log.progress({ stage, done: i + 1, total: blocks.length, ...(detail === undefined ? {} : { detail }) });
    }
  } finally {
    await ahead?.weights.catch(() => undefined);
    ahead?.scope[Symbol.dispose]();
  }
}

/** What `visit` returned for each block, in order; complete after `streamBlocks` or `eachBlock`. */
export function blockResults(job: Job, stage: string, model: Model): { seconds: number; result: Json }[] {
  return model.blocks.map((block) => {
    const data = job.data(blockStep(stage, block.index));
    if (data === undefined) throw new ConvertError('internal', `no journal entry for block ${block.index}`);
    return data as unknown as { seconds: number; result: Json };
  });
}
