import { badUsage } from '../base/errors.js';
import type { Bits, SchemeChange } from './scheme.js';
import type { Sensitivity } from './sensitivity.js';

/** The candidates of `--target-bpw`. */
export const candidateBits: readonly Bits[] = [2, 3, 4, 8];

interface Step {
  readonly unit: number;
  readonly to: number;
  readonly cost: number;
  /** Error saved for each bit spent. */
  readonly gain: number;
}

/**
 * Bits of each unit such that the mean over all weights is at most `target` and the sum of errors small: from the
 * cheapest candidates upwards, always the step that saves most error a bit, along the convex hull of each unit's
 * candidates (greedy on hulls is optimal up to one unit's last step; Shoham & Gersho 1988).
 * Errors: a target below what the cheapest candidates take.
 */
export function allocateBits(units: readonly Sensitivity[], target: number): Map<string, SchemeChange> {
  const weights = units.reduce((sum, unit) => sum + unit.weights, 0);
  const hulls = units.map(hullOf);
  let spent = units.reduce((sum, unit, u) => sum + unit.weights * hulls[u]![0]!.bitsPerWeight, 0);
  if (spent > target * weights * (1 + 1e-9)) {
    throw badUsage('--target-bpw is lower than what the smallest codes take', {
      got: String(target),
      expected: `at least ${(spent / weights).toFixed(3)}, scales included`,
    });
  }
  const at = hulls.map(() => 0);
  const next = (unit: number): Step[] => {
    const [here, to] = [hulls[unit]![at[unit]!]!, hulls[unit]![at[unit]! + 1]];
    if (!to) return [];
    const cost = units[unit]!.weights * (to.bitsPerWeight - here.bitsPerWeight);
    return [{ unit, to: at[unit]! + 1, cost, gain: (here.error - to.error) / cost }];
  };
  let open = units.flatMap((_, u) => next(u));
  while (open.length > 0) {
    open.sort((a, b) => b.gain - a.gain || a.unit - b.unit);
    const step = open.shift()!;
    if (spent + step.cost > target * weights * (1 + 1e-9)) continue;
    spent += step.cost;
    at[step.unit] = step.to;
    open = [...open, ...next(step.unit)];
  }
  return new Map(units.flatMap(({ linears }, u) => linears.map((name) => [name, { bits: hulls[u]![at[u]!]!.bits }])));
}

/** Candidates on the lower convex hull of error over bits, from the cheapest on. */
function hullOf({ candidates }: Sensitivity): Sensitivity['candidates'] {
  const hull: Sensitivity['candidates'][number][] = [];
  for (const one of [...candidates].sort((a, b) => a.bitsPerWeight - b.bitsPerWeight)) {
    const last = hull.at(-1);
    if (last && one.error >= last.error) continue;
    while (hull.length >= 2) {
      const [a, b] = [hull.at(-2)!, hull.at(-1)!];
      const slope = (x: typeof a, y: typeof a) => (x.error - y.error) / (y.bitsPerWeight - x.bitsPerWeight);
      if (slope(a, b) > slope(b, one)) break;
      hull.pop();
    }
    if (last && one.bitsPerWeight <= last.bitsPerWeight) hull.pop();
    hull.push(one);
  }
  return hull;
}
