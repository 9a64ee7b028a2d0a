import { bug } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Device } from '../backend/device.js';
import { badInput } from '../base/errors.js';
import type { LinearSpec, Weights } from '../nn/calls.js';
import { copyInto, normAdd } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { keepRopeTables } from './context.js';
import { TensorLoader } from './load.js';
import type { OpenModel } from './open.js';
import type { TensorSpec } from './types.js';

/** Weights on a device, by name; experts of one kind lie in one [E, N, K] tensor. */
class LoadedWeights implements Weights {
  readonly #tensors = new Map<string, Tensor>();
  readonly #tables = new Map<string, Int32Array>();
  readonly #stacks = new Map<string, { names: readonly string[]; tensor: Tensor }>();

  constructor(scope: Scope) {
    keepRopeTables(this, scope);
  }
  add(name: string, tensor: Tensor): void {
    this.#tensors.set(name, tensor);
  }
  addTable(name: string, table: Int32Array): void {
    this.#tables.set(name, table);
  }
  addStack(names: readonly string[], tensor: Tensor): void {
    this.#stacks.set(names[0]!, { names, tensor });
    names.forEach((name, e) => this.#tensors.set(name, tensor.at(e)));
  }

  get(name: string): Tensor {
    const tensor = this.#tensors.get(name);
    if (!tensor) throw bug(`weight ${name} was not loaded`);
    return tensor;
  }
  has(name: string): boolean {
    return this.#tensors.has(name);
  }
  stack(linears: readonly LinearSpec[]): Tensor {
    const stack = this.#stacks.get(`${linears[0]?.name}.weight`);
    if (
      !stack ||
      stack.names.length !== linears.length ||
      stack.names.some((n, e) => n !== `${linears[e]!.name}.weight`)
    ) {
      throw bug(`weights of ${linears.length} experts from ${linears[0]?.name} on were not loaded as one`);
    }
    return stack.tensor;
  }
  table(name: string): Int32Array {
    const table = this.#tables.get(name);
    if (!table) throw bug(`table ${name} was not loaded`);
    return table;
  }
  /** Copies `weight` over what is there (converting), so that stacks and views of it see the new values. */
  set(name: string, weight: Tensor): void {
    copyInto(this.get(name), weight);
  }
}

/**
 * Reads a model's tensors to a device in one precision, however they are stored: plain, in blocks (GGUF), FP8 or FP4
 * with scales, or in a quantized layout (dequantized). Several reads are in flight at once. Non-finite weights are
 * refused with the tensor's name.
 */
export class WeightReader {
  readonly #open: OpenModel;
  readonly #device: Device;
  readonly #dtype: FloatDType;
  readonly #loader: TensorLoader;

  constructor(open: OpenModel, device: Device, dtype: FloatDType) {
    this.#open = open;
    this.#device = device;
    this.#dtype = dtype;
    this.#loader = new TensorLoader(open, device);
  }

  get dtype(): FloatDType {
    return this.#dtype;
  }

  /** All tensors of block `i` of the model. */
  async block(i: number, scope: Scope): Promise<Weights> {
    const block = this.#open.model.blocks[i];
    if (!block) throw bug(`no block ${i}`);
    const { expertLinears } = block.moe ?? {};
    const stacks = expertLinears
      ? (['gate', 'up', 'down'] as const).map((part) => expertLinears.map((e) => `${e[part].name}.weight`))
      : [];
    return this.#read(block.tensors, scope, stacks);
  }

  /** The tensors outside the blocks: all, or only the embedding, or only what `logits` needs. */
  async outer(scope: Scope, part: 'all' | 'embedding' | 'head' = 'all'): Promise<Weights> {
    const { model } = this.#open;
    const embedding = (spec: TensorSpec) => spec.name === model.embedding;
    const head = (spec: TensorSpec) => !embedding(spec) || model.tied;
    const specs = model.outer.filter(
      // A tied head is the embedding: its second copy is not needed.
      (spec) => !(spec.optional && model.tied) && (part === 'all' || (part === 'embedding' ? embedding : head)(spec)),
    );
    return this.#read(specs, scope, []);
  }

  /** One tensor of the model by name. */
  async tensor(name: string, scope: Scope, dtype: FloatDType = this.#dtype): Promise<Tensor> {
    const spec = this.#open.spec(name);
    if (!spec) throw bug(`the model has no tensor ${name}`);
    return (await this.#read([spec], scope, [], dtype)).get(name);
  }

  async #read(
    specs: readonly TensorSpec[],
    scope: Scope,
    stacks: readonly (readonly string[])[],
    dtype: FloatDType = this.#dtype,
  ): Promise<LoadedWeights> {
    const weights = new LoadedWeights(scope);
    const present = specs.filter((spec) => !spec.optional || this.#open.tensors.has(spec.name));
    const byName = new Map(present.map((spec) => [spec.name, spec]));
    for (const names of stacks) {
      weights.addStack(names, scope.empty(dtype, [names.length, ...byName.get(names[0]!)!.shape]));
    }
    const jobs = present.map((spec) => {
      const precise = spec.f32 === true || spec.below !== undefined;
      if (!weights.has(spec.name)) weights.add(spec.name, scope.empty(precise ? 'f32' : dtype, spec.shape));
      return { name: spec.name, into: weights.get(spec.name), integers: spec.below !== undefined };
    });
    await this.#loader.load(jobs);
    await this.#refuseNonFinite(jobs);
    for (const { name, below } of present) {
      if (below !== undefined) weights.addTable(name, await this.#table(name, below, weights.get(name)));
    }
    return weights;
  }

  async #table(name: string, below: number, values: Tensor): Promise<Int32Array> {
    const floats = await values.float32();
    const odd = floats.find((value) => !Number.isInteger(value) || value < 0 || value >= below);
    if (odd === undefined) return Int32Array.from(floats);
    throw badInput('A table has an entry that points nowhere', {
      where: `${this.#open.tensors.get(name)?.files[0] ?? this.#open.checkpoint.path}, tensor ${name}`,
      got: String(odd),
      expected: `0 to ${below - 1}`,
      hint: 'config.json and weights do not belong together, or the checkpoint is damaged.',
    });
  }

  async #refuseNonFinite(jobs: readonly { name: string; into: Tensor }[]): Promise<void> {
    using scope = new Scope(this.#device);
    const norms = scope.zeros('f32', [jobs.length, 2]);
    jobs.forEach(({ into }, i) => normAdd(norms.at(i), into));
    const counts = await norms.float32();
    const bad = jobs.flatMap(({ name }, i) => (counts[2 * i + 1]! > 0 ? [{ name, count: counts[2 * i + 1]! }] : []));
    const worst = bad[0];
    if (!worst) return;
    throw badInput(
      `Weights are not finite: tensor ${worst.name}${bad.length > 1 ? ` and ${bad.length - 1} more` : ''}`,
      {
        where: this.#open.tensors.get(worst.name)?.files[0] ?? this.#open.checkpoint.path,
        got: `${worst.count} values that are infinite or not a number`,
        expected: 'finite weights',
        hint: 'The checkpoint is damaged or its training diverged: no output made from it would work.',
      },
    );
  }
}
