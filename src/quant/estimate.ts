import type { Device } from '../backend/device.js';
import type { Model } from '../arch/types.js';
import { matmulT, random } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import type { QuantPlan } from './plan.js';
import { codesOf, roundingOf, type Recipe } from './scheme.js';

/** What a job will take, from shapes alone. Bytes, and floating-point operations by stage. */
export interface Estimate {
  /** Device memory: two blocks of weights, the calibration states, the largest call's Hessians and weights. */
  readonly memory: number;
  /** Calibration states, stored after each block. */
  readonly stateBytes: number;
  readonly flops: { readonly forward: number; readonly capture: number; readonly solve: number; readonly tune: number };
}

/** `tokens` of calibration text (0: none) in `samples` windows, `size` bytes a value of states and weights on the device. */
export function estimate(
  model: Model,
  plan: QuantPlan,
  recipe: Recipe,
  tokens: number,
  samples: number,
  size: number,
): Estimate {
  let [forward, capture, solve, largestBlock, largestCall] = [0, 0, 0, 0, 0];
  for (const block of model.blocks) {
    let weights = 0;
    for (const group of block.linears) {
      const rows = group.reduce((sum, { outFeatures }) => sum + outFeatures, 0);
      const k = group[0]!.inFeatures;
      weights += rows * k;
      const expert = group[0]!.role === 'expert' && block.moe;
      const seen = expert ? (tokens * block.moe.active) / block.moe.experts : tokens;
      forward += 2 * seen * rows * k;
      if (!group.some(({ name }) => plan.linears.get(name)?.scheme)) continue;
      largestCall = Math.max(largestCall, 4 * (4 * rows * k + 4 * k * k));
      if (tokens === 0) continue;
      capture += seen * k * k;
      // Measuring takes five products with H, the sweep one, each refit and descent one; the factor K^3 / 3.
      if (codesOf(recipe) === 'gptq')
        solve += (2 * (6 + recipe.refine.rounds * (1 + recipe.refine.passes)) * rows * k * k) + k ** 3 / 3; // prettier-ignore
      else solve += 6 * rows * k * k;
    }
    largestBlock = Math.max(largestBlock, weights * size);
  }
  const rounding = recipe.method === 'autoround' ? roundingOf(recipe) : undefined;
  // Forward and twice as much backward; what learns stands beside the weights, with its gradient.
  const tune = rounding ? (3 * forward * rounding.steps * Math.min(rounding.batch, samples)) / samples : 0;
  const stateBytes = (rounding ? 2 : 1) * tokens * model.stateWidth * size;
  const memory = (rounding ? 2 + 16 / size : 2) * largestBlock + largestCall + 4 * stateBytes;
  return { memory, stateBytes, flops: { forward: (rounding ? 3 : 1) * forward, capture, solve, tune } };
}

/** Seconds that `flops` take on this device, from one timed product: an order of magnitude, not a promise. */
export async function secondsFor(device: Device, flops: number): Promise<number> {
  using scope = new Scope(device);
  const n = device.kind === 'cpu' ? 512 : 4096;
  const [a, b] = [scope.empty('f32', [n, n]), scope.empty('f32', [n, n])];
  random(a, 'normal', 1, 0, 1);
  random(b, 'normal', 2, 0, 1);
  matmulT(scope, a, b);
  await device.sync();
  const started = performance.now();
  matmulT(scope, a, b);
  await device.sync();
  return ((performance.now() - started) / 1000) * (flops / (2 * n ** 3));
}
