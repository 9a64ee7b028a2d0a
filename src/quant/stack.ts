import type { Scaling } from './awq.js';
import type { Statistics } from './capture.js';
import type { Planned } from './plan.js';
import type { LinearReport } from './report.js';
import type { Coded } from './rtn.js';
import type { Scheme } from './scheme.js';
import type { Solution } from './solve.js';
import type { Tensor } from '../tensor/tensor.js';

/** Linears of one scheme and input on top of each other, with their codes. */
export interface Stack {
  readonly plans: readonly Planned[];
  readonly scheme: Scheme;
  /** f32 [sum N, K], padded as it is stored; channels scaled where `scaling` says so. */
  readonly w: Tensor;
  readonly statistics: Statistics | undefined;
  readonly solution: Solution;
  readonly scaling: Scaling | undefined;
  readonly method: LinearReport['method'];
  /** Calibration tokens that reached the linears. */
  readonly tokens: number;
  readonly notes: readonly string[];
  /** That one linear took, in milliseconds. */
  readonly seconds: number;
}

/** The linears of a stack: their rows, and what of the codes is theirs. */
export function* parts({
  plans,
  solution,
}: Stack): Generator<{ plan: Planned; from: number; to: number; coded: Coded }> {
  const { codes, grid, blocks } = solution;
  let from = 0;
  for (const plan of plans) {
    const to = from + plan.stored.outFeatures;
    const rows = (x: Tensor) => x.slice(0, from, to);
    const own = { ...grid, scale: rows(grid.scale), zero: grid.zero && rows(grid.zero) };
    yield { plan, from, to, coded: { codes: rows(codes), grid: own, ...(blocks && { blocks: rows(blocks) }) } };
    from = to;
  }
}
