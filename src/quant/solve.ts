import { binary, cast, reduce } from '../tensor/ops.js';
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

/** What decides the codes of one stack of linears. */
interface Task {
  /** f32 [N, K]. */
  readonly w: Tensor;
  readonly statistics: Statistics | undefined;
  readonly scheme: Scheme;
  readonly stored: StoredScales;
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
  const task = { w, statistics, scheme, stored };
  if (recipe.method === 'gptq' && statistics) {
    return await noWorseThanRounding(scope, task, await gptq(work, w, statistics, scheme, recipe, stored));
  }
  const coded = roundToNearest(work, w, scheme, recipe.search, stored, statistics?.diagonal);
  return await noWorseThanRounding(scope, task, coded);
}

/** Codes that a method has chosen, but for the rows on which plain rounding is better. */
export async function noWorseThanRounding(
  scope: Scope,
  task: Task,
  chosen: Coded & Partial<Solved>,
): Promise<Solution> {
  const { w, statistics, scheme, stored } = task;
  using work = new Scope(w.device);
  const measure = async (difference: Tensor) =>
    statistics ? await rowErrors(difference, statistics.h) : await rowSquares(difference);
  const errorsOf = async (coded: Coded) => {
    using inner = new Scope(w.device);
    return await measure(binary(inner, 'sub', w, valuesOf(inner, coded, scheme)));
  };
  const energy = statistics ? await rowErrors(w, statistics.h, true) : await rowSquares(w);
  const rounded = roundToNearest(work, w, scheme, plainSearch, stored);
  const plain = await errorsOf(rounded);
  const [errors, damp] = [chosen.errors ?? (await errorsOf(chosen)), chosen.damp ?? 0];
  const worse = Array.from(plain, (error, i) => error < errors[i]!);
  const best = mergeRows(work, { ...chosen, errors, damp }, { ...rounded, errors: plain, damp });
  const keep = <T extends Tensor | undefined>(x: T): T => (x && (work.owns(x) ? work.move(x, scope) : cast(scope, x, x.dtype))) as T; // prettier-ignore
  return {
    ...(best.blocks && { blocks: keep(best.blocks) }),
    codes: keep(best.codes),
    grid: { ...best.grid, scale: keep(best.grid.scale), zero: keep(best.grid.zero) },
    errors: best.errors,
    damp,
    fallbackRows: worse,
    plain,
    energy,
  };
}

async function rowSquares(x: Tensor): Promise<Float32Array> {
  using scope = new Scope(x.device);
  return await reduce(scope, 'sumsq', x, 1).float32();
}
