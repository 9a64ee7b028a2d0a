import { bug } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { LinearSpec, Weights } from '../nn/calls.js';
import {
  binary,
  cast,
  copyInto,
  dequantize,
  fakeQuant,
  fill,
  gemm,
  quantize,
  random,
  type Grid,
} from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Parameter } from './parameters.js';

/** What of a quantized linear learns. */
export type Learned =
  /** Weights (straight through their rounding), scales, and zero points where there are any. */
  | { readonly kind: 'full' }
  /** Scales alone; codes are fixed. */
  | { readonly kind: 'scales' }
  /** A low-rank addition to the weights, and scales (Hu et al. 2022). */
  | { readonly kind: 'lora'; readonly rank: number; readonly seed: number };

/** Codes on their grid, of one linear or of the same linear of all experts on top of each other. */
export interface Codes {
  /** Tensor names (`X.weight`) in the order of rows, all with the same number of rows. */
  readonly names: readonly string[];
  /** i8 [names x N, K]. */
  readonly codes: Tensor;
  /** Scales and zero points f32 [names x N, G]. */
  readonly grid: Grid;
  /** Precision in which scales are stored. */
  readonly stored: FloatDType;
  /** Routed experts: asked for as one stack. */
  readonly stacked: boolean;
}

/** Learning rates of the kinds of parameters, relative to that of a weight. */
export interface Rates {
  /** Of a weight, in parts of its mean scale (its rounding cell). */
  readonly weights: number;
  /** Of a scale, in parts of the mean scale. */
  readonly scales: number;
  readonly lora: number;
}

/** A quantized linear that learns: parameters, and the weights that they stand for, exactly as they will be stored. */
export class QuantizedUnit {
  readonly #codes: Codes;
  readonly #learned: Learned;
  readonly #scale: Tensor;
  readonly #zero: Tensor | undefined;
  readonly #latent: Tensor | undefined;
  readonly #low: { readonly a: Tensor; readonly b: Tensor } | undefined;
  readonly parameters: readonly Parameter[];

