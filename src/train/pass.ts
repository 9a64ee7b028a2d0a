import type { Device } from '../backend/device.js';
import { forwardContext } from '../arch/context.js';
import type { Model } from '../arch/types.js';
import type { Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { add, binary, copyInto, crossEntropy, crossEntropyBackward, gemm, klBackward, klRows, reduce, unary } from '../tensor/ops.js'; // prettier-ignore
import { Tape } from '../tensor/tape.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Optimizer } from '../tune/parameters.js';
import type { Learning } from '../tune/weights.js';

export interface LossWeights {
  /** Of cross-entropy with the text's next token. */
  readonly crossEntropy: number;
  /** Of KL(teacher || student) over the vocabulary. */
  readonly kl: number;
  /** Of a sequence's squared error of hidden states over the teacher's mean square, averaged over the blocks compared. */
  readonly hidden: number;
  /**
   * Both sides' logits are divided by it before KL, which is multiplied by its square, so that gradients keep their size
   * (Hinton et al. 2015). Absent: 1.
   */
  readonly temperature?: number;
}

/** A model with its weights on the device that is asked, not taught. */
export interface Teacher {
  readonly model: Model;
  readonly outer: Weights;
  readonly blocks: readonly Weights[];
}

export interface PassOptions {
  readonly device: Device;
  readonly model: Model;
  readonly outer: Learning;
  readonly blocks: readonly Learning[];
  readonly teacher?: Teacher;
  /** hiddenOf[i]: the teacher's block whose output the student's block i is to match; undefined: none. */
  readonly hiddenOf?: readonly (number | undefined)[];
  /** Where the student is narrower: its tensor `hiddenMap` [student's width, teacher's] takes hidden states over. */
  readonly map?: Learning;
  readonly loss: LossWeights;
  /** Each block runs again when its turn to go back comes; else the activations of all blocks are kept. */
  readonly recompute: boolean;
}

/** The tensor of `PassOptions.map`. */
export const hiddenMap = 'hidden_map';

/** Means over tokens. */
export interface Losses {
  readonly crossEntropy: number;
  readonly kl: number;
  readonly hidden: number;
}

/** Logits that are on the device at once, in values. */
const logitLimit = 2 ** 25;

/**
 * Lets passes on other devices enqueue what they have next. Each is far ahead of its device, so a few operations at a time
 * keep all of them busy; one whole pass after another would leave the last waiting for its first operation.
 */
const othersTurn = (): Promise<void> => Promise.resolve();

/** Hidden states behind the teacher's blocks: all that `needed` is true for. */
async function ask(
  scope: Scope,
  teacher: Teacher,
  tokens: Tensor,
  needed: (block: number) => boolean,
): Promise<(Tensor | undefined)[]> {
  const { model, outer, blocks } = teacher;
  const [rows, length] = [tokens.dim(0), tokens.dim(1)];
  const states: (Tensor | undefined)[] = [];
  let x = within(scope, (inner) => model.embed(tokens, forwardContext(inner, model, outer, rows, length)));
  for (const [i, block] of model.blocks.entries()) {
    await othersTurn();
    const before = x;
    x = within(scope, (inner) => {
      const ctx = forwardContext(inner, model, blocks[i]!, rows, length);
      return run(block.forward(before, ctx), ctx);
    });
    if (i === 0 || !needed(i - 1)) scope.free(before);
    states.push(needed(i) ? x : undefined);
  }
  return states;
}

/** The first block in which something learns; their number if there is none. */
function firstOf(blocks: readonly Learning[]): number {
  const index = blocks.findIndex(({ parameters }) => parameters.length > 0);
  return index < 0 ? blocks.length : index;
}

/** Runs `body` in a scope of its own; its result lives in `scope`. */
function within(scope: Scope, body: (inner: Scope) => Tensor): Tensor {
  using inner = new Scope(scope.device);
  return inner.move(body(inner), scope);
}

/**
 * Forward pass and losses of token rows [rows, length]; with an optimizer also the backward pass, whose gradients are
 * added to its parameters'. Losses and gradients are shares of the means over `sequences` such rows.
 */
export async function pass(
  o: PassOptions,
  ids: Int32Array,
  rows: number,
  sequences: number,
  optimizer?: Pick<Optimizer, 'leaves'>,
): Promise<Losses> {
  const { device, model, outer, blocks, teacher, hiddenOf = [] } = o;
  const length = ids.length / rows;
  using scope = new Scope(device);
  const tokens = scope.from('i32', [rows, length], ids);
  const last = teacher ? teacher.model.blocks.length - 1 : -1;
  const taught = teacher && (await ask(scope, teacher, tokens, (i) => i === last || hiddenOf.includes(i)));
  const context = (inner: Scope, weights: Weights) => forwardContext(inner, model, weights, rows, length);
  const tapes = new Set<Tape>();
  const tapeOf = (part: Learning): Tape => {
    const tape = new Tape(device);
    tapes.add(tape);
    const own = new Set(part.parameters);
    optimizer!.leaves(tape, (parameter) => own.has(parameter));
    return tape;
  };
  const close = (tape: Tape) => {
    tapes.delete(tape);
    tape[Symbol.dispose]();
  };
  try {
    const embed = (inner: Scope) => model.embed(tokens, context(inner, outer.now(inner)));
    const learnsEmbedding = optimizer !== undefined && outer.parameters.length > 0;
    const first = learnsEmbedding ? tapeOf(outer) : undefined;
    const embedded = first ? first.record(() => embed(first.scope)) : within(scope, embed);

    const forward = (i: number, x: Tensor, inner: Scope) => {
      const ctx = context(inner, blocks[i]!.now(inner));
      return run(model.blocks[i]!.forward(x, ctx), ctx);
    };
    // Blocks in front of everything that learns have no gradients.
    const lowest = first ? 0 : firstOf(blocks);
    const recorded = (i: number, x: Tensor) => {
      const tape = tapeOf(blocks[i]!);
      if (i > lowest || first) tape.leaf(x);
      return { tape, y: tape.record(() => forward(i, x, tape.scope)) };
    };
    const inputs: Tensor[] = [];
    const kept: { tape: Tape | undefined; y: Tensor }[] = [];
    let x = embedded;
    for (let i = 0; i < blocks.length; i++) {
      await othersTurn();
      inputs.push(x);
      const keep = optimizer !== undefined && !o.recompute && i >= lowest;
      kept.push(keep ? recorded(i, x) : { tape: undefined, y: within(scope, (inner) => forward(i, x, inner)) }); // prettier-ignore
      x = kept[i]!.y;
    }

    const share = 1 / sequences;
    const head = await lossesOf(
      o,
      scope,
      x,
      taught?.[last],
      ids,
      rows,
      share,
      optimizer && (() => tapeOf(outer)),
      close,
    );
    const hidden = hiddenOf.flatMap((of, i) => (of === undefined || !taught ? [] : [{ i, t: taught[of]! }]));
    const part = (o.loss.hidden * share) / hidden.length;
    const compared = hidden.map(({ i, t }) => ({ i, ...compare(scope, o.map, kept[i]!.y, t, rows, part, optimizer && tapeOf, close) })); // prettier-ignore

    if (optimizer) {
      let d = head.d;
      for (let i = blocks.length - 1; i >= lowest; i--) {
        await othersTurn();
        const { tape, y } = kept[i]!.tape ? { tape: kept[i]!.tape!, y: kept[i]!.y } : recorded(i, inputs[i]!);
        const extra = compared.find((one) => one.i === i)?.d;
        tape.seed(y, extra ? add(scope, d, extra) : d);
        tape.backward();
        if (i > lowest || first) d = tape.take(inputs[i]!, scope);
        close(tape);
      }
      if (first) {
        first.seed(embedded, d);
        first.backward();
      }
    }
    const [ce, kl] = await head.totals.float32();
    let errors = 0;
    for (const { error } of compared) errors += (await error.float32())[0]! / compared.length;
    return { crossEntropy: ce! * share, kl: kl! * share, hidden: errors * share };
  } finally {
    // Ops that are still enqueued may use what the tapes hold: memory is freed in the queue's order.
    for (const tape of tapes) tape[Symbol.dispose]();
  }
}

/** The sum f32 [1] over sequences of the relative squared error of hidden states, and its gradient for y times `weight`. */
function compare(
  scope: Scope,
  map: Learning | undefined,
  y: Tensor,
  t: Tensor,
  rows: number,
  weight: number,
  tapeOf: ((part: Learning) => Tape) | undefined,
  close: (tape: Tape) => void,
): { error: Tensor; d: Tensor } {
  using work = new Scope(scope.device);
  const over = (s: Scope, by: Learning) => gemm(s, y, by.now(s).get(hiddenMap));
  const tape = map && tapeOf?.(map);
  tape?.leaf(y);
  const z = !map ? y : tape ? tape.record(() => over(tape.scope, map)) : over(work, map);
  const d = binary(scope, 'sub', z, t);
  const sums = (v: Tensor) => reduce(work, 'sum', reduce(work, 'sumsq', v, 1).view(rows, -1), 1);
  const energies = sums(t);
  const error = reduce(scope, 'sum', binary(work, 'div', sums(d), energies), 0);
  const factors = unary(work, 'reciprocal', energies).view(rows, 1);
  const whole = d.view(rows, -1);
  binary(scope, 'mul', whole, factors, { alpha: 2 * weight, out: whole });
  if (!tape) return { error, d };
  tape.seed(z, d);
  tape.backward();
  const dy = tape.take(y, scope);
  close(tape);
  return { error, d: dy };
}

/**
 * Final norm, head and losses, some rows of logits at a time. totals f32 [2]: sums over sequences of their mean
 * cross-entropy and mean KL. d: gradient of the last hidden states.
 */
async function lossesOf(
  o: PassOptions,
  scope: Scope,
  x: Tensor,
  taught: Tensor | undefined,
  ids: Int32Array,
  rows: number,
  share: number,
  tapeOf: (() => Tape) | undefined,
  close: (tape: Tape) => void,
): Promise<{ totals: Tensor; d: Tensor }> {
  const { model, outer, teacher, loss, device } = o;
  const length = ids.length / rows;
  const next = ids.map((_, t) => ((t + 1) % length === 0 ? -1 : ids[t + 1]!));
  const targets = scope.from('i32', [ids.length], next);
  const totals = scope.zeros('f32', [2]);
  const d = scope.empty(x.dtype, x.shape);
  const step = Math.max(1, Math.floor(logitLimit / model.vocab));
  for (let from = 0; from < ids.length; from += step) {
    await othersTurn();
    const to = Math.min(ids.length, from + step);
    const n = to - from;
    using work = new Scope(device);
    const part = work.empty(x.dtype, [n, x.dim(1)]);
    copyInto(part, x.slice(0, from, to));
    const logitsOf = (inner: Scope) => {
      const ctx = forwardContext(inner, model, outer.now(inner), 1, n);
      return run(model.logits(part, ctx), ctx);
    };
    const tape = tapeOf?.();
    tape?.leaf(part);
    const logits = tape ? tape.record(() => logitsOf(tape.scope)) : within(work, logitsOf);
    const lse = work.empty('f32', [n]);
    const goal = targets.slice(0, from, to);
    const put = (i: number, values: Tensor, scale: number) => {
      const sum = reduce(work, 'sum', values, 0).view(1);
      binary(work, 'add', totals.slice(0, i, i + 1), sum, { alpha: scale, out: totals.slice(0, i, i + 1) });
    };
    put(0, crossEntropy(work, logits, goal, { lse }), 1 / (length - 1));
    let gradient: Tensor | undefined;
    if (tape && loss.crossEntropy !== 0) {
      gradient = crossEntropyBackward(work, logits, goal, lse, (loss.crossEntropy * share) / (length - 1));
    }
    if (teacher && taught) {
      const wanted = within(work, (inner) => {
        const ctx = forwardContext(inner, teacher.model, teacher.outer, 1, n);
        return run(teacher.model.logits(copyOf(inner, taught.slice(0, from, to)), ctx), ctx);
      });
      const { temperature = 1 } = loss;
      const cooled = (y: Tensor, out?: Tensor) => temperature === 1 ? y : unary(work, 'affine', y, 1 / temperature, 0, out); // prettier-ignore
      const [p, q] = [cooled(wanted, wanted), cooled(logits)];
      put(1, klRows(work, p, q).kl, temperature ** 2 / length);
      if (tape && loss.kl !== 0) {
        const more = klBackward(work, p, q, (temperature * loss.kl * share) / length);
        gradient = gradient ? add(work, gradient, more, gradient) : more;
      }
    }
    if (!tape) continue;
    const into = d.slice(0, from, to);
    if (gradient) {
      tape.seed(logits, gradient);
      tape.backward();
      copyInto(into, tape.grad(part)!);
    } else {
      device.run('fill', [into], [], [0]);
    }
    close(tape);
  }
  return { totals, d };
}

function copyOf(scope: Scope, x: Tensor): Tensor {
  const y = scope.empty(x.dtype, x.shape);
  copyInto(y, x);
  return y;
}
