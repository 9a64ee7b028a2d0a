import type { Device } from '../backend/device.js';
import { dtypeSize, type DType } from '../base/dtype.js';
import { Random } from '../base/rng.js';
import type { ForwardContext, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import type { Block } from '../arch/types.js';
import { binary, copyInto, reduce, unary } from '../tensor/ops.js';
import { Tape } from '../tensor/tape.js';
import type { Tensor } from '../tensor/tensor.js';
import { Scope } from '../tensor/tensor.js';
import { GradientHealth, type Alarm, type HealthSummary } from './health.js';
import type { Descent, Parameter } from './parameters.js';
import { Schedule, shuffled, type ScheduleOptions } from './schedule.js';

/** States of sequences, [length, C] each. */
export interface Sequences {
  readonly dtype: DType;
  readonly width: number;
  of(row: number, scope: Scope): Tensor | Promise<Tensor>;
}

/** Sequences that lie one after another in x [n length, C]. */
export const sequencesIn = (x: Tensor, length: number): Sequences => ({
  dtype: x.dtype,
  width: x.dim(1),
  of: (row) => x.slice(0, row * length, (row + 1) * length),
});

export interface BlockTuning {
  readonly device: Device;
  readonly block: Block;
  readonly parameters: readonly Parameter[];
  /** Where all together have come no closer, those of these that have by themselves stay as the last step left them. */
  readonly parts?: readonly (readonly Parameter[])[];
  readonly optimizer: (parameters: readonly Parameter[]) => Descent;
  /** The weights that the parameters stand for; called within the recorded pass. */
  readonly weights: (scope: Scope) => Weights;
  readonly context: (scope: Scope, weights: Weights, rows: readonly number[]) => ForwardContext;
  /** Sequences and their length. */
  readonly n: number;
  readonly length: number;
  /** One input, or two that sequences are drawn from: the second with the probability `share`. */
  readonly input: Sequences;
  readonly other?: { readonly input: Sequences; readonly share: number };
  readonly target: Sequences;
  /** The last `held` sequences are not trained on: they judge. 0: all train, and all judge. */
  readonly held: number;
  readonly epochs: number;
  /** Ends earlier. */
  readonly maxSteps?: number;
  /** Sequences a step, and a pass. */
  readonly batch: number;
  readonly microBatch: number;
  readonly lr: number;
  /** Share of the steps over which the learning rate rises. */
  readonly warmup: number;
  /** How it falls. */
  readonly curve?: ScheduleOptions['curve'];
  readonly seed: number;
  /** After each step: projects parameters back to where they are allowed. */
  readonly project?: () => void;
  readonly onAlarm?: (alarm: Alarm) => void;
  /** Throws to stop. */
  readonly check?: () => void;
}

export interface BlockOutcome {
  /** Mean squared error over the mean square of the target, on the held sequences: at first, and of what is kept. */
  readonly before: number;
  readonly after: number;
  /** Step whose parameters are kept; 0: the start. */
  readonly best: number;
  /** How many of `parts` were taken from the last step all the same. */
  readonly parts?: number;
  readonly steps: number;
  readonly health: HealthSummary;
}

/**
 * Trains parameters of one block's weights so that its outputs come close to `target`. The best by the held sequences
 * is kept, the start among them: the parameters are never left worse than they were.
 */
export async function tuneBlock(o: BlockTuning): Promise<BlockOutcome> {
  const { device, n, held } = o;
  const health = new GradientHealth();
  using optimizer = o.optimizer(o.parameters);
  using best = new Scope(device);
  const energy = await meanSquare(o);
  const weightOf = (rows: number) => 1 / (rows * o.length * o.target.width * Math.max(energy, 1e-30));
  const judged = held > 0 ? held : n;

  const before = await judge(o, judged, weightOf(judged));
  let [after, bestStep] = [before, 0];
  let kept = snapshot(best, o.parameters);
  const random = new Random(o.seed, o.block.index);
  const sequences = n - held;
  const epochs = o.parameters.length === 0 ? 0 : o.epochs;
  const schedule = new Schedule({ ...o, epochs, sequences, order: () => shuffled(sequences, random) });
  for (let step = 0; step < schedule.total; step++) {
    o.check?.();
    const rows = schedule.rows(step);
    for (let from = 0; from < rows.length; from += o.microBatch) {
      const part = rows.slice(from, from + o.microBatch);
      const mixed = part.map((row) => ({ row, other: o.other !== undefined && random.uniform() < o.other.share }));
      await pass(o, optimizer, mixed, 2 * weightOf(rows.length));
      await device.sync();
    }
    const norms = await optimizer.step(schedule.rate(step));
    for (const alarm of health.observe(norms)) o.onAlarm?.(alarm);
    o.project?.();
    if (!schedule.endsEpoch(step + 1)) continue;
    const error = await judge(o, judged, weightOf(judged));
    if (error < after) {
      [after, bestStep] = [error, step + 1];
      best.free(...kept);
      kept = snapshot(best, o.parameters);
    }
  }
  const last = snapshot(best, o.parameters);
  o.parameters.forEach(({ value }, i) => copyInto(value, kept[i]!));
  let parts = 0;
  for (const part of bestStep === schedule.total ? [] : (o.parts ?? [])) {
    const set = (to: readonly Tensor[]) => part.forEach((one) => copyInto(one.value, to[o.parameters.indexOf(one)]!));
    set(last);
    const error = await judge(o, judged, weightOf(judged));
    if (error < after) [after, parts] = [error, parts + 1];
    else set(kept);
  }
  return { before, after, best: bestStep, ...(o.parts && { parts }), steps: schedule.total, health: health.summary() };
}

interface Drawn {
  readonly row: number;
  readonly other: boolean;
}

/** Sequences [length, C] as one batch [rows length, C]. */
async function take(scope: Scope, o: BlockTuning, rows: readonly Drawn[], target: boolean): Promise<Tensor> {
  const from = (other: boolean) => (target ? o.target : other ? o.other!.input : o.input);
  const out = scope.empty(o.target.dtype, [rows.length * o.length, o.target.width]);
  for (const [i, { row, other }] of rows.entries()) {
    using work = new Scope(o.device);
    copyInto(out.slice(0, i * o.length, (i + 1) * o.length), await from(other).of(row, work));
  }
  return out;
}

/** Forward, loss and backward of some sequences: gradients are added up. */
async function pass(o: BlockTuning, optimizer: Descent, rows: readonly Drawn[], weight: number): Promise<void> {
  using tape = new Tape(o.device);
  optimizer.leaves(tape);
  const x = await take(tape.scope, o, rows, false);
  const target = await take(tape.scope, o, rows, true);
  const y = tape.record(() => forward(tape.scope, o, rows, x));
  const d = binary(tape.scope, 'sub', y, target);
  unary(tape.scope, 'affine', d, weight, 0, d);
  tape.seed(y, d);
  tape.backward();
}

function forward(scope: Scope, o: BlockTuning, rows: readonly Drawn[], x: Tensor): Tensor {
  const ctx = o.context(scope, o.weights(scope), rows.map(({ row }) => row)); // prettier-ignore
  return run(o.block.forward(x, ctx), ctx);
}

/** Error on the last `judged` sequences. */
async function judge(o: BlockTuning, judged: number, weight: number): Promise<number> {
  let sum = 0;
  for (let row = o.n - judged; row < o.n; row += o.microBatch) {
    using scope = new Scope(o.device);
    const rows = Array.from({ length: Math.min(o.microBatch, o.n - row) }, (_, i) => ({ row: row + i, other: false }));
    const y = forward(scope, o, rows, await take(scope, o, rows, false));
    const d = binary(scope, 'sub', y, await take(scope, o, rows, true));
    sum += await squares(d);
  }
  return sum * weight;
}

async function squares(x: Tensor): Promise<number> {
  using scope = new Scope(x.device);
  const rows = await reduce(scope, 'sumsq', x, 1).float32();
  return rows.reduce((a, b) => a + b, 0);
}

async function meanSquare({ device, target, n, length }: BlockTuning): Promise<number> {
  let sum = 0;
  for (let row = 0; row < n; row++) {
    using scope = new Scope(device);
    sum += await squares(await target.of(row, scope));
  }
  return sum / (n * length * target.width);
}

/** Copies of all values. */
function snapshot(scope: Scope, parameters: readonly Parameter[]): Tensor[] {
  return parameters.map(({ value }) => {
    const copy = scope.empty(value.dtype, value.shape);
    copyInto(copy, value);
    return copy;
  });
}

/** Bytes that a block's recorded pass holds for one token, about: every linear's input and output, and attention. */
export function recordedBytes(block: Block, dtype: 'f32' | 'bf16'): number {
  let values = 0;
  for (const linears of block.linears) {
    const { role, inFeatures } = linears[0]!;
    if (role === 'expert') continue;
    values += inFeatures + linears.reduce((sum, { outFeatures }) => sum + outFeatures, 0);
  }
  if (block.moe) values += block.moe.active * (4 * block.moe.width + 2 * (block.linears[0]?.[0]?.inFeatures ?? 0));
  return 2.5 * values * dtypeSize(dtype);
}
