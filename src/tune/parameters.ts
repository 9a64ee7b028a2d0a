import type { Device } from '../backend/device.js';
import { adamw, binary, fill, normAdd, unary } from '../tensor/ops.js';
import type { Tape } from '../tensor/tape.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

/** Something that learns: fp32 values, whatever precision the forward pass computes in. */
export interface Parameter {
  readonly name: string;
  /** f32, contiguous, all of its memory. */
  readonly value: Tensor;
  /** Multiplies the learning rate. */
  readonly rate: number;
  /** Whether weight decay applies (matrices; not norms, biases, scales). */
  readonly decay: boolean;
  /** Gradient norms are kept apart by this: a block's index, -1 outside the blocks. */
  readonly block: number;
}

export interface AdamOptions {
  readonly beta1: number;
  readonly beta2: number;
  readonly eps: number;
  /** Decoupled weight decay (Loshchilov & Hutter 2019). */
  readonly decay: number;
  /** Largest global norm of the gradient; larger ones are scaled down to it. */
  readonly clip: number;
}

export const defaultAdam: AdamOptions = { beta1: 0.9, beta2: 0.95, eps: 1e-8, decay: 0, clip: 1 };

/** Norms of one step's gradients, before clipping. */
export interface StepNorms {
  /** Over all parameters. */
  readonly norm: number;
  readonly clipped: boolean;
  /** Values that are not finite: with any, the step is skipped. */
  readonly nonFinite: number;
  /** Norm of each block, by index. */
  readonly blocks: ReadonlyMap<number, number>;
}

/** Parameters, their gradients, and what makes steps of them; all in fp32 on the device. */
export abstract class Descent implements Disposable {
  readonly parameters: readonly Parameter[];
  protected readonly device: Device;
  protected readonly scope: Scope;
  protected readonly grads: readonly Tensor[];

  /** `grads`: where gradients are gathered, of the parameters' shapes; absent: in memory of its own. */
  constructor(device: Device, parameters: readonly Parameter[], grads?: readonly Tensor[]) {
    [this.device, this.parameters] = [device, parameters];
    this.scope = new Scope(device);
    this.grads = grads ?? this.zeros();
  }

  /** One step with the gradients gathered since the last one, which begin anew. */
  async step(lr: number): Promise<StepNorms> {
    const norms = await this.norms();
    const clipped = norms.nonFinite === 0 && this.apply(lr, norms.norm);
    for (const grad of this.grads) fill(grad, 0);
    return { ...norms, clipped };
  }

  /** Moves the values by finite gradients of the given norm; returns whether these were clipped. */
  abstract apply(lr: number, norm: number): boolean;

  /** Makes `tape` add gradients of all parameters to theirs; `only` those that it is true for. */
  leaves(tape: Tape, only: (parameter: Parameter) => boolean = () => true): void {
    this.parameters.forEach((parameter, i) => {
      if (only(parameter)) tape.leaf(parameter.value, this.grads[i]);
    });
  }

  protected zeros(): Tensor[] {
    return this.parameters.map(({ value }) => this.scope.zeros('f32', value.shape));
  }

  /** Norms of the gradients gathered so far. */
  async norms(): Promise<Omit<StepNorms, 'clipped'>> {
    using scope = new Scope(this.device);
    const indices = [...new Set(this.parameters.map(({ block }) => block))].sort((a, b) => a - b);
    const sums = scope.zeros('f32', [indices.length, 2]);
    this.parameters.forEach(({ block }, i) => normAdd(sums.at(indices.indexOf(block)), this.grads[i]!));
    const values = await sums.float32();
    let [total, nonFinite] = [0, 0];
    const blocks = new Map<number, number>();
    indices.forEach((block, i) => {
      const squares = values[2 * i]!;
      total += squares;
      // A sum of squares beyond fp32 is as useless as a value that is.
      nonFinite += values[2 * i + 1]! + (Number.isFinite(squares) ? 0 : 1);
      blocks.set(block, Math.sqrt(squares));
    });
    return { norm: Math.sqrt(total), nonFinite, blocks };
  }

  [Symbol.dispose](): void {
    this.scope[Symbol.dispose]();
  }
}

/** AdamW. */
export class Optimizer extends Descent {
  /** Steps made; skipped ones do not count. */
  steps = 0;
  readonly #first: Tensor[];
  readonly #second: Tensor[];
  readonly #options: AdamOptions;

  constructor(device: Device, parameters: readonly Parameter[], options: AdamOptions, grads?: readonly Tensor[]) {
    super(device, parameters, grads);
    this.#options = options;
    [this.#first, this.#second] = [this.zeros(), this.zeros()];
  }

  /** Values and moments: what must be saved to go on from here. */
  state(): Tensor[] {
    return [...this.parameters.map(({ value }) => value), ...this.#first, ...this.#second];
  }

  apply(lr: number, norm: number): boolean {
    const { clip, beta1, beta2, eps, decay } = this.#options;
    using scope = new Scope(this.device);
    // As torch.nn.utils.clip_grad_norm_ computes it.
    const factor = scope.from('f32', [1], Float32Array.of(Math.min(1, clip / (norm + 1e-6))));
    this.steps++;
    this.parameters.forEach(({ value, rate, decay: decays }, i) => {
      adamw(value, this.#first[i]!, this.#second[i]!, this.grads[i]!, {
        step: this.steps,
        lr: lr * rate,
        ...{ beta1, beta2, eps },
        decay: decays ? decay : 0,
        clip: factor,
      });
    });
    return norm > clip;
  }
}

/** Makes any gradient that means something larger than 1. */
const large = 1e30;

/** Signed gradient descent: every value moves by the learning rate, against its gradient's sign. */
export class SignDescent extends Descent {
  apply(lr: number): boolean {
    this.parameters.forEach(({ value, rate }, i) => {
      const sign = this.grads[i]!;
      unary(this.scope, 'affine', sign, large, 0, sign);
      unary(this.scope, 'clamp', sign, -1, 1, sign);
      binary(this.scope, 'add', value, sign, { alpha: -lr * rate, out: value });
    });
    return false;
  }
}
