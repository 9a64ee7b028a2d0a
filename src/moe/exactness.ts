import { open, readdir, rm } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { badInput, bug } from '../base/errors.js';
import { fsyncPath, ioError, renameDurable } from '../base/files.js';
import type { Job } from '../base/job.js';
import type { Device } from '../backend/device.js';
import type { LinearSpec, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { forwardContext } from '../arch/context.js';
import type { Model } from '../arch/types.js';
import { binary, normAdd, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

/** Weights that were just made, by name; experts of one kind also as [E, N, K]. */
export class MadeWeights implements Weights {
  readonly #tensors = new Map<string, Tensor>();
  readonly #stacks = new Map<string, Tensor>();
  readonly #beneath: Weights;

  /** What is not added is looked up in `beneath`. */
  constructor(beneath: Weights) {
    this.#beneath = beneath;
  }
  add(name: string, tensor: Tensor): void {
    this.#tensors.set(name, tensor);
  }
  /** `names`: full names of the E matrices. */
  addStack(names: readonly string[], stack: Tensor): void {
    this.#stacks.set(names[0]!, stack);
    names.forEach((name, e) => this.#tensors.set(name, stack.at(e)));
  }
  get(name: string): Tensor {
    return this.#tensors.get(name) ?? this.#beneath.get(name);
  }
  has(name: string): boolean {
    return this.#tensors.has(name) || this.#beneath.has(name);
  }
  stack(linears: readonly LinearSpec[]): Tensor {
    const stack = this.#stacks.get(`${linears[0]?.name}.weight`);
    return stack && stack.dim(0) === linears.length ? stack : this.#beneath.stack(linears);
  }
  set(name: string): void {
    throw bug(`weight ${name} of a finished mixture is replaced`);
  }
  table(name: string): Int32Array {
    return this.#beneath.table(name);
  }
}

/** Logits of a mixture with all experts on against the dense model's. */
export interface Exactness {
  /** |a - b| / |b| over all logits. */
  readonly relative: number;
  /** Largest difference over the largest logit. */
  readonly worst: number;
  readonly tokens: number;
}

/** Tokens that the standing test runs on. */
const fewTokens = 512;

/**
 * The standing test: a few tokens go through the dense model and through mixtures with all experts on, block by block
 * beside the conversion, each by its own architecture's forward pass in fp32.
 */
export class AllOnCheck implements Disposable {
  #states: Tensor[] = [];
  /** The block whose states are on disk for certain. */
  #durable: number | undefined;
  #scope: Scope;

  /** `models`: the dense one, then the mixtures. `tokens` is cut to a few. */
  constructor(
    readonly device: Device,
    readonly job: Job,
    readonly models: readonly Model[],
    readonly tokens: Int32Array,
  ) {
    this.tokens = tokens.subarray(0, fewTokens);
    this.#scope = new Scope(device);
  }

  #path(block: number): string {
    return this.job.statePath(`all-on-${block}.bin`);
  }

  /** `outer`: embedding, final norm and head of the dense model, which the mixtures share; in fp32. */
  begin(outer: Weights): void {
    const { tokens } = this;
    for (const model of this.models) {
      using work = new Scope(this.device);
      const ctx = forwardContext(work, model, outer, 1, tokens.length);
      const x = model.embed(work.from('i32', [1, tokens.length], tokens), ctx);
      this.#states.push(work.move(x, this.#scope));
    }
  }

  /** All models go through block `index`; what they have become is in a file, and on disk after `flush`. */
  async advance(index: number, weightsOf: (model: number, s: Scope) => Promise<Weights>): Promise<void> {
    const next = new Scope(this.device);
    const states: Tensor[] = [];
    for (const [i, model] of this.models.entries()) {
      using work = new Scope(this.device);
      const ctx = forwardContext(work, model, await weightsOf(i, work), 1, this.tokens.length, {
        tokens: this.tokens,
      });
      states.push(work.move(run(model.blocks[index]!.forward(this.#states[i]!, ctx), ctx), next));
      await this.device.sync();
    }
    this.#scope[Symbol.dispose]();
    [this.#scope, this.#states] = [next, states];
    await this.#save(index);
  }

  async #save(index: number): Promise<void> {
    const growing = `${this.#path(index)}.tmp`;
    try {
      const file = await open(growing, 'w');
      let at = 0;
      for (const state of this.#states) {
        await this.device.writeFile(state.buffer, state.byteOffset, file.fd, at, state.bytes);
        at += state.bytes;
      }
      await file.close();
    } catch (error) {
      throw ioError(error, 'write', growing);
    }
  }

  /** Makes durable what the models were after block `index`: a run that goes on behind it begins there. */
  async flush(index: number): Promise<void> {
    const path = this.#path(index);
    await fsyncPath(`${path}.tmp`);
    await renameDurable(`${path}.tmp`, path);
    for (const name of await readdir(dirname(path))) {
      const other = Number(/^all-on-(\d+)\.bin(\.tmp)?$/.exec(name)?.[1] ?? index);
      // The one flushed before stays until the journal has this one.
      if (other < index && other !== this.#durable) await rm(join(dirname(path), name), { force: true });
    }
    this.#durable = index;
  }

  async load(index: number): Promise<void> {
    this.#durable = index;
    const path = this.#path(index);
    const shape = [this.tokens.length, this.models[0]!.stateWidth];
    try {
      const file = await open(path, 'r');
      const { size } = await file.stat();
      const bytes = 4 * shape[0]! * shape[1]!;
      if (size !== bytes * this.models.length) {
        throw badInput(`The stored states of the standing test are damaged: ${basename(path)}`, {
          where: path,
          expected: `${bytes * this.models.length} bytes`,
          got: String(size),
          hint: 'Begin anew with --restart.',
        });
      }
      this.#states = [];
      for (let i = 0; i < this.models.length; i++) {
        const state = this.#scope.empty('f32', shape);
        await this.device.readFile(state.buffer, state.byteOffset, file.fd, i * bytes, bytes);
        this.#states.push(state);
      }
      await file.close();
    } catch (error) {
      throw ioError(error, 'read', path);
    }
  }

  /** The mixtures' logits against the dense model's. */
  async end(outer: Weights): Promise<Exactness[]> {
    using work = new Scope(this.device);
    const logits = this.models.map((model, i) => {
      const ctx = forwardContext(work, model, outer, 1, this.tokens.length);
      return run(model.logits(this.#states[i]!, ctx), ctx);
    });
    const reference = logits[0]!;
    const results: Exactness[] = [];
    for (const candidate of logits.slice(1)) {
      const difference = binary(work, 'sub', candidate, reference);
      const norms = work.zeros('f32', [2, 2]);
      normAdd(norms.at(0), difference);
      normAdd(norms.at(1), reference);
      const [d, , r] = await norms.float32();
      const largest = async (x: Tensor) => (await reduce(work, 'absmax', x.view(1, -1), 1).float32())[0]!;
      results.push({
        relative: Math.sqrt(d! / Math.max(r!, 1e-30)),
        worst: (await largest(difference)) / Math.max(await largest(reference), 1e-30),
        tokens: this.tokens.length,
      });
    }
    return results;
  }

  [Symbol.dispose](): void {
    this.#scope[Symbol.dispose]();
  }
}