  private constructor(
    codes: Codes,
    learned: Learned,
    tensors: { scale: Tensor; zero?: Tensor | undefined; latent?: Tensor; low?: { a: Tensor; b: Tensor } },
    parameters: readonly Parameter[],
  ) {
    [this.#codes, this.#learned, this.parameters] = [codes, learned, parameters];
    [this.#scale, this.#zero, this.#latent, this.#low] = [tensors.scale, tensors.zero, tensors.latent, tensors.low];
  }

  /** Weights begin at the centres of their cells; `codes` is used up (its tensors may be freed but for `scales`). */
  static async make(
    scope: Scope,
    codes: Codes,
    learned: Learned,
    rates: Rates,
    block: number,
    unit: number,
  ): Promise<QuantizedUnit> {
    const { grid } = codes;
    const name = codes.names[0]!.replace(/\.weight$/, '');
    const scale = copyOf(scope, grid.scale);
    const cell = await meanAbsolute(scale);
    const of = (part: string, value: Tensor, rate: number): Parameter => ({ name: `${name}.${part}`, value, rate, decay: false, block }); // prettier-ignore
    const scales = of('scale', scale, rates.scales * cell);
    if (learned.kind === 'scales') return new QuantizedUnit(codes, learned, { scale }, [scales]);
    const latent = dequantize(scope, codes.codes, grid);
    if (learned.kind === 'full') {
      const weights = of('weight', latent, rates.weights * cell);
      const zero = grid.zero && copyOf(scope, grid.zero);
      const zeros = zero ? [of('zero', zero, rates.weights)] : []; // in cells as they are
      return new QuantizedUnit(codes, learned, { scale, zero, latent }, [weights, scales, ...zeros]);
    }
    const [rows, columns] = [latent.dim(0), latent.dim(1)];
    const rank = Math.min(learned.rank, rows, columns);
    // The addition begins at zero: one factor random, the other none. A step moves it by about the rate times a cell.
    const a = scope.empty('f32', [rank, columns]);
    random(a, 'normal', learned.seed + 4096 * (block + 1) + unit, 0, columns ** -0.5);
    const b = scope.zeros('f32', [rows, rank]);
    const low = [
      of('lora_A', a, rates.lora * columns ** -0.5),
      of('lora_B', b, rates.lora * cell * (columns / rank) ** 0.5),
    ];
    return new QuantizedUnit(codes, learned, { scale, latent, low: { a, b } }, [...low, scales]);
  }

  get names(): readonly string[] {
    return this.#codes.names;
  }
  get stacked(): boolean {
    return this.#codes.stacked;
  }

  /** Scales as they are stored, straight through the rounding. */
  #storedScale(scope: Scope): Tensor {
    const { stored } = this.#codes;
    return stored === 'f32' ? this.#scale : cast(scope, cast(scope, this.#scale, stored), 'f32');
  }

  /** Scales and zero points as they are stored. */
  #grid(scope: Scope): Grid {
    const { grid } = this.#codes;
    const scale = this.#storedScale(scope);
    if (!this.#zero) return { ...grid, scale };
    const ones = scope.empty('f32', this.#zero.shape);
    fill(ones, 1);
    const { low, high } = grid;
    return { ...grid, scale, zero: fakeQuant(scope, this.#zero, { scale: ones, low, high, group: 1 }) };
  }

  #weights(scope: Scope): Tensor {
    if (!this.#latent) throw bug('weights of a linear whose codes are fixed');
    if (!this.#low) return this.#latent;
    return binary(scope, 'add', this.#latent, gemm(scope, this.#low.b, this.#low.a));
  }

  /** The quantized weights [rows, K], by recordable operations. */
  value(scope: Scope, dtype: FloatDType): Tensor {
    const grid = this.#grid(scope);
    if (this.#learned.kind === 'scales') return dequantize(scope, this.#codes.codes, grid, dtype);
    return fakeQuant(scope, this.#weights(scope), grid, dtype);
  }

  /** What has been learned, as it is to be stored. */
  result(scope: Scope): Codes {
    using work = new Scope(scope.device);
    const { zero, ...now } = this.#grid(work);
    const grid = { ...now, scale: copyOf(scope, now.scale), ...(zero && { zero: copyOf(scope, zero) }) };
    if (this.#learned.kind === 'scales') return { ...this.#codes, grid };
    return { ...this.#codes, codes: quantize(scope, this.#weights(work), grid), grid };
  }
}

/** A plain tensor that learns. */
export interface PlainUnit {
  readonly names: readonly string[];
  readonly stacked: boolean;
  readonly parameter: Parameter;
}

/** Weights of a block, or outside the blocks, some of which learn. */
export interface Learning {
  readonly parameters: readonly Parameter[];
  /** The weights as they are now; to be called within the recorded pass. */
  now(scope: Scope): Weights;
}

/** The weights of a block (or outside the blocks) that learn; what does not is looked up in `rest`. */
export class LearningWeights implements Learning {
  readonly parameters: readonly Parameter[];

  constructor(
    readonly quantized: readonly QuantizedUnit[],
    readonly plain: readonly PlainUnit[],
    readonly rest: Weights | undefined,
    readonly dtype: FloatDType,
  ) {
    this.parameters = [...quantized.flatMap((unit) => unit.parameters), ...plain.map(({ parameter }) => parameter)];
  }

  now(scope: Scope): Weights {
    const values = new Overlay(this.rest);
    for (const unit of this.quantized) values.put(unit, unit.value(scope, this.dtype));
    for (const unit of this.plain) {
      const { value } = unit.parameter;
      values.put(unit, this.dtype === 'f32' ? value : cast(scope, value, this.dtype));
    }
    return values;
  }
}

/** Weights by name, some of them over others. */
export class Overlay implements Weights {
  readonly #values = new Map<string, Tensor>();
  readonly #stacks = new Map<string, Tensor>();
  readonly #rest: Weights | undefined;

  constructor(rest?: Weights) {
    this.#rest = rest;
  }

  put({ names, stacked }: { names: readonly string[]; stacked: boolean }, value: Tensor): void {
    if (!stacked) {
      this.#values.set(names[0]!, value);
      return;
    }
    const all = value.view(names.length, -1, value.dim(-1));
    this.#stacks.set(names[0]!, all);
    names.forEach((name, e) => this.#values.set(name, all.at(e)));
  }
  get(name: string): Tensor {
    const value = this.#values.get(name) ?? this.#rest?.get(name);
    if (!value) throw bug(`weight ${name} is not there`);
    return value;
  }
  has(name: string): boolean {
    return this.#values.has(name) || (this.#rest?.has(name) ?? false);
  }
  table(name: string): Int32Array {
    if (!this.#rest) throw bug(`table ${name} is not there`);
    return this.#rest.table(name);
  }
  stack(linears: readonly LinearSpec[]): Tensor {
    const stack = this.#stacks.get(`${linears[0]?.name}.weight`) ?? this.#rest?.stack(linears);
    if (!stack) throw bug(`experts from ${linears[0]?.name} on are not there as one`);
    return stack;
  }
  set(): never {
    throw bug('weights that learn are not set');
  }
}

const copyOf = (scope: Scope, x: Tensor): Tensor => {
  const y = scope.empty(x.dtype, x.shape);
  copyInto(y, x);
  return y;
};

async function meanAbsolute(x: Tensor): Promise<number> {
  const values = await x.float32();
  return values.reduce((sum, value) => sum + Math.abs(value), 0) / values.length;
}
