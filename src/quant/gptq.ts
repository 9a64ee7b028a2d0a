import { choleskyRetry, copyInto, gather, ldlq, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { diagonalOf, rowErrors, type Statistics } from './capture.js';
import { refine, residual } from './refine.js';
import { searchGrid, type Coded } from './rtn.js';
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
  const { grid, blocks } = searchGrid(work, w, scheme, recipe.search, stored, weight);
  const columnGroup = work.from('i32', [k], order.map((j) => Math.floor(j / group))); // prettier-ignore
  const swept = ldlq(work, wp, factor, { ...grid, columnGroup });
  const start = { codes: gather(work, swept.codes, back, 1), grid };
  work.free(factor, swept.codes, swept.q, swept.error);
  let best: Solved;
  if (recipe.refine.rounds > 0) {
    const problem = { w, h: statistics.h, wp, hp, columns, back, columnGroup, extra: damp * mean(statistics.energy) };
    const { before, after, coded } = await refine(work, problem, start, recipe.refine, blocks ? undefined : stored);
    best = mergeRows(work, { ...start, errors: before, damp }, { ...coded, errors: after, damp });
  } else {
    best = { ...start, errors: await rowErrors(residual(work, w, start), statistics.h), damp };
  }
  const keep = (x: Tensor): Tensor => work.move(x, scope);
  const kept = { ...best.grid, scale: keep(best.grid.scale), zero: best.grid.zero && keep(best.grid.zero) };
  return { codes: keep(best.codes), grid: kept, errors: best.errors, damp, ...(blocks && { blocks: keep(blocks) }) };
}

/** H with rows and columns in the order of `columns`. */
function permuted(scope: Scope, h: Tensor, columns: Tensor): Tensor {
  const rows = gather(scope, h, columns, 0);
  const both = gather(scope, rows, columns, 1);
  scope.free(rows);
  return both;
}

/** R_jj^2 as a row [1, K]. */
function pivots(scope: Scope, factor: Tensor): Tensor {
  const k = factor.dim(0);
  return unary(scope, 'square', diagonalOf(factor), 0, 0, scope.empty('f32', [k])).view(1, k);
}

/** Columns by falling energy (none is negative); equal ones stay in order, so that every run sweeps alike. */
export function byFallingEnergy(energy: Float32Array): Int32Array {
  // Bits of floats rise with them: numbers that sort without calling back, the column in their last 21 bits.
  const bits = new Uint32Array(energy.map((value) => value + 0).buffer);
  const keys = Float64Array.from(bits, (rank, j) => (2 ** 32 - 1 - rank) * 2 ** 21 + j).sort();
  return Int32Array.from(keys, (key) => key % 2 ** 21);
}

function inverse(order: Int32Array): Int32Array {
  const back = new Int32Array(order.length);
  order.forEach((from, to) => (back[from] = to));
  return back;
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
