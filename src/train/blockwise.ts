import { rm } from 'node:fs/promises';
import type { Job, Json } from '../base/job.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import { forwardContext } from '../arch/context.js';
import type { OpenModel } from '../arch/open.js';
import { WeightReader } from '../arch/weights.js';
import type { Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { cast, copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Block, Model } from '../arch/types.js';
import { sequencesIn, tuneBlock, type BlockOutcome } from '../tune/block.js';
import type { Alarm } from '../tune/health.js';
import { Optimizer, type AdamOptions } from '../tune/parameters.js';
import type { Codes, Rates } from '../tune/weights.js';
import { loadTensors, saveTensors } from './state.js';
import type { StudentReader } from './student.js';

export interface BlockwiseOptions {
  readonly env: JobEnv;
  readonly job: Job;
  /** In full precision. */
  readonly teacher: OpenModel;
  /** Quantized: where the codes come from. */
  readonly student: StudentReader;
  readonly dtype: 'f32' | 'bf16';
  /** [n, length]. */
  readonly tokens: Int32Array;
  readonly n: number;
  readonly length: number;
  readonly held: number;
  readonly epochs: number;
  readonly batch: number;
  readonly microBatch: number;
  readonly lr: number;
  readonly rates: Rates;
  readonly warmup: number;
  readonly adam: AdamOptions;
  /** Probability that a sequence comes from the full-precision model's states instead of the quantized one's. */
  readonly cleanInputs: number;
  readonly seed: number;
  readonly resumeHint: string;
  readonly onAlarm: (block: string, alarm: Alarm) => void;
}

/** What the journal keeps of a block. */
export interface BlockRecord extends BlockOutcome {
  readonly block: number;
  readonly seconds: number;
}

/** A block that has learned, not yet on disk. */
interface Learned {
  readonly block: Block;
  readonly record: BlockRecord;
  readonly codes: readonly Codes[];
  /** Of the codes. */
  readonly scope: Scope;
}

export const blockName = (block: Block): string => `qat block ${block.index}`;
const codesPath = (job: Job, block: Block): string => job.statePath(`codes-${block.index}.bin`);
const statesPath = (job: Job, block: Block): string => job.statePath(`states-${block.index}.bin`);
/** What is kept of codes that learn. */
export const codeTensors = (all: readonly Codes[]): Tensor[] =>
  all.flatMap(({ codes, grid }) => [codes, grid.scale, ...(grid.zero ? [grid.zero] : [])]);

/** Codes of a block as block-wise training left them. */
export async function trainedCodes(options: Pick<BlockwiseOptions, 'job' | 'student'>, block: Block, scope: Scope) {
  const codes = await options.student.codes(block, scope);
  await loadTensors(codesPath(options.job, block), codeTensors(codes));
  return codes;
}

/**
 * Block after block, weights and scales learn to give the full-precision block's outputs. A block's inputs are what the
 * quantized blocks before it make of the text, with some of the full-precision model's mixed in. Finished blocks are
 * kept; an interrupted one begins again, which gives the same bits.
 */
export async function trainBlocks(o: BlockwiseOptions): Promise<BlockRecord[]> {
  const { env, job, teacher, student, n, length } = o;
  const { model } = student.open;
  const todo = model.blocks.findIndex((block) => !job.done(blockName(block)));
  const done = todo === -1 ? model.blocks.length : todo;
  if (done < model.blocks.length) {
    const reader = new WeightReader(teacher, env.device, o.dtype);
    using scope = new Scope(env.device);
    const rows = n * length;
    let clean = scope.empty(o.dtype, [rows, model.hidden]);
    let quantized = scope.empty(o.dtype, [rows, model.hidden]);
    if (done > 0) {
      await loadTensors(statesPath(job, model.blocks[done - 1]!), [clean, quantized]);
      env.log.info(`Going on after block ${done} of ${model.blocks.length}`);
    } else {
      await embed(reader, model, o, clean);
      copyInto(quantized, clean);
    }
    // A block counts as done when its codes and the states behind it are on disk. They go there while the next block
    // learns, and no more often than takes a third of the time: a job that is killed then repeats those blocks.
    let unsaved: Learned[] = [];
    let settled: Promise<void> = Promise.resolve();
    let [busy, since, cost] = [false, performance.now(), 0];
    let stored = done > 0 ? statesPath(job, model.blocks[done - 1]!) : undefined;
    const settle = async (): Promise<void> => {
      const learned = unsaved;
      [unsaved, busy, since] = [[], true, performance.now()];
      try {
        for (const { block, codes } of learned) await saveTensors(codesPath(job, block), codeTensors(codes));
        const path = statesPath(job, learned.at(-1)!.block);
        await saveTensors(path, [clean, quantized]);
        // The last one first: of the blocks before it there are no states to go on from.
        for (const { block, record } of learned.toReversed())
          await job.mark(blockName(block), JSON.parse(JSON.stringify(record)) as Json);
        if (stored !== undefined) await rm(stored, { force: true });
        stored = path;
      } finally {
        for (const { scope: codes } of learned) codes[Symbol.dispose]();
      }
      [busy, cost] = [false, performance.now() - since];
      for (const { block, record } of learned) {
        const { before, after, best, steps, seconds } = record;
        env.log.progress({
          stage: 'qat blocks',
          done: block.index + 1,
          total: model.blocks.length,
          detail: `relative error ${before.toExponential(2)} -> ${after.toExponential(2)} (step ${best} of ${steps}), ${seconds.toFixed(1)} s`,
          data: { block: block.name, before, after, seconds },
        });
      }
    };
    const last = model.blocks.at(-1);
    // What is finished when something ends the job is saved.
    const saveRest = (): Promise<void> =>
      settled.then(() => (unsaved.length > 0 ? settle() : undefined)).catch(() => undefined);
    await using _rest = { [Symbol.asyncDispose]: saveRest };
    for (const block of model.blocks.slice(done)) {
      stopIfAborted(env, o.resumeHint);
      const started = performance.now();
      using work = new Scope(env.device);
      const target = scope.empty(o.dtype, clean.shape);
      {
        using full = new Scope(env.device);
        const weights = await reader.block(block.index, full);
        await advance(o, teacher.model, teacher.model.blocks[block.index]!, () => weights, clean, target);
      }
      const codes = await student.codes(block, work);
      const learning = await student.quantized(block, work, { kind: 'full' }, o.rates, codes);
      const outcome = await tuneBlock({
        ...{ device: env.device, block, parameters: learning.parameters, n, length, held: o.held },
        optimizer: (parameters) => new Optimizer(env.device, parameters, o.adam),
        weights: (inner) => learning.now(inner),
        context: (inner, weights, some) => forwardContext(inner, model, weights, some.length, length),
        input: sequencesIn(quantized, length),
        target: sequencesIn(target, length),
        ...(o.cleanInputs > 0 && { other: { input: sequencesIn(clean, length), share: o.cleanInputs } }),
        ...{ epochs: o.epochs, batch: o.batch, microBatch: o.microBatch, lr: o.lr, warmup: o.warmup },
        seed: o.seed,
        onAlarm: (alarm) => o.onAlarm(block.name, alarm),
        check: () => stopIfAborted(env, o.resumeHint),
      });
      const next = scope.empty(o.dtype, quantized.shape);
      await advance(o, model, block, (inner) => learning.now(inner), quantized, next);
      const kept = new Scope(env.device);
      const trained = learning.quantized.map((unit) => unit.result(kept));
      if (busy) await settled; // what is freed here is on its way to the disk
      scope.free(clean, quantized);
      [clean, quantized] = [target, next];
      const seconds = Math.round(performance.now() - started) / 1000;
      unsaved.push({ block, record: { block: block.index, seconds, ...outcome }, scope: kept, codes: trained });
      if (block !== last && performance.now() - since < 2 * cost) continue;
      settled = settle();
      settled.catch(() => undefined); // reported where it is awaited
    }
    await settled;
    stopIfAborted(env, o.resumeHint);
  }
  return model.blocks.map((block) => job.data(blockName(block)) as unknown as BlockRecord);
}

async function embed(reader: WeightReader, model: Model, o: BlockwiseOptions, into: Tensor): Promise<void> {
  using outer = new Scope(o.env.device);
  const weights = await reader.outer(outer, 'embedding');
  for (let row = 0; row < o.n; row += o.microBatch) {
    using scope = new Scope(o.env.device);
    const count = Math.min(o.microBatch, o.n - row);
    const ids = scope.from('i32', [count, o.length], o.tokens.subarray(row * o.length, (row + count) * o.length));
    const x = model.embed(ids, forwardContext(scope, model, weights, count, o.length));
    copyInto(into.slice(0, row * o.length, (row + count) * o.length), x);
  }
  await o.env.device.sync();
}

/** All sequences through a block. */
async function advance(
  o: BlockwiseOptions,
  model: Model,
  block: Block,
  weights: (scope: Scope) => Weights,
  from: Tensor,
  to: Tensor,
): Promise<void> {
  for (let row = 0; row < o.n; row += o.microBatch) {
    using scope = new Scope(o.env.device);
    const count = Math.min(o.microBatch, o.n - row);
    const rows = (x: Tensor) => x.slice(0, row * o.length, (row + count) * o.length);
    const ctx = forwardContext(scope, model, weights(scope), count, o.length);
    const x = cast(scope, rows(from), from.dtype);
    copyInto(rows(to), run(block.forward(x, ctx), ctx));
    // Ops are only enqueued: without this wait all batches' memory would be taken at once.
    await o.env.device.sync();
  }
}
