import type { FloatDType } from '../base/dtype.js';
import { binary, cast, fakeQuant, fill, quantize, unary, type Grid } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Parameter } from './parameters.js';

export interface RoundingOptions {
  readonly name: string;
  /** Codes before they are rounded, f32 [N, K]: offsets are added to them. */
  readonly positions: Tensor;
  readonly grid: Grid;
  /** Precisions that scales must survive, one after another. */
  readonly stored: readonly FloatDType[];
  /** Scales and zero points are as they are. */
  readonly fixedGrid: boolean;
  readonly block: number;
}

/** Bounds of what multiplies a scale. */
const clipping = { low: 0.5, high: 1.5 } as const;

/**
 * Rounding that learns (AutoRound, Cheng et al. 2023, equations 3 to 5): codes are round(w / s0 + z0 + V), V in
 * [-1/2, 1/2] an offset a weight; the scale is alpha s0, the zero point round(z0 + beta), which clip the range of a
 * group. Gradients go straight through all rounding, that of scales to what can be stored as well. Positions on the
 * grid are those of the grid at first: through w / (alpha s0) a scale would move the codes, which straight-through
 * gradients count twice, and scales that fit their codes already would be driven away.
 */
export class RoundingUnit {
  readonly parameters: readonly Parameter[];
  readonly #o: RoundingOptions;
  readonly #offset: Tensor;
  readonly #alpha: Tensor | undefined;
  readonly #beta: Tensor | undefined;
  /** Scales of 1, for rounding to codes: a row each, f32 [N, 1]. */
  readonly #ones: Tensor;

  constructor(scope: Scope, options: RoundingOptions) {
    this.#o = options;
    const { grid, positions, fixedGrid, name, block } = options;
    this.#ones = ones(scope, [positions.dim(0), 1]);
    this.#offset = scope.zeros('f32', positions.shape);
    const learned = [{ part: 'offset', value: this.#offset, rate: 1 }];
    if (!fixedGrid) {
      this.#alpha = ones(scope, grid.scale.shape);
      learned.push({ part: 'alpha', value: this.#alpha, rate: scaleRate });
      if (grid.zero) {
        this.#beta = scope.zeros('f32', grid.zero.shape);
        learned.push({ part: 'beta', value: this.#beta, rate: 1 });
      }
    }
    this.parameters = learned.map(({ part, value, rate }) => ({ name: `${name}.${part}`, value, rate, decay: false, block })); // prettier-ignore
  }

  /** The quantized weights [N, K], by recordable operations. */
  value(scope: Scope, dtype: FloatDType): Tensor {
    const { scale, zero, group } = this.#grid(scope);
    const codes = this.#whole(scope, binary(scope, 'add', this.#o.positions, this.#offset));
    const [n, k] = [codes.dim(0), codes.dim(1)];
    const groups = codes.view(n, k / group, group);
    const centred = zero ? binary(scope, 'sub', groups, zero.view(n, k / group, 1)) : groups;
    const w = binary(scope, 'mul', centred, scale.view(n, k / group, 1)).view(n, k);
    return dtype === 'f32' ? w : cast(scope, w, dtype);
  }

  /** Codes i8 [N, K] and their grid, as they are now. */
  result(scope: Scope): { codes: Tensor; grid: Grid } {
    using work = new Scope(scope.device);
    const { low, high } = this.#o.grid;
    const positions = binary(work, 'add', this.#o.positions, this.#offset);
    const codes = quantize(scope, positions, { scale: this.#ones, low, high, group: positions.dim(1) });
    return { codes, grid: this.#grid(scope) };
  }

  /** Back to where parameters are allowed; after each step. */
  project(scope: Scope): void {
    unary(scope, 'clamp', this.#offset, -0.5, 0.5, this.#offset);
    if (this.#alpha) unary(scope, 'clamp', this.#alpha, clipping.low, clipping.high, this.#alpha);
  }

  #grid(scope: Scope): Grid {
    const { grid, stored } = this.#o;
    if (!this.#alpha) return grid;
    let scale = binary(scope, 'mul', grid.scale, this.#alpha);
    for (const dtype of stored) if (dtype !== 'f32') scale = cast(scope, cast(scope, scale, dtype), 'f32');
    const zero = grid.zero && this.#beta && this.#whole(scope, binary(scope, 'add', grid.zero, this.#beta));
    return { ...grid, scale, zero };
  }

  /** Rounded to codes. */
  #whole(scope: Scope, x: Tensor): Tensor {
    const { low, high } = this.#o.grid;
    return fakeQuant(scope, x, { scale: this.#ones, low, high, group: x.dim(1) });
  }
}

/** Learning rate of what multiplies a scale, in parts of that of offsets. */
const scaleRate = 0.1;

function ones(scope: Scope, shape: readonly number[]): Tensor {
  const x = scope.empty('f32', shape);
  fill(x, 1);
  return x;
}

/** Where weights f32 [N, K] stand on a grid, in codes that are not rounded: w / s + z. */
export function positionsOf(scope: Scope, w: Tensor, { scale, zero, group }: Grid): Tensor {
  const [n, k] = [w.dim(0), w.dim(1)];
  const positions = scope.empty('f32', [n, k]);
  const groups = positions.view(n, k / group, group);
  binary(scope, 'div', w.view(n, k / group, group), scale.view(n, k / group, 1), { out: groups });
  if (zero) binary(scope, 'add', groups, zero.view(n, k / group, 1), { out: groups });
  return positions;
}

/**
 * The same, drawn into the cells of given codes i8, `margin` (in parts of a cell) away from their edges: rounding gives
 * these codes, whatever feedback chose them by.
 */
export function inCells(scope: Scope, w: Tensor, codes: Tensor, grid: Grid, margin: number): Tensor {
  const positions = positionsOf(scope, w, grid);
  using work = new Scope(scope.device);
  const centres = cast(work, codes, 'f32');
  binary(work, 'sub', positions, centres, { out: positions });
  unary(work, 'clamp', positions, margin - 0.5, 0.5 - margin, positions);
  binary(work, 'add', positions, centres, { out: positions });
  return positions;
}
