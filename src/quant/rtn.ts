import type { FloatDType } from '../base/dtype.js';
import { cast, dequantize, quantize, scaleSearch, type Grid } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import { codeRange, groupWidth, type Recipe, type Scheme } from './scheme.js';

/** Codes i8 [N, K] on a grid whose scales are exactly what will be stored. */
export interface Coded {
  readonly codes: Tensor;
  readonly grid: Grid;
}

/** The plain grid: the largest weight of a group at the end of the range, nothing searched. */
export const plainSearch: Recipe['search'] = { points: 1, from: 1, to: 1, freeSign: false };

/**
 * The grid of W f32 [N, K] that minimises the squared rounding error, each column weighted by its activation energy
 * where that is known (f32 [K]); scales rounded to the precision in which they are stored.
 */
export function searchGrid(
  scope: Scope,
  w: Tensor,
  scheme: Scheme,
  search: Recipe['search'],
  stored: FloatDType,
  energy?: Tensor,
): Grid {
  const grid = scaleSearch(scope, w, {
    ...codeRange(scheme.bits),
    group: groupWidth(scheme, w.dim(-1)),
    asymmetric: !scheme.symmetric,
    points: search.points,
    from: search.from,
    to: search.to,
    freeSign: search.freeSign,
    ...(energy && { weight: energy }),
  });
  return { ...grid, scale: roundScales(scope, grid.scale, stored) };
}

/** What is left of scales once they are stored; f32 again, so that the sweep sees just these. */
export function roundScales(scope: Scope, scale: Tensor, stored: FloatDType): Tensor {
  if (stored === 'f32') return scale;
  const rounded = cast(scope, scale, stored);
  const back = cast(scope, rounded, 'f32');
  scope.free(rounded);
  return back;
}

/** Round to nearest on the searched grid. */
export function roundToNearest(
  scope: Scope,
  w: Tensor,
  scheme: Scheme,
  search: Recipe['search'],
  stored: FloatDType,
  energy?: Tensor,
): Coded {
  const grid = searchGrid(scope, w, scheme, search, stored, energy);
  return { codes: quantize(scope, w, grid), grid };
}

/** The weights that codes stand for, f32 [N, K]. */
export const valuesOf = (scope: Scope, { codes, grid }: Coded): Tensor => dequantize(scope, codes, grid);
