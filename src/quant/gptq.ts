import {
  binary,
  choleskyRetry,
  codeDescent,
  copyInto,
  dequantize,
  gather,
  ldlq,
  scaleRefit,
  unary,
  type Grid,
} from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import { rowErrors, type Statistics } from './capture.js';
import { roundScales, searchGrid, type Coded } from './rtn.js';
import { groupWidth, type Recipe, type Scheme, type StoredScales } from './scheme.js';

export interface Solved extends Coded {
  /** tr((W - Q) H (W - Q)') by row, under the undamped H. */
  readonly errors: Float32Array;
  /** The damping that gave a positive definite matrix. */
  readonly damp: number;
}

/**
 * GPTQ (Frantar et al. 2023) in its LDLQ form (Chee et al. 2023): with H + damp mean(diag H) I = R R', R upper
 * triangular, column j is rounded after the errors of columns i < j are fed back with weights R_ij / R_jj. Columns come
 * in the order of falling activation energy while groups stay where they are ("static act-order"). Grids are fixed
 * beforehand by a search weighted with R_jj^2, which is what an error in column j costs once the columns behind it have
 * made up for it. Then least-squares scales under the damped H and coordinate descent over the codes take turns.
 *
 * W f32 [N, K]; linears that share an input are stacked along N. Results live in `scope`, columns in W's own order.
 * Errors: `resource` where no damping makes H positive definite.
 */
export async function gptq(
  scope: Scope,
  w: Tensor,
  statistics: Statistics,
  scheme: Scheme,
  recipe: Recipe,
  stored: StoredScales,
): Promise<Solved> {
  const k = w.dim(1);
  const group = groupWidth(scheme, k);
  using work = new Scope(w.device);
  const natural = Int32Array.from({ length: k }, (_, j) => j);
  const order = recipe.order ? byFallingEnergy(statistics.energy) : natural;
  const columns = work.from('i32', [k], order);
  const back = work.from('i32', [k], inverse(order));
  const wp = gather(work, w, columns, 1);
  const hp = permuted(work, statistics.h, columns);
  const { factor, damp } = await choleskyRetry(work, hp, recipe.damp, true);

  const weight = gather(work, pivots(work, factor), back, 1).view(k);
  const { grid: searched, blocks } = searchGrid(work, w, scheme, recipe.search, stored, weight);
  const columnGroup = work.from('i32', [k], order.map((j) => Math.floor(j / group))); // prettier-ignore
  const swept = ldlq(work, wp, factor, { ...searched, columnGroup });
  work.free(factor, swept.error);
  const start = { codes: swept.codes, grid: { ...searched, columnGroup } };
  const fixed = blocks !== undefined;
  const errorsOf = async (coded: Coded, q: Tensor): Promise<Solved> => {
    const d = binary(work, 'sub', wp, q, { out: q });
    const errors = await rowErrors(d, hp);
    work.free(d);
    return { ...coded, errors, damp };
  };
  let best = await errorsOf(start, swept.q);
  if (recipe.refine.rounds > 0) {
    const refined = refine(
      work,
      wp,
      hp,
      start,
      damp * mean(statistics.energy),
      recipe.refine,
      fixed ? undefined : stored,
    );
    best = mergeRows(work, best, await errorsOf(refined, dequantize(work, refined.codes, refined.grid)));
  }
  const { codes, grid } = best;
  const own: Grid = { ...searched, scale: copyTo(scope, grid.scale), zero: grid.zero && copyTo(scope, grid.zero) };
  const kept = blocks && { blocks: work.move(blocks, scope) };
  return { codes: gather(scope, codes, back, 1), grid: own, errors: best.errors, damp, ...kept };
}

/** H with rows and columns in the order of `columns`. */
function permuted(scope: Scope, h: Tensor, columns: Tensor): Tensor {
  const rows = gather(scope, h, columns, 0);
  const both = gather(scope, rows, columns, 1);
  scope.free(rows);
  return both;
}

const diagonalOf = (x: Tensor): Tensor => new Tensor(x.storage, x.byteOffset, x.dtype, [x.dim(0)], [x.dim(0) + 1]);

/** R_jj^2 as a row [1, K]. */
function pivots(scope: Scope, factor: Tensor): Tensor {
  const k = factor.dim(0);
  return unary(scope, 'square', diagonalOf(factor), 0, 0, scope.empty('f32', [k])).view(1, k);
}

function copyTo(scope: Scope, x: Tensor): Tensor {
  const y = scope.empty(x.dtype, x.shape);
  copyInto(y, x);
  return y;
}

/** Columns by falling energy; equal ones stay in order, so that every run sweeps alike. */
export function byFallingEnergy(energy: Float32Array): Int32Array {
  return Int32Array.from(energy.keys()).sort((a, b) => energy[b]! - energy[a]! || a - b);
}

function inverse(order: Int32Array): Int32Array {
  const back = new Int32Array(order.length);
  order.forEach((from, to) => (back[from] = to));
  return back;
}

/**
 * Scale refit and code descent in turn under H + extra I, from a sweep's codes; descent alone where scales are fixed
 * (`stored` undefined). Nothing of `start` is changed.
 */
function refine(
  scope: Scope,
  w: Tensor,
  h: Tensor,
  start: Coded,
  extra: number,
  { rounds, passes }: Recipe['refine'],
  stored: StoredScales | undefined,
): Coded {
  const damped = copyTo(scope, h);
  unary(scope, 'affine', diagonalOf(damped), 1, extra, diagonalOf(damped));
  const codes = copyTo(scope, start.codes);
  let grid = start.grid;
  if (stored === undefined) scope.free(codeDescent(scope, codes, w, damped, grid, rounds * passes));
  for (let round = 0; stored !== undefined && round < rounds; round++) {
    const refitted = scaleRefit(scope, codes, w, damped, grid);
    const scale = roundScales(scope, refitted, stored);
    if (scale !== refitted) scope.free(refitted);
    if (grid !== start.grid) scope.free(grid.scale);
    grid = { ...grid, scale };
    scope.free(codeDescent(scope, codes, w, damped, grid, passes));
  }
  scope.free(damped);
  return { codes, grid };
}

export const total = (values: Float32Array): number => values.reduce((sum, value) => sum + value, 0);
const mean = (values: Float32Array): number => total(values) / values.length;

/** Row by row the one with the smaller error. */
export function mergeRows(scope: Scope, a: Solved, b: Solved): Solved {
  const n = a.errors.length;
  const takeB = Array.from(a.errors, (error, i) => b.errors[i]! < error);
  if (!takeB.includes(true)) return a;
  using work = new Scope(a.codes.device);
  const pick = work.from(
    'i32',
    [n],
    Int32Array.from(takeB, (b, i) => (b ? n + i : i)),
  );
  const choose = (x: Tensor, y: Tensor): Tensor => {
    const both = work.empty(x.dtype, [2 * n, x.dim(1)]);
    copyInto(both.slice(0, 0, n), x);
    copyInto(both.slice(0, n, 2 * n), y);
    return gather(scope, both, pick, 0);
  };
  const zero = a.grid.zero && b.grid.zero && { zero: choose(a.grid.zero, b.grid.zero) };
  const blocks = a.blocks && b.blocks && { blocks: choose(a.blocks, b.blocks) };
  return {
    codes: choose(a.codes, b.codes),
    grid: { ...a.grid, scale: choose(a.grid.scale, b.grid.scale), ...zero },
    errors: a.errors.map((error, i) => Math.min(error, takeB[i] ? b.errors[i]! : error)),
    damp: a.damp,
    ...blocks,
  };
}
