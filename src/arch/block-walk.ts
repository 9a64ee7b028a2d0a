import { bug } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Json } from '../base/job.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import { answer, run } from '../nn/run.js';
import type { Call, Calls, ExpertsCall, ForwardContext, LinearCall, LinearSpec, Weights } from '../nn/calls.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { CalibrationSet } from './calibration.js';
import { forwardContext } from './context.js';
import type { Geometry } from './geometry.js';
import type { OpenModel } from './open.js';
import type { States } from './states.js';
import type { Block } from './types.js';

export interface BlockVisitor {
  /** Whether all batches wait at this call for `visit`; default: at every linear and experts call. */
  holds?(call: LinearCall | ExpertsCall, block: Block): boolean;
  /** All batches stand before this call; `site.weights.set` decides what they will meet. */
  visit(site: Site): Promise<void>;
  /** Answers a call of one batch in place of the weights; undefined leaves it to them. */
  answer?(call: Call, ctx: ForwardContext, block: Block): unknown;
  /**
   * Changes weights once more after the last visit, when it has seen what the block makes of all batches before any visit.
   * Only then do the batches go on, with the weights that it leaves.
   */
  readonly tune?: ((site: TuningSite) => Promise<void>) | undefined;
  /**
   * All batches are through the block. What it returns goes into the journal with the block, once whatever the visitor
   * wrote is durable: when this resolves, or, where there is `flush`, when that resolves.
   */
  finish(block: Block, weights: Weights): Promise<{ readonly data: Json; readonly detail?: string }>;
  /**
   * Makes durable what finished blocks have written, the last of them that with index `last`, after which a later run may
   * have to go on; the next block may be under way.
   */
  flush?(last: number): Promise<void>;
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
  /** Whether each use, and the answer, gets the same tensors: batches stay suspended here and are not recomputed. */
  readonly held: boolean;
  /**
   * Hands out the calls of all batches, in order; `call.x` is valid until the handler's promise resolves. May be used
   * several times. Under a tight budget each use recomputes the block up to here: use it as seldom as you can.
   */
  each(handle: (call: LinearCall | ExpertsCall, batch: number) => void | Promise<void>): Promise<void>;
}

/** A block whose linears have all been visited, what goes into it, and what it is to make of that. */
export interface TuningSite {
  readonly block: Block;
  readonly weights: Weights;
  readonly n: number;
  readonly length: number;
  /** Of the states. */
  readonly dtype: FloatDType;
  readonly width: number;
  /** States [length, W] of a sequence before the block, as the visited blocks make them; they may be a copy in `scope`. */
  input(row: number, scope: Scope): Promise<Tensor>;
  /** Behind the block, as the model makes them that nobody has visited. */
  target(row: number, scope: Scope): Promise<Tensor>;
  context(scope: Scope, weights: Weights, rows: readonly number[]): ForwardContext;
}

export interface WalkOptions {
  readonly open: OpenModel;
  readonly env: JobEnv;
  readonly set: CalibrationSet;
  /** The command that goes on with an interrupted job. */
  readonly resumeHint: string;
}

/** A forward pass of one batch through one block, suspended at a call. */
interface Suspended {
  readonly calls: Calls<Tensor>;
  readonly ctx: ForwardContext;
  readonly scope: Scope;
  step: IteratorResult<Call, Tensor>;
}

/** One block: all batches from call to call, the visitor between. */
export class BlockWalk {
  readonly #answer: (call: Call, ctx: ForwardContext) => unknown;
  /** Until the batch before the one that runs is through. */
  #before: Promise<void> = Promise.resolve();

  constructor(
    readonly options: WalkOptions,
    readonly visitor: BlockVisitor,
    readonly block: Block,
    readonly weights: Weights,
    readonly states: States,
    readonly geometry: Geometry,
  ) {
    this.#answer = (call, ctx) => visitor.answer?.(call, ctx, block) ?? answer(call, ctx);
  }

