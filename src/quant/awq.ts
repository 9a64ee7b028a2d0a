import type { LinearSpec } from '../nn/calls.js';
import type { NormSpec } from '../nn/norm.js';
import type { FloatDType } from '../base/dtype.js';
import type { Block } from '../arch/types.js';
import { binary, cast } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { rowErrors, statisticsOf, type Statistics } from './capture.js';
import { total } from './gptq.js';
import { roundToNearest, valuesOf } from './rtn.js';
import type { Recipe, Scheme, StoredScales } from './scheme.js';

/** Input channels scaled by s before rounding, and the norm in front divided by it. */
export interface Scaling {
  /** W diag(s). */
  readonly w: Tensor;
  /** Of the inputs x / s. */
  readonly statistics: Statistics;
  /** s as a row f32 [1, K]. */
  readonly s: Tensor;
  /** The norm's new weight, as it is stored. */
  readonly norm: Tensor;
  /** s ~ (root mean square of x)^alpha. */
  readonly alpha: number;
}

/** The norm that gives these linears, and nothing else, their input; undefined: there is none to fold scales into. */
export function normInFront(block: Block, linears: readonly LinearSpec[]): NormSpec | undefined {
  const only = (...wanted: (LinearSpec | undefined)[]) =>
    wanted.length === linears.length && wanted.every((one, i) => one?.name === linears[i]?.name);
  const { grouped } = block.attention;
  if (grouped && only(grouped.q, grouped.k, grouped.v)) return block.norms.attention;
  if (block.ffn && only(block.ffn.gate, block.ffn.up)) return block.norms.feedForward;
  return undefined;
}

/** Exponents that are tried; 0 leaves everything as it is. */
const exponents = Array.from({ length: 11 }, (_, i) => i / 10);

/**
 * Activation-aware scaling (AWQ, Lin et al. 2024): channels with much activation energy are enlarged before rounding
 * and shrunk in the norm in front, which changes nothing but what rounding costs. One scale a channel for all linears
 * of the call, s ~ energy^(alpha / 2), alpha by search: the least output error of rounding W diag(s) under H. Scales
 * are bent so that the norm's new weights are exact in the precision in which they are stored.
 * W f32 [N, K], norm f32 [K]. Undefined: nothing beats leaving it.
 */
export async function searchScaling(
  scope: Scope,
  w: Tensor,
  statistics: Statistics,
  norm: Tensor,
  dtype: FloatDType,
  { scheme, recipe, stored }: { readonly scheme: Scheme; readonly recipe: Recipe; readonly stored: StoredScales },
): Promise<Scaling | undefined> {
  const k = w.dim(1);
  const weights = await norm.float32();
  let best: { error: number; alpha: number; s: Float32Array } | undefined;
  for (const alpha of exponents) {
    using work = new Scope(w.device);
    const s = await exactScales(work, scalesOf(statistics.energy, alpha), weights, dtype);
    const row = work.from('f32', [1, k], s);
    const scaled = binary(work, 'mul', w, row);
    const diagonal = work.from('f32', [k], statistics.energy.map((energy, j) => energy / s[j]! ** 2)); // prettier-ignore
    const coded = roundToNearest(work, scaled, scheme, recipe.search, stored, diagonal);
    const q = binary(work, 'div', valuesOf(work, coded, scheme), row);
    const error = total(await rowErrors(binary(work, 'sub', w, q), statistics.h));
    if (best === undefined || error < best.error) best = { error, alpha, s };
  }
  if (best === undefined || best.alpha === 0) return undefined;
  const s = scope.from('f32', [1, k], best.s);
  const h = binary(scope, 'div', statistics.h, s);
  binary(scope, 'div', h, s.view(k, 1), { out: h });
  return {
    w: binary(scope, 'mul', w, s),
    statistics: await statisticsOf(h, statistics.tokens, scope, 'scaled inputs'),
    s,
    norm: cast(scope, scope.from('f32', [k], weights.map((weight, j) => weight / best.s[j]!)), dtype), // prettier-ignore
    alpha: best.alpha,
  };
}

/** energy^(alpha / 2), with the geometric mean of the extremes 1. */
function scalesOf(energy: Float32Array, alpha: number): Float32Array {
  const most = energy.reduce((a, b) => Math.max(a, b), 0);
  const s = energy.map((value) => Math.max(value, 1e-8 * most, Number.MIN_VALUE) ** (alpha / 2));
  const [low, high] = [s.reduce((a, b) => Math.min(a, b)), s.reduce((a, b) => Math.max(a, b))];
  const middle = Math.sqrt(low * high);
  return s.map((value) => value / middle);
}

/** s such that norm / s has no rounding error as `dtype`; 1 where there is no such s. */
async function exactScales(
  scope: Scope,
  s: Float32Array,
  norm: Float32Array,
  dtype: FloatDType,
): Promise<Float32Array> {
  const divided = scope.from('f32', [s.length], norm.map((weight, j) => weight / s[j]!)); // prettier-ignore
  const rounded = await cast(scope, cast(scope, divided, dtype), 'f32').float32();
  return norm.map((weight, j) => {
    const exact = weight / rounded[j]!;
    return Number.isFinite(exact) && exact > 0 ? exact : 1;
  });
}
