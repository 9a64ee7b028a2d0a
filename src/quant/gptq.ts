import type { FloatDType } from '../base/dtype.js';
import {
  binary,
  choleskyRetry,
  codeDescent,
  copyInto,
  dequantize,
  gather,
  ldlq,
  scaleRefit,
  type Grid,
} from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { rowErrors, type Statistics } from './capture.js';
import { roundScales, searchGrid, type Coded } from './rtn.js';
import { groupWidth, type Recipe, type Scheme } from './scheme.js';

export interface Solved extends Coded {
  /** tr((W - Q) H (W - Q)') by row, under the undamped H. */
  readonly errors: Float32Array;
  /** The damping that gave a positive definite matrix. */
  readonly damp: number;
}

/**
 * GPTQ (Frantar et al. 2023) in its LDLQ form (Chee et al. 2023): with H + damp mean(diag H) I = R R', R upper
 * triangular, column j is rounded after the errors of columns i < j are fed back with weights R_ij / R_jj. Columns come
 * in the order of falling activation energy while groups stay where they are ("static act-order"), on grids that are
 * fixed beforehand by a search weighted with that energy; then least-squares scales under the full H and coordinate
 * descent over the codes take turns as long as they pay.
 *
 * W f32 [N, K]; linears that share an input are stacked along N. Results live in `scope`, columns in W's own order.
 */
export async function gptq(
  scope: Scope,
  w: Tensor,
  statistics: Statistics,
  scheme: Scheme,
  recipe: Recipe,
  stored: FloatDType,
): Promise<Solved> {
  const k = w.dim(1);
  using work = new Scope(w.device);
  const searched = searchGrid(work, w, scheme, recipe.search, stored, statistics.diagonal);
  const order = recipe.order ? byFallingEnergy(statistics.energy) : Int32Array.from({ length: k }, (_, j) => j);
  const swept = await sweep(work, w, searched, statistics, order, recipe, stored, groupWidth(scheme, k));
  const back = work.from('i32', [k], inverse(order));
  const grid: Grid = {
    ...searched,
    scale: copyTo(scope, swept.grid.scale),
    zero: searched.zero && copyTo(scope, searched.zero),
  };
  return { codes: gather(scope, swept.codes, back, 1), grid, errors: swept.errors, damp: swept.damp };
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

/** The sweep and its refinement in swept order; everything it returns lives in `scope`. */
async function sweep(
  scope: Scope,
  w: Tensor,
  searched: Grid,
  { h }: Statistics,
  order: Int32Array,
  recipe: Recipe,
  stored: FloatDType,
  group: number,
): Promise<Solved> {
  const columns = scope.from('i32', [order.length], order);
  const columnGroup = scope.from('i32', [order.length], order.map((j) => Math.floor(j / group))); // prettier-ignore
  const wp = gather(scope, w, columns, 1);
  const half = gather(scope, h, columns, 0);
  const hp = gather(scope, half, columns, 1);
  scope.free(half);
  const grid: Grid = { ...searched, columnGroup };

  const { factor, damp } = await choleskyRetry(scope, hp, recipe.damp, true);
  const first = ldlq(scope, wp, factor, grid);
  scope.free(factor, first.error);
  const errors = await errorsOf(scope, wp, first.q, hp);
  scope.free(first.q);
  const start: Solved = { codes: first.codes, grid, errors, damp };
  return await refine(scope, wp, hp, start, recipe.refine, stored);
}

async function errorsOf(scope: Scope, w: Tensor, q: Tensor, h: Tensor): Promise<Float32Array> {
  const d = binary(scope, 'sub', w, q);
  const errors = await rowErrors(d, h);
  scope.free(d);
  return errors;
}

/** Rounds of scale refit and code descent; a row takes a round's result only where its error falls. */
async function refine(
  scope: Scope,
  w: Tensor,
  h: Tensor,
  start: Solved,
  rounds: number,
  stored: FloatDType,
): Promise<Solved> {
  let best = start;
  for (let round = 0; round < rounds; round++) {
    using work = new Scope(w.device);
    const scale = roundScales(work, scaleRefit(work, best.codes, w, h, best.grid), stored);
    const codes = copyTo(work, best.codes);
    const grid = { ...best.grid, scale };
    codeDescent(work, codes, w, h, grid);
    const errors = await errorsOf(work, w, dequantize(work, codes, grid), h);
    const before = total(best.errors);
    best = mergeRows(scope, best, { codes, grid, errors, damp: best.damp });
    if (total(best.errors) > (1 - leastGain) * before) break;
  }
  return best;
}

/** A round that gains less is the last. */
const leastGain = 0.001;

export const total = (values: Float32Array): number => values.reduce((sum, value) => sum + value, 0);

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
  return {
    codes: choose(a.codes, b.codes),
    grid: { ...a.grid, scale: choose(a.grid.scale, b.grid.scale), ...zero },
    errors: a.errors.map((error, i) => Math.min(error, takeB[i] ? b.errors[i]! : error)),
    damp: a.damp,
  };
}
