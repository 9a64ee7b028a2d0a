import { binary, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { rowErrors, type Statistics } from './capture.js';
import { gptq, mergeRows, type Solved } from './gptq.js';
import { plainSearch, roundToNearest, valuesOf, type Coded } from './rtn.js';
import type { Recipe, Scheme, StoredScales } from './scheme.js';

export interface Solution extends Solved {
  /** Rows on which plain rounding was better and is used. */
  readonly fallbackRows: readonly boolean[];
  /** Errors of plain rounding by row. */
  readonly plain: Float32Array;
  /** tr(W H W') by row: what the errors are measured against. */
  readonly energy: Float32Array;
}

/**
 * Codes for W f32 [N, K] by the recipe. Errors are output errors under H where there are statistics, else squared
 * differences of the weights. Whatever the method, no row ends worse than with plain rounding.
 */
export async function solve(
  scope: Scope,
  w: Tensor,
  statistics: Statistics | undefined,
  scheme: Scheme,
  recipe: Recipe,
  stored: StoredScales,
): Promise<Solution> {
  using work = new Scope(w.device);
  const measure = async (difference: Tensor) =>
    statistics ? await rowErrors(difference, statistics.h) : await rowSquares(difference);
  const errorsOf = async (coded: Coded) => {
    using inner = new Scope(w.device);
    const q = valuesOf(inner, coded, scheme);
    return await measure(binary(inner, 'sub', w, q));
  };
  const energy = await measure(w);
  const rounded = roundToNearest(work, w, scheme, plainSearch, stored);
  const plain = await errorsOf(rounded);

  let chosen: Solved;
  if (recipe.method === 'gptq' && statistics) {
    chosen = await gptq(work, w, statistics, scheme, recipe, stored);
  } else {
    const coded = roundToNearest(work, w, scheme, recipe.search, stored, statistics?.diagonal);
    chosen = { ...coded, errors: await errorsOf(coded), damp: 0 };
  }
  const worse = Array.from(plain, (error, i) => error < chosen.errors[i]!);
  const best = mergeRows(work, chosen, { ...rounded, errors: plain, damp: chosen.damp });
  const keep = (x: Tensor): Tensor => (work.owns(x) ? work.move(x, scope) : x);
  return {
    ...(best.blocks && { blocks: keep(best.blocks) }),
    codes: keep(best.codes),
    grid: { ...best.grid, scale: keep(best.grid.scale), zero: best.grid.zero && keep(best.grid.zero) },
    errors: best.errors,
    damp: best.damp,
    fallbackRows: worse,
    plain,
    energy,
  };
}

async function rowSquares(x: Tensor): Promise<Float32Array> {
  using scope = new Scope(x.device);
  return await reduce(scope, 'sumsq', x, 1).float32();
}
