import { bug } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Device } from '../backend/device.js';
import { badInput } from '../base/errors.js';
import type { LinearSpec, Weights } from '../nn/calls.js';
import { copyInto, normAdd, type PackedInt4 } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { keepRopeTables } from './context.js';
import { TensorLoader } from './load.js';
import type { OpenModel } from './open.js';
import { readPacked } from './packed.js';
import type { TensorSpec } from './types.js';

/** Weights on a device, by name; experts of one kind lie in one [E, N, K] tensor. */
class LoadedWeights implements Weights {
  readonly #tensors = new Map<string, Tensor>();
  readonly #tables = new Map<string, Int32Array>();
  readonly #packed = new Map<string, PackedInt4>();
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
  addPacked(name: string, packed: PackedInt4): void {
    this.#packed.set(name, packed);
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
  packed(name: string): PackedInt4 | undefined {
    return this.#packed.get(name);
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

interface ReadOptions {
  /** Tensors of one shape that lie in one. */
  readonly stacks?: readonly (readonly string[])[];
  /** Weights of linears that nobody takes but calls. */
  readonly called?: readonly string[];
  readonly dtype?: FloatDType;
}

/**
 * Reads a model's tensors to a device in one precision, however they are stored: plain, in blocks (GGUF), FP8 or FP4
 * with scales, or in a quantized layout (dequantized; with `packed`, linears of 4 bits whose weights are asked for by
 * calls alone stay codes where int4_matmul takes them). Several reads are in flight at once. Non-finite weights are
 * refused with the tensor's name.
 */
export class WeightReader {
  readonly #open: OpenModel;
  readonly #device: Device;
  readonly #dtype: FloatDType;
  readonly #packed: boolean;
  readonly #loader: TensorLoader;

  constructor(open: OpenModel, device: Device, dtype: FloatDType, { packed = false } = {}) {
    this.#open = open;
    this.#device = device;
    this.#dtype = dtype;
    this.#packed = packed;
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
    // Weights of experts are stacked, and where heads share latents a projection is taken apart.
    const whole = new Set([...stacks.flat(), `${block.attention.latent?.kvUp.name}.weight`]);
    const linears = block.linears.flat().filter(({ role }) => role !== 'other');
    const called = linears.map(({ name }) => `${name}.weight`).filter((name) => !whole.has(name));
    return this.#read(block.tensors, scope, { stacks, called });
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
    return this.#read(specs, scope, { called: model.tied ? [] : [`${model.head.name}.weight`] });
  }

  /** One tensor of the model by name. */
  async tensor(name: string, scope: Scope, dtype: FloatDType = this.#dtype): Promise<Tensor> {
    const spec = this.#open.spec(name);
    if (!spec) throw bug(`the model has no tensor ${name}`);
    return (await this.#read([spec], scope, { dtype })).get(name);
  }

  async #read(
    specs: readonly TensorSpec[],
    scope: Scope,
    { stacks = [], called = [], dtype = this.#dtype }: ReadOptions,
  ): Promise<LoadedWeights> {
    const weights = new LoadedWeights(scope);
    const packed = this.#packed ? await this.#readPacked(specs, called, weights, scope) : [];
    const present = specs.filter(
      (spec) => !weights.packed(spec.name) && (!spec.optional || this.#open.tensors.has(spec.name)),
    );
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
    await this.#refuseNonFinite([...jobs, ...packed]);
    for (const { name, below } of present) {
      if (below !== undefined) weights.addTable(name, await this.#table(name, below, weights.get(name)));
    }
    return weights;
  }

  /** Reads those of `called` that can be held as codes; their scales, by the linear's name. */
  async #readPacked(
    specs: readonly TensorSpec[],
    called: readonly string[],
    weights: LoadedWeights,
    scope: Scope,
  ): Promise<{ name: string; into: Tensor }[]> {
    const names = new Set(called);
    const linears = specs.flatMap(({ name, shape }) => {
      const linear = names.has(name) ? this.#open.tensors.get(name)?.linear : undefined;
      return linear ? [{ name, linear, shape: shape as readonly [number, number] }] : [];
    });
    // All end before an error is thrown: transfers under way hold memory.
    const ends = await Promise.allSettled(
      linears.map(({ linear, shape: [n, k] }) =>
        readPacked(scope, linear, (work) => (entry, dtype) => this.#loader.raw(work, entry, dtype), n, k),
      ),
    );
    return ends.flatMap((end, i) => {
      if (end.status === 'rejected') throw end.reason;
      if (!end.value) return [];
      const { name } = linears[i]!;
      weights.addPacked(name, end.value);
      return [{ name, into: end.value.scale }];
    });
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
