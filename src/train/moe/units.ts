import type { FloatDType } from '../../base/dtype.js';
import type { Weights } from '../../nn/calls.js';
import { binary, cast, fill, gemm, random, reduce, unary } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import type { Parameter } from '../../tune/parameters.js';
import { Overlay, type Learning } from '../../tune/weights.js';

/** A stored tensor, or the same tensor of all experts one under another. */
export interface Place {
  /** Tensor names in the order of rows, all with the same number of rows. */
  readonly names: readonly string[];
  /** Routed experts: asked for as one stack. */
  readonly stacked: boolean;
  readonly block: number;
  /** What it is stored in. */
  readonly dtype: FloatDType;
  /** Read in f32 whatever the run computes in. */
  readonly precise?: boolean;
}

/** It learns in some way. */
export interface Unit extends Place {
  readonly parameters: readonly Parameter[];
  /** f32, already rounded to what will be stored; by recordable operations. */
  value(scope: Scope): Tensor;
}

/** Of a factor around 1, beside a weight's learning rate, which is in parts of the tensor's size. */
const scaleRate = 0.3;

const rounded = (scope: Scope, x: Tensor, { dtype }: Place): Tensor =>
  dtype === 'f32' ? x : cast(scope, cast(scope, x, dtype), 'f32');

const parameter = ({ names, block }: Place, part: string, value: Tensor, rate: number): Parameter => ({
  name: `${names[0]!}${part}`,
  value,
  rate,
  decay: false,
  block,
});

/** Root mean square. */
export async function sizeOf(x: Tensor): Promise<number> {
  using scope = new Scope(x.device);
  return Math.sqrt((await reduce(scope, 'sumsq', x.view(1, -1), 1).float32())[0]! / x.count);
}

/** All values learn. `value` f32, all of its memory. */
export async function wholeUnit(place: Place, value: Tensor): Promise<Unit> {
  const parameters = [parameter(place, '', value, await sizeOf(value))];
  return { ...place, parameters, value: (scope) => rounded(scope, value, place) };
}

/**
 * The same, held in multiples of `size`: what a router stores is so small that its gradients would drown all others'.
 */
export function sizedUnit(scope: Scope, place: Place, stored: Tensor, size: number, rate: number): Unit {
  const value = unary(scope, 'affine', stored, 1 / size, 0);
  return {
    ...place,
    parameters: [parameter(place, '', value, rate)],
    value: (s) => rounded(s, unary(s, 'affine', value, size, 0), place),
  };
}

/** Each row of a matrix f32 is multiplied by a factor that learns; with `low` there is a low-rank addition (Hu et al. 2022). */
export async function scaledUnit(
  scope: Scope,
  place: Place,
  weight: Tensor,
  low?: { readonly rank: number; readonly seed: number },
): Promise<Unit> {
  const [rows, columns] = weight.shape as [number, number];
  const factors = scope.empty('f32', [rows]);
  fill(factors, 1);
  const scaled = (s: Scope, x: Tensor) => rounded(s, binary(s, 'mul', x, factors.view(rows, 1)), place);
  const scales = parameter(place, '.scale', factors, scaleRate);
  if (!low) return { ...place, parameters: [scales], value: (s) => scaled(s, weight) };
  const rank = Math.min(low.rank, rows, columns);
  const [a, b] = [scope.empty('f32', [rank, columns]), scope.zeros('f32', [rows, rank])];
  random(a, 'normal', low.seed, 0, columns ** -0.5);
  const parameters = [
    parameter(place, '.lora_A', a, columns ** -0.5),
    parameter(place, '.lora_B', b, (await sizeOf(weight)) * (columns / rank) ** 0.5),
    scales,
  ];
  return { ...place, parameters, value: (s) => scaled(s, binary(s, 'add', gemm(s, b, a), weight)) };
}

/** A block whose `units` learn, over the `rest`, which does not. */
export class LearningBlock implements Learning {
  readonly parameters: readonly Parameter[];

  constructor(
    readonly units: readonly Unit[],
    readonly rest: Weights,
    /** To compute in. */
    readonly dtype: FloatDType,
  ) {
    this.parameters = units.flatMap((unit) => unit.parameters);
  }

  now(scope: Scope): Weights {
    const values = new Overlay(this.rest);
    for (const unit of this.units) {
      const value = unit.value(scope);
      values.put(unit, unit.precise || this.dtype === 'f32' ? value : cast(scope, value, this.dtype));
    }
    return values;
  }
}
