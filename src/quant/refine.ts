import {
  binary,
  codeDescent,
  copyInto,
  dequantize,
  gather,
  gemm,
  reduce,
  scaleRefit,
  unary,
  type Grid,
} from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { diagonalOf, rowDots, rowErrors, rowParts } from './capture.js';
import { roundScales, type Coded } from './rtn.js';
import type { Recipe, StoredScales } from './scheme.js';

/** Weights f32 [N, K] and what an error in them costs, in the columns' own order and in that of the sweep. */
interface Problem {
  readonly w: Tensor;
  readonly h: Tensor;
  /** w and h in the sweep's order; h's diagonal is changed. */
  readonly wp: Tensor;
  readonly hp: Tensor;
  /** The sweep's order i32 [K], its inverse, and the group of each of its columns. */
  readonly columns: Tensor;
  readonly back: Tensor;
  readonly columnGroup: Tensor;
  /** The damping: H + extra I is what is minimised. */
  readonly extra: number;
}

interface Refined {
  /** Errors of each row under the undamped H, of `start` and of the result. */
  readonly before: Float32Array;
  readonly after: Float32Array;
  readonly coded: Coded;
}

/** W - Q, f32. */
export function residual(scope: Scope, w: Tensor, { codes, grid }: Coded): Tensor {
  const q = dequantize(scope, codes, grid);
  return binary(scope, 'sub', w, q, { out: q });
}

/**
 * Scale refit and code descent in turn under H + extra I, from a sweep's codes; descent alone where scales are fixed
 * (`stored` undefined). Nothing of `start` is changed. G = (W - Q) H is formed where scales have changed, once for all
 * that it serves: the error is the row sums of (W - Q) * G, refit and descent begin from G + extra (W - Q), and what
 * descent gains it counts while it goes.
 */
export async function refine(
  scope: Scope,
  problem: Problem,
  start: Coded,
  { rounds, passes }: Recipe['refine'],
  stored: StoredScales | undefined,
): Promise<Refined> {
  const { w, h, hp, extra } = problem;
  const n = w.dim(0);
  using work = new Scope(w.device);
  unary(work, 'affine', diagonalOf(hp), 1, extra, diagonalOf(hp));
  const damped = stored && work.empty('f32', h.shape);
  if (damped) {
    copyInto(damped, h);
    unary(work, 'affine', diagonalOf(damped), 1, extra, diagonalOf(damped));
  }
  const codes = scope.empty('i8', w.shape);
  const scale = stored ? scope.empty('f32', start.grid.scale.shape) : start.grid.scale;
  const coded = { codes, grid: { ...start.grid, scale } };
  /** Rows: the error at the start; then that before the last descent, its gain, and squares of W - Q before and after. */
  const figures = work.empty('f32', [5, n]);
  for (const [from, to] of rowParts(w)) {
    using inner = new Scope(w.device);
    const rows = (x: Tensor): Tensor => x.slice(0, from, to);
    const note = (i: number, values: Tensor): void => copyInto(figures.at(i).slice(0, from, to), values);
    const own = { ...problem, w: rows(w), wp: rows(problem.wp) };
    const gridOf = (grid: Grid): Grid => ({ ...grid, scale: rows(grid.scale), zero: grid.zero && rows(grid.zero) });
    let now: Coded = { codes: rows(start.codes), grid: gridOf(start.grid) };
    let gradient = gradientOf(inner, own, now);
    note(0, gradient.errors);
    for (let round = 0; round < (stored ? rounds : 1); round++) {
      if (damped && stored) {
        const refitted = scaleRefit(inner, now.codes, own.w, damped, now.grid, { gradient: gradient.values });
        now = { ...now, grid: { ...now.grid, scale: roundScales(inner, refitted, stored) } };
        inner.free(gradient.values);
        gradient = gradientOf(inner, own, now);
      }
      note(1, gradient.errors);
      note(3, gradient.squares);
      const { codes: descended, gain } = descend(inner, own, now, gradient.values, stored ? passes : rounds * passes);
      note(2, gain);
      now = { ...now, codes: descended };
      if (round + 1 < rounds && stored) gradient = gradientOf(inner, own, now);
    }
    note(4, reduce(inner, 'sumsq', residual(inner, own.w, now), 1));
    copyInto(rows(codes), now.codes);
    if (stored) copyInto(rows(scale), now.grid.scale);
  }
  const all = await figures.float32();
  const [before, error, gain, was, is] = [0, 1, 2, 3, 4].map((i) => all.subarray(i * n, (i + 1) * n)) as Figures;
  const after = error.map((value, i) => value - gain[i]! + extra * (was[i]! - is[i]!));
  // A difference of far larger numbers is formed anew.
  const vague = after.some((value, i) => value < 1e-3 * (error[i]! + extra * was[i]!));
  return { before, after: vague ? await errorsOf(problem, coded) : after, coded };
}
type Figures = [Float32Array, Float32Array, Float32Array, Float32Array, Float32Array];

async function errorsOf({ w, h }: Problem, coded: Coded): Promise<Float32Array> {
  using scope = new Scope(w.device);
  return await rowErrors(residual(scope, w, coded), h);
}

/** (W - Q)(H + extra I); errors under H, and squares, by row. */
function gradientOf(scope: Scope, { w, h, extra }: Problem, coded: Coded) {
  const d = residual(scope, w, coded);
  const values = gemm(scope, d, h, { fast: 'split' });
  const errors = rowDots(scope, values, d);
  const squares = reduce(scope, 'sumsq', d, 1);
  binary(scope, 'add', values, d, { alpha: extra, out: values });
  scope.free(d);
  return { values, errors, squares };
}

/** Codes after `passes` descents in the sweep's order, from the gradient (which is freed) in the columns' own. */
function descend(scope: Scope, problem: Problem, { codes, grid }: Coded, gradient: Tensor, passes: number) {
  const { wp, hp, columns, back, columnGroup } = problem;
  const ordered = gather(scope, codes, columns, 1);
  const sums = gather(scope, gradient, columns, 1);
  scope.free(gradient);
  const { changed, gain } = codeDescent(scope, ordered, wp, hp, { ...grid, columnGroup }, { passes, gradient: sums });
  scope.free(sums, changed);
  const descended = gather(scope, ordered, back, 1);
  scope.free(ordered);
  return { codes: descended, gain };
}
