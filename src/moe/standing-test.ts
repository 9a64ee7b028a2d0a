import type { JobEnv } from '../backend/env.js';
import type { Job } from '../base/job.js';
import type { Weights } from '../nn/calls.js';
import type { OpenModel } from '../arch/open.js';
import { WeightReader } from '../arch/weights.js';
import { cast } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import { AllOnCheck, MadeWeights, type Exactness } from './exactness.js';
import type { MoePlan } from './plan.js';
import { addConstants, type LayerStore } from './store.js';

/** The dense model, the pure split (or copies) and, where that is another one, the output, run side by side in fp32. */
export class StandingTest implements Disposable {
  readonly #check: AllOnCheck;
  readonly #reader: WeightReader;

  constructor(
    readonly env: JobEnv,
    job: Job,
    readonly open: OpenModel,
    readonly plan: MoePlan,
    differs: boolean,
    tokens: Int32Array,
  ) {
    // Copies of the dense network sum to it for any number of active ones: they are tested as they will be used.
    const mixture = plan.method === 'split' ? plan.allOn : plan.model;
    const models = [open.model, mixture, ...(differs ? [mixture] : [])];
    this.#check = new AllOnCheck(env.device, job, models, tokens);
    this.#reader = new WeightReader(open, env.device, 'f32');
  }

  /** Before block 0, or after the last block that an earlier run finished. */
  async begin(after: number | undefined): Promise<void> {
    if (after !== undefined) return await this.#check.load(after);
    using scope = new Scope(this.env.device);
    this.#check.begin(await this.#reader.outer(scope, 'embedding'));
    await this.env.device.sync();
  }

  /** `store` is absent for a layer that stays dense; `weights` are the dense block's, in the stream's precision. */
  async advance(index: number, store: LayerStore | undefined, weights: Weights): Promise<void> {
    using scope = new Scope(this.env.device);
    const dense = await this.#exact(index, weights, scope);
    await this.#check.advance(index, (model, s) => {
      if (model === 0) return Promise.resolve(dense);
      if (store) return Promise.resolve(store.weights(s, dense, model === 2));
      const made = new MadeWeights(dense);
      addConstants(s, made, this.plan, index, false);
      return Promise.resolve(made);
    });
  }

  /** The dense block as it is stored, in fp32: read again only where the stream's precision is another. */
  async #exact(index: number, weights: Weights, scope: Scope): Promise<Weights> {
    const exact = new MadeWeights(weights);
    for (const { name } of this.open.model.blocks[index]!.tensors) {
      const stored = this.open.tensors.get(name);
      if (!stored || weights.get(name).dtype === 'f32') continue;
      const { encoding } = stored.entry;
      const same = !stored.linear && encoding.kind === 'plain' && encoding.dtype === weights.get(name).dtype;
      exact.add(name, same ? cast(scope, weights.get(name), 'f32') : await this.#reader.tensor(name, scope));
    }
    return exact;
  }

  /** See `AllOnCheck.flush`. */
  async flush(index: number): Promise<void> {
    await this.#check.flush(index);
  }

  async end(): Promise<{ split: Exactness; output: Exactness }> {
    using scope = new Scope(this.env.device);
    const head = new MadeWeights(await this.#reader.outer(scope, 'head'));
    // A mixture may have a head of its own where the dense model's is the embedding.
    head.add('lm_head.weight', head.get(`${this.open.model.head.name}.weight`));
    const [split, output] = await this.#check.end(head);
    return { split: split!, output: output ?? split! };
  }

  [Symbol.dispose](): void {
    this.#check[Symbol.dispose]();
  }
}
