import type { Device } from '../backend/device.js';
import { dtypeSize } from '../base/dtype.js';
import { Random } from '../base/rng.js';
import type { ForwardContext, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import type { Block } from '../arch/types.js';
import { binary, copyInto, reduce, unary } from '../tensor/ops.js';
import { Tape } from '../tensor/tape.js';
import type { Tensor } from '../tensor/tensor.js';
import { Scope } from '../tensor/tensor.js';
import { GradientHealth, type Alarm, type HealthSummary } from './health.js';
import { Optimizer, type AdamOptions, type Parameter } from './parameters.js';
import { Schedule, shuffled } from './schedule.js';

export interface BlockTuning {
  readonly device: Device;
  readonly block: Block;
  readonly parameters: readonly Parameter[];
  /** The weights that the parameters stand for; called within the recorded pass. */
  readonly weights: (scope: Scope) => Weights;
  readonly context: (scope: Scope, weights: Weights, rows: number) => ForwardContext;
  /** Sequences and their length: inputs and targets are [n S, C]. */
  readonly n: number;
  readonly length: number;
  /** One input, or two that sequences are drawn from: the second with the probability `share`. */
  readonly input: Tensor;
  readonly other?: { readonly input: Tensor; readonly share: number };
  readonly target: Tensor;
  /** The last `held` sequences are not trained on: they judge. */
  readonly held: number;
  readonly epochs: number;
  /** Sequences a step, and a pass. */
  readonly batch: number;
  readonly microBatch: number;
  readonly lr: number;
  /** Share of the steps over which the learning rate rises. */
  readonly warmup: number;
  readonly adam: AdamOptions;
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
  using optimizer = new Optimizer(device, o.parameters, o.adam);
  using best = new Scope(device);
  const energy = await meanSquare(o.target);
  const weightOf = (rows: number) => 1 / (rows * o.length * o.target.dim(1) * Math.max(energy, 1e-30));

  const before = await judge(o, weightOf(held));
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
      pass(o, optimizer, mixed, 2 * weightOf(rows.length));
      await device.sync();
    }
    const norms = await optimizer.step(schedule.rate(step));
    for (const alarm of health.observe(norms)) o.onAlarm?.(alarm);
    o.project?.();
    if (!schedule.endsEpoch(step + 1)) continue;
    const error = await judge(o, weightOf(held));
    if (error < after) {
      [after, bestStep] = [error, step + 1];
      best.free(...kept);
      kept = snapshot(best, o.parameters);
    }
  }
  o.parameters.forEach(({ value }, i) => copyInto(value, kept[i]!));
  return { before, after, best: bestStep, steps: schedule.total, health: health.summary() };
}

/** Sequences of a state [n S, C] as one batch [rows S, C]. */
function take(scope: Scope, o: BlockTuning, rows: readonly { row: number; other: boolean }[], target: boolean): Tensor {
  const from = (other: boolean) => (target ? o.target : other ? o.other!.input : o.input);
  const out = scope.empty(o.target.dtype, [rows.length * o.length, o.target.dim(1)]);
  rows.forEach(({ row, other }, i) => {
    const source = from(other).slice(0, row * o.length, (row + 1) * o.length);
    copyInto(out.slice(0, i * o.length, (i + 1) * o.length), source);
  });
  return out;
}

/** Forward, loss and backward of some sequences: gradients are added up. */
function pass(o: BlockTuning, optimizer: Optimizer, rows: readonly { row: number; other: boolean }[], weight: number) {
  using tape = new Tape(o.device);
  optimizer.leaves(tape);
  const x = take(tape.scope, o, rows, false);
  const target = take(tape.scope, o, rows, true);
  const y = tape.record(() => {
    const ctx = o.context(tape.scope, o.weights(tape.scope), rows.length);
    return run(o.block.forward(x, ctx), ctx);
  });
  const d = binary(tape.scope, 'sub', y, target);
  unary(tape.scope, 'affine', d, weight, 0, d);
  tape.seed(y, d);
  tape.backward();
}

/** Error on the held sequences. */
async function judge(o: BlockTuning, weight: number): Promise<number> {
  let sum = 0;
  for (let row = o.n - o.held; row < o.n; row += o.microBatch) {
    using scope = new Scope(o.device);
    const rows = Array.from({ length: Math.min(o.microBatch, o.n - row) }, (_, i) => ({ row: row + i, other: false }));
    const ctx = o.context(scope, o.weights(scope), rows.length);
    const y = run(o.block.forward(take(scope, o, rows, false), ctx), ctx);
    const d = binary(scope, 'sub', y, take(scope, o, rows, true));
    const squares = await reduce(scope, 'sumsq', d, 1).float32();
    sum += squares.reduce((a, b) => a + b, 0);
  }
  return sum * weight;
}

async function meanSquare(x: Tensor): Promise<number> {
  using scope = new Scope(x.device);
  const squares = await reduce(scope, 'sumsq', x, 1).float32();
  return squares.reduce((a, b) => a + b, 0) / x.count;
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
