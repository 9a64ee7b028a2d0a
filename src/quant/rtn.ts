import {
  blockCodes,
  blockFormats,
  blockGrid,
  cast,
  decode,
  dequantize,
  encode,
  quantize,
  scaleSearch,
  type Grid,
} from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import { codeRange, groupWidth, type Recipe, type Scheme, type StoredScales } from './scheme.js';

/** Codes i8 [N, K] on a grid whose scales are exactly what will be stored. */
export interface Coded {
  readonly codes: Tensor;
  readonly grid: Grid;
  /** GGUF: the stored blocks u8 [N, bytes of a row] from which the grid comes. */
  readonly blocks?: Tensor;
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
  stored: StoredScales,
  energy?: Tensor,
): Pick<Coded, 'grid' | 'blocks'> {
  if (scheme.blocks !== undefined) {
    const blocks = encode(scope, w, scheme.blocks, energy);
    return { grid: blockGrid(scope, blocks, scheme.blocks), blocks };
  }
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
  return { grid: { ...grid, scale: roundScales(scope, grid.scale, stored) } };
}

/** What is left of scales once they are stored; f32 again, so that the sweep sees just these. */
export function roundScales(scope: Scope, scale: Tensor, stored: StoredScales): Tensor {
  let back = scale;
  for (const dtype of typeof stored === 'string' ? [stored] : stored) {
    if (dtype === 'f32') continue;
    const rounded = cast(scope, back, dtype);
    if (back !== scale) scope.free(back);
    back = cast(scope, rounded, 'f32');
    scope.free(rounded);
  }
  return back;
}

/** Round to nearest on the searched grid. */
export function roundToNearest(
  scope: Scope,
  w: Tensor,
  scheme: Scheme,
  search: Recipe['search'],
  stored: StoredScales,
  energy?: Tensor,
): Coded {
  const searched = searchGrid(scope, w, scheme, search, stored, energy);
  return { codes: quantize(scope, w, searched.grid), ...searched };
}

/** The weights f32 [N, K] that readers of the stored codes will see. Of blocks, the codes are put in place. */
export function valuesOf(scope: Scope, { codes, grid, blocks }: Coded, scheme: Scheme): Tensor {
  if (scheme.blocks === undefined || blocks === undefined) return dequantize(scope, codes, grid);
  blockCodes(blocks, codes, scheme.blocks);
  const columns = (blocks.dim(1) / blockFormats[scheme.blocks].bytes) * blockFormats[scheme.blocks].values;
  return decode(scope, blocks, scheme.blocks, [blocks.dim(0), columns], 'f32');
}
