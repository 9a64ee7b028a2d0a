import type { StepNorms } from './parameters.js';

export interface Alarm {
  readonly kind: 'vanishing' | 'exploding' | 'clipped' | 'non-finite';
  /** The step at which it was raised, from 1. */
  readonly step: number;
  /** Where blocks are concerned. */
  readonly block?: number;
  /** One sentence with the numbers. */
  readonly text: string;
}

export interface HealthSummary {
  readonly steps: number;
  /** Steps that were left out because gradients were not finite. */
  readonly skipped: number;
  readonly nonFinite: number;
  readonly clippedShare: number;
  /** Over all steps: of the global norm before clipping. */
  readonly medianNorm: number;
  readonly largestNorm: number;
  /** Median norm of each block. */
  readonly blocks: Readonly<Record<string, number>>;
  readonly alarms: readonly Alarm[];
}

/** Everything that is kept, to go on with after an interruption. */
export interface HealthState {
  readonly norms: readonly number[];
  readonly clipped: number;
  readonly skipped: number;
  readonly nonFinite: number;
  readonly blocks: readonly (readonly [block: number, norms: readonly number[]])[];
  readonly alarms: readonly Alarm[];
  /** Held-out loss at the start. */
  readonly start: number | null;
}

/** Steps before a median means something. */
const settled = 3;
const ratioBound = 10;
const clippedBound = 0.3;
/** A held-out loss of so many times the start's. */
const divergedBound = 1.5;
/** Fewer steps than this may all be clipped: a warm-up begins with large gradients. */
const clippedSteps = 10;

/**
 * Watches gradients: adjacent blocks whose norms differ by more than a factor of ten, a norm above ten times its
 * running median, more than 30% of the steps clipped, anything not finite; also gradients of zero, and a held-out loss
 * that has run away. An alarm is raised once a kind and block.
 */
export class GradientHealth {
  readonly #norms: number[] = [];
  readonly #blocks = new Map<number, number[]>();
  readonly #alarms: Alarm[] = [];
  #clipped = 0;
  #skipped = 0;
  #nonFinite = 0;
  #start: number | undefined;

  constructor(state?: HealthState) {
    if (!state) return;
    this.#norms.push(...state.norms);
    for (const [block, norms] of state.blocks) this.#blocks.set(block, [...norms]);
    this.#alarms.push(...state.alarms);
    this.#start = state.start ?? undefined;
    [this.#clipped, this.#skipped, this.#nonFinite] = [state.clipped, state.skipped, state.nonFinite];
  }

  state(): HealthState {
    return {
      norms: [...this.#norms],
      clipped: this.#clipped,
      skipped: this.#skipped,
      nonFinite: this.#nonFinite,
      blocks: [...this.#blocks].map(([block, norms]) => [block, [...norms]]),
      alarms: [...this.#alarms],
      start: this.#start ?? null,
    };
  }

  /** Takes in one step; returns the alarms that it raised. */
  observe({ norm, clipped, nonFinite, blocks }: StepNorms): Alarm[] {
    const step = this.#norms.length + this.#skipped + 1;
    const raised: Alarm[] = [];
    const raise = (alarm: Omit<Alarm, 'step'>) => {
      if (this.#alarms.some((old) => old.kind === alarm.kind && old.block === alarm.block)) return;
      raised.push({ ...alarm, step });
      this.#alarms.push({ ...alarm, step });
    };
    if (nonFinite > 0) {
      this.#skipped++;
      this.#nonFinite += nonFinite;
      raise({ kind: 'non-finite', text: `${nonFinite} gradients are not finite: the step is left out` });
      return raised;
    }
    const before = this.#norms.length >= settled ? median(this.#norms) : undefined;
    if (before !== undefined && norm > ratioBound * before) {
      const text = `the gradient's norm ${show(norm)} is ${show(norm / before)} times its median so far, ${show(before)}`;
      raise({ kind: 'exploding', text });
    }
    if (norm === 0) {
      const dead = this.#norms.some((earlier) => earlier > 0);
      const text = dead
        ? 'all gradients have become exactly zero: the weights have run away, and nothing depends on them any more'
        : 'all gradients are exactly zero';
      raise({ kind: dead ? 'exploding' : 'vanishing', text });
    }
    this.#norms.push(norm);
    if (clipped) this.#clipped++;
    const steps = this.#norms.length;
    if (steps >= clippedSteps && this.#clipped > clippedBound * steps) {
      raise({ kind: 'clipped', text: `${Math.round((100 * this.#clipped) / steps)}% of the steps are clipped` });
    }
    for (const [block, value] of blocks) {
      const norms = this.#blocks.get(block);
      if (norms) norms.push(value);
      else this.#blocks.set(block, [value]);
    }
    if (steps >= settled) this.#adjacent(raise);
    return raised;
  }

  /** Takes in the loss on held-out text, first at the start; returns the alarm that it raised. */
  judge(loss: number): Alarm[] {
    this.#start ??= loss;
    const step = this.#norms.length + this.#skipped;
    if (loss <= divergedBound * this.#start || this.#alarms.some(({ kind, block }) => kind === 'exploding' && block === undefined)) return []; // prettier-ignore
    const alarm: Alarm = { kind: 'exploding', step, text: `the loss on held-out text went from ${show(this.#start)} to ${show(loss)}` }; // prettier-ignore
    this.#alarms.push(alarm);
    return [alarm];
  }

  #adjacent(raise: (alarm: Omit<Alarm, 'step'>) => void): void {
    const medians = [...this.#blocks].filter(([block]) => block >= 0).map(([block, norms]) => [block, median(norms)] as const); // prettier-ignore
    medians.sort(([a], [b]) => a - b);
    const typical = median(medians.map(([, value]) => value));
    for (let i = 0; i + 1 < medians.length; i++) {
      const [first, second] = [medians[i]!, medians[i + 1]!];
      const [small, large] = first[1] < second[1] ? [first, second] : [second, first];
      if (!(large[1] > ratioBound * small[1])) continue;
      // The one that is out of line gives its name.
      const vanishing = typical > Math.sqrt(small[1] * large[1]);
      const kind = vanishing ? 'vanishing' : 'exploding';
      const block = (vanishing ? small : large)[0];
      const text = `block ${small[0]}'s gradients have a norm of ${show(small[1])}, those of block ${large[0]} beside it ${show(large[1])}`;
      raise({ kind, block, text });
    }
  }

  get alarms(): readonly Alarm[] {
    return this.#alarms;
  }

  summary(): HealthSummary {
    const steps = this.#norms.length;
    return {
      steps,
      skipped: this.#skipped,
      nonFinite: this.#nonFinite,
      clippedShare: steps === 0 ? 0 : this.#clipped / steps,
      medianNorm: steps === 0 ? 0 : median(this.#norms),
      largestNorm: this.#norms.reduce((a, b) => Math.max(a, b), 0),
      blocks: Object.fromEntries([...this.#blocks].map(([block, norms]) => [String(block), median(norms)])),
      alarms: this.#alarms,
    };
  }
}

function median(values: readonly number[]): number {
  const sorted = Float64Array.from(values).sort();
  const middle = sorted.length >> 1;
  return sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
}

const show = (value: number): string => value.toPrecision(3);
