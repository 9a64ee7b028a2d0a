import { badInput } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Device } from '../backend/device.js';
import { TensorLoader } from '../arch/load.js';
import type { OpenModel } from '../arch/open.js';
import type { StoredWeight } from '../arch/stored.js';
import type { Block, TensorSpec } from '../arch/types.js';
import { WeightReader } from '../arch/weights.js';
import { cast, copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import {
  LearningWeights,
  Overlay,
  QuantizedUnit,
  type Codes,
  type Learned,
  type PlainUnit,
  type Rates,
} from '../tune/weights.js';

/** Linears of a block that are trained as one: alone, or the same part of all experts. */
interface Group {
  readonly linears: readonly StoredWeight[];
  readonly rows: number;
  readonly columns: number;
  readonly stacked: boolean;
}

/** The quantized linears of a block of `open`. */
function quantizedGroups(open: OpenModel, block: Block): Group[] {
  const stored = (name: string): StoredWeight | undefined => {
    const weight = open.tensors.get(`${name}.weight`);
    return weight?.linear ? weight : undefined;
  };
  const groups: Group[] = [];
  const experts = block.moe?.expertLinears ?? [];
  const expertNames = new Set(experts.flatMap(({ gate, up, down }) => [gate.name, up.name, down.name]));
  for (const { name, outFeatures: rows, inFeatures: columns } of block.linears.flat()) {
    const weight = expertNames.has(name) ? undefined : stored(name);
    if (weight) groups.push({ linears: [weight], rows, columns, stacked: false });
  }
  for (const part of ['gate', 'up', 'down'] as const) {
    const linears = experts.map((expert) => stored(expert[part].name)).filter((weight) => weight !== undefined);
    const first = experts[0]?.[part];
    if (!first || linears.length === 0) continue;
    if (linears.length !== experts.length) {
      throw badInput('Some experts of a layer are quantized and others are not', { where: `${block.name}, ${part}` });
    }
    groups.push({ linears, rows: first.outFeatures, columns: first.inFeatures, stacked: true });
  }
  return groups;
}

/** A tensor f32 that learns in full precision; `stacked`: of experts, one under another. */
export const learning = (
  names: readonly string[],
  value: Tensor,
  block: number | undefined,
  stacked = false,
): PlainUnit => ({
  names,
  stacked,
  parameter: {
    name: names[0]!,
    value,
    rate: 1,
    decay: value.shape.length > 1 && value.dim(0) > 1,
    block: block ?? -1,
  },
});

/** What of a block of a quantized checkpoint is there in what precision. */
export class StudentReader {
  readonly #loader: TensorLoader;
  readonly #reader: WeightReader;

  constructor(
    readonly open: OpenModel,
    readonly device: Device,
    readonly dtype: FloatDType,
  ) {
    this.#loader = new TensorLoader(open, device);
    this.#reader = new WeightReader(open, device, dtype);
  }

  /** Codes and scales of a block's quantized linears, as they are stored. */
  async codes(block: Block, scope: Scope): Promise<Codes[]> {
    const all: Codes[] = [];
    for (const { linears, rows, columns, stacked } of quantizedGroups(this.open, block)) {
      const codes = scope.empty('i8', [linears.length * rows, columns]);
      let grid: Codes['grid'] | undefined;
      for (const [e, { linear, name }] of linears.entries()) {
        using work = new Scope(this.device);
        const read = await linear!.read(work, (entry, dtype) => this.#loader.raw(work, entry, dtype), rows, columns);
        if (read.grid.columnGroup) {
          throw badInput('Groups that are no runs of neighbouring columns cannot be trained', {
            where: `${this.open.checkpoint.path}, ${name}`,
            hint: 'Start from a model that was quantized with static activation order.',
          });
        }
        const [from, to] = [e * rows, (e + 1) * rows];
        copyInto(codes.slice(0, from, to), read.codes);
        const { scale, zero } = read.grid;
        grid ??= {
          ...read.grid,
          scale: scope.empty('f32', [codes.dim(0), scale.dim(1)]),
          ...(zero && { zero: scope.empty('f32', [codes.dim(0), zero.dim(1)]) }),
        };
        copyInto(grid.scale.slice(0, from, to), scale);
        if (zero) copyInto(grid.zero!.slice(0, from, to), zero);
      }
      const scaleEntry = linears[0]!.linear!.parts.get('weight_scale');
      if (scaleEntry?.encoding.kind !== 'plain') {
        throw badInput('Training starts from the compressed-tensors layout', {
          where: this.open.checkpoint.path,
          got: this.open.layout?.description ?? 'another one',
          hint: 'Make one: deepseek-convert quantize --format compressed-tensors.',
        });
      }
      const stored = scaleEntry.encoding.dtype as FloatDType;
      all.push({ names: linears.map(({ name }) => name), codes, grid: grid!, stored, stacked });
    }
    return all;
  }

  /** A block whose quantized linears learn; everything else stays as it is. */
  async quantized(
    block: Block,
    scope: Scope,
    learned: Learned,
    rates: Rates,
    codes: readonly Codes[],
  ): Promise<LearningWeights> {
    // prettier-ignore
    const units: QuantizedUnit[] = [];
    for (const [i, one] of codes.entries()) {
      units.push(await QuantizedUnit.make(scope, one, learned, rates, block.index, i));
    }
    const ours = new Set(units.flatMap(({ names }) => names));
    return new LearningWeights(units, [], await this.#rest(block.tensors, scope, ours), this.dtype);
  }

  /** The block with its codes as they are. */
  async fixed(specs: readonly TensorSpec[], scope: Scope): Promise<LearningWeights> {
    return new LearningWeights([], [], await this.#rest(specs, scope, new Set()), this.dtype);
  }

  /** A block, or what is outside the blocks, all of whose weights learn in full precision. */
  async plain(block: Block | undefined, scope: Scope): Promise<LearningWeights> {
    const { model } = this.open;
    const specs = (block?.tensors ?? model.outer).filter(({ name, optional }) => !optional || (!model.tied && this.open.tensors.has(name))); // prettier-ignore
    const experts = block?.moe?.expertLinears ?? [];
    const units: PlainUnit[] = [];
    const stacked = new Set<string>();
    const unit = (names: readonly string[], value: Tensor, many: boolean): PlainUnit =>
      learning(names, value, block?.index, many);
    for (const part of ['gate', 'up', 'down'] as const) {
      const names = experts.map((expert) => `${expert[part].name}.weight`);
      if (names.length === 0) continue;
      const { outFeatures: n, inFeatures: k } = experts[0]![part];
      const all = scope.empty('f32', [names.length * n, k]);
      for (const [e, name] of names.entries()) {
        using work = new Scope(this.device);
        copyInto(all.slice(0, e * n, (e + 1) * n), await this.#reader.tensor(name, work, 'f32'));
        stacked.add(name);
      }
      units.push(unit(names, all, true));
    }
    const rest = new Overlay();
    for (const spec of specs) {
      if (stacked.has(spec.name)) continue;
      const value = await this.#reader.tensor(spec.name, scope, 'f32');
      // A selection bias steers the choice alone: it has no gradient.
      if (spec.f32) rest.put({ names: [spec.name], stacked: false }, value);
      else units.push(unit([spec.name], value, false));
    }
    return new LearningWeights([], units, rest, this.dtype);
  }

  async #rest(specs: readonly TensorSpec[], scope: Scope, but: ReadonlySet<string>): Promise<Overlay> {
    const rest = new Overlay();
    for (const spec of specs) {
      if (but.has(spec.name) || !this.open.tensors.has(spec.name)) continue;
      if (spec.optional && this.open.model.tied) continue;
      rest.put(
        { names: [spec.name], stacked: false },
        await this.#reader.tensor(spec.name, scope, spec.f32 ? 'f32' : this.dtype),
      );
    }
    return rest;
  }
}

/** Copies of codes and scales in `scope`, without what else they hold. */
export function keepCodes(scope: Scope, codes: Codes): Codes {
  const own = <T extends Tensor | undefined>(x: T): T => (x ? (cast(scope, x, x.dtype) as T) : x);
  const { grid } = codes;
  return { ...codes, codes: own(codes.codes), grid: { ...grid, scale: own(grid.scale), zero: own(grid.zero) } };
}