  /** All batches of `states` through the block with the weights as they are; what they become is put. */
  async pass(states = this.states): Promise<void> {
    for (let b = 0; b < this.geometry.batches.length; b++) {
      stopIfAborted(this.options.env, this.options.resumeHint);
      using scope = new Scope(this.options.env.device);
      const { calls, ctx } = await this.#open(b, scope, states);
      await states.put(
        b,
        run(calls, ctx, (call) => this.visitor.answer?.(call, ctx, this.block)),
        scope,
      );
      await this.options.env.device.sync();
    }
  }

  /** `last`: nobody needs the states after this block, so the batches end at the last held call. */
  async run(last: boolean): Promise<void> {
    const held = this.geometry.hold ? await this.#startAll() : undefined;
    try {
      for (let index = 0; ; index++) {
        const site = await this.#siteAt(index, held);
        if (site === undefined) break;
        stopIfAborted(this.options.env, this.options.resumeHint);
        await this.#idle();
        await this.visitor.visit(site);
        for (const one of held ?? []) {
          await this.#advance(one);
          if (last && one.step.done) break; // so would the others be, and nobody needs what they make
        }
      }
      await this.#idle();
      if (!last) await this.#collect(held);
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
    const scope = new Scope(this.options.env.device);
    const { calls, ctx } = await this.#open(b, scope);
    const one: Suspended = { calls, ctx, scope, step: calls.next() };
    await this.#run(one);
    return one;
  }

  async #open(b: number, scope: Scope, states = this.states): Promise<Pick<Suspended, 'calls' | 'ctx'>> {
    const { open, set } = this.options;
    const { from, rows } = this.geometry.batches[b]!;
    const tokens = set.tokens.subarray(from * set.seqLen, (from + rows) * set.seqLen);
    const ctx = forwardContext(scope, open.model, this.weights, rows, set.seqLen, { tokens });
    return { calls: this.block.forward(await states.get(b, scope), ctx), ctx };
  }

  /**
   * The block as it is makes the targets, the visitor visits and tunes it, and the batches go through what it has become.
   * `reference`: the states that the targets are made of, which may be the batches' own; what they become is put.
   */
  async tune(reference: States, last: boolean): Promise<void> {
    const { states, block, weights } = this;
    const { open, set } = this.options;
    const { seqLen } = set;
    await this.pass(reference);
    await this.run(true);
    const rowsOf = (from: States, which: 'now' | 'next') => (row: number, scope: Scope) => {
      const b = this.geometry.batches.findLastIndex((batch) => batch.from <= row);
      const at = (row - this.geometry.batches[b]!.from) * seqLen;
      return from.rows(which, b, at, at + seqLen, scope);
    };
    await this.visitor.tune!({
      ...{ block, weights, n: set.n, length: seqLen },
      ...{ dtype: states.dtype, width: open.model.stateWidth },
      input: rowsOf(states, 'now'),
      target: rowsOf(reference, 'next'),
      context: (scope, current, rows) => {
        const tokens = new Int32Array(rows.length * seqLen);
        rows.forEach((row, i) => tokens.set(set.tokens.subarray(row * seqLen, (row + 1) * seqLen), i * seqLen));
        return forwardContext(scope, open.model, current, rows.length, seqLen, { tokens });
      },
    });
    if (reference === states) return;
    if (!last) await this.pass();
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
    // Ops are only enqueued: one batch ahead keeps the device busy and lets a failure or an abort end the job soon.
    const before = this.#before;
    this.#before = this.options.env.device.sync();
    this.#before.catch(() => undefined); // reported where it is awaited
    await before;
  }

  /** What was enqueued so far is done, and nothing of it has failed. */
  async #idle(): Promise<void> {
    await this.#before;
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
      held: held !== undefined,
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
            await this.#idle();
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
    await this.#idle();
    await this.states.next();
  }
}

const nameOf = (call: LinearCall | ExpertsCall): string => {
  const first = call.kind === 'linear' ? call.linears[0] : call.linears[0]?.[0];
  return `${call.kind} ${first?.name ?? '?'}`;
};

const sameCall = (a: LinearCall | ExpertsCall, b: LinearCall | ExpertsCall): boolean => nameOf(a) === nameOf(b);
