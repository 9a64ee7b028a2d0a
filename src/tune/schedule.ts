import type { Random } from '../base/rng.js';

export interface ScheduleOptions {
  /** Sequences that are trained on. */
  readonly sequences: number;
  /** Sequences a step. */
  readonly batch: number;
  readonly epochs: number;
  /** Ends earlier. */
  readonly maxSteps?: number | undefined;
  /** The largest learning rate. */
  readonly lr: number;
  /** Share of the steps over which the learning rate rises. */
  readonly warmup: number;
  /** How it falls to zero behind that; default: as a cosine. */
  readonly curve?: 'cosine' | 'linear' | undefined;
  /** The sequences of an epoch in their order; called once when the epoch begins. */
  readonly order: (epoch: number) => readonly number[];
}

/** Which sequences each step takes, and its learning rate. Steps count from 0; any may be the first that is asked for. */
export class Schedule {
  readonly perEpoch: number;
  readonly total: number;
  readonly #o: ScheduleOptions;
  #epoch = -1;
  #order: readonly number[] = [];

  constructor(options: ScheduleOptions) {
    this.#o = options;
    this.perEpoch = Math.ceil(options.sequences / options.batch);
    this.total = Math.min(this.perEpoch * options.epochs, options.maxSteps ?? Infinity);
  }

  rows(step: number): readonly number[] {
    const epoch = Math.floor(step / this.perEpoch);
    if (epoch !== this.#epoch) [this.#epoch, this.#order] = [epoch, this.#o.order(epoch)];
    const at = (step % this.perEpoch) * this.#o.batch;
    return this.#order.slice(at, at + this.#o.batch);
  }

  rate(step: number): number {
    const { lr, warmup, curve } = this.#o;
    return lr * (curve === 'linear' ? linear : cosine)(step, this.total, Math.ceil(warmup * this.total));
  }

  /** Whether an epoch, or all, is over behind `done` steps. */
  endsEpoch(done: number): boolean {
    return done % this.perEpoch === 0 || done === this.total;
  }
}

/** Cosine from 1 to `last` after a linear warm-up over the first `warmup` of `total` steps (Loshchilov & Hutter 2017). */
export function cosine(step: number, total: number, warmup: number, last = 0): number {
  if (step < warmup) return (step + 1) / warmup;
  const along = (step - warmup) / Math.max(1, total - warmup);
  return last + (1 - last) * 0.5 * (1 + Math.cos(Math.PI * Math.min(1, along)));
}

/** A straight line in its place. */
export function linear(step: number, total: number, warmup: number): number {
  return step < warmup ? (step + 1) / warmup : (total - step) / Math.max(1, total - warmup);
}

/** 0 .. n-1 in a random order. */
export function shuffled(n: number, random: Random): number[] {
  const order = Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}
