import type { Device } from '../backend/device.js';
import type { Group } from '../backend/group.js';
import { allGather, fill, partOf, reduceScatter } from '../tensor/ops.js';
import type { Tape } from '../tensor/tape.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { Optimizer, type AdamOptions, type Parameter, type StepNorms } from './parameters.js';

/** One device's copy of what learns. */
export interface Copy {
  readonly device: Device;
  readonly parameters: readonly Parameter[];
}

/** A device with its copy, the gradients that it gathers, and the optimizer of its part of each parameter. */
class Rank {
  readonly scope: Scope;
  readonly grads: readonly Tensor[];
  readonly optimizer: Optimizer;

  constructor(
    readonly copy: Copy,
    rank: number,
    ranks: number,
    options: AdamOptions,
  ) {
    const { device, parameters } = copy;
    this.scope = new Scope(device);
    this.grads = parameters.map(({ value }) => this.scope.zeros('f32', value.shape));
    const part = (x: Tensor) => x.view(-1).slice(0, ...partOf(x.count, rank, ranks));
    const parts = parameters.map((parameter) => ({ ...parameter, value: part(parameter.value) }));
    this.optimizer = new Optimizer(device, parts, options, this.grads.map(part));
  }

  /** Makes `tape` add gradients to those of the parameters that `only` is true for. */
  leaves(tape: Tape, only: (parameter: Parameter) => boolean = () => true): void {
    this.copy.parameters.forEach((parameter, i) => {
      if (only(parameter)) tape.leaf(parameter.value, this.grads[i]);
    });
  }
}

/**
 * AdamW of one device, or of a group whose ranks hold the same parameters and gather gradients of different text: each
 * rank keeps moments of, and moves, its part of every parameter (ZeRO stage 1, Rajbhandari et al. 2020). What is stored
 * is the same for any number of ranks.
 */
export class ShardedOptimizer implements Disposable {
  readonly ranks: readonly Rank[];
  readonly #group: Group | undefined;

  /** copies[rank]; a group is needed for more than one. */
  constructor(copies: readonly Copy[], options: AdamOptions, group?: Group) {
    this.ranks = copies.map((copy, rank) => new Rank(copy, rank, copies.length, options));
    this.#group = group;
  }

  /** Steps made; skipped ones do not count. */
  get steps(): number {
    return this.ranks[0]!.optimizer.steps;
  }
  set steps(steps: number) {
    for (const { optimizer } of this.ranks) optimizer.steps = steps;
  }

  /** Every parameter's parts, rank by rank. */
  values(): Tensor[] {
    return this.#byParameter(({ optimizer }) => optimizer.parameters.map(({ value }) => value));
  }

  /** Values and moments: what must be saved to go on from here. Whoever writes values calls `spread` then. */
  state(): Tensor[] {
    return this.#byParameter(({ optimizer }) => optimizer.state());
  }

  #byParameter(of: (rank: Rank) => readonly Tensor[]): Tensor[] {
    const all = this.ranks.map(of);
    return all[0]!.flatMap((_, i) => all.map((own) => own[i]!));
  }

  /** Gives every rank the values of all parts. */
  spread(): void {
    if (!this.#group) return;
    allGather(this.#group, this.ranks.map(({ copy }) => copy.parameters.map(({ value }) => value))); // prettier-ignore
  }

  /** One step with the gradients gathered on all ranks since the last one, which begin anew. */
  async step(lr: number): Promise<StepNorms> {
    if (this.#group) reduceScatter(this.#group, this.ranks.map(({ grads }) => grads)); // prettier-ignore
    const norms = together(await Promise.all(this.ranks.map(({ optimizer }) => optimizer.norms())));
    let clipped = false;
    if (norms.nonFinite === 0) {
      for (const { optimizer } of this.ranks) clipped = optimizer.apply(lr, norms.norm);
      this.spread();
    }
    for (const { grads } of this.ranks) for (const grad of grads) fill(grad, 0);
    return { ...norms, clipped };
  }

  [Symbol.dispose](): void {
    for (const { scope, optimizer } of this.ranks) {
      optimizer[Symbol.dispose]();
      scope[Symbol.dispose]();
    }
  }
}

type Norms = Omit<StepNorms, 'clipped'>;

/** Norms of a whole from those of its parts. */
function together(parts: readonly Norms[]): Norms {
  const root = (of: (part: Norms) => number) => (parts.length === 1 ? of(parts[0]!) : Math.hypot(...parts.map(of)));
  return {
    norm: root(({ norm }) => norm),
    nonFinite: parts.reduce((sum, { nonFinite }) => sum + nonFinite, 0),
    blocks: new Map([...parts[0]!.blocks.keys()].map((block) => [block, root(({ blocks }) => blocks.get(block)!)])),
  };
}
