import { Random } from '../base/rng.js';
import { cast, copyInto, gather, random, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Experts } from './split.js';

/** How many of `width` neurons a share is: neither none nor all. */
export const droppedNeurons = (width: number, ratio: number): number =>
  Math.min(Math.max(Math.round(ratio * width), 1), width - 1);

/**
 * Drop-Upcycling (Nakamura et al. 2025): in every routed expert a share of the neurons, another one in each, is drawn anew:
 * rows of gate and up and columns of down from normal distributions with mean and deviation of the weights that they take
 * the place of, matrix by matrix. All other weights, and shared networks, stay to the bit. The same for the same seed
 * and layer.
 */
export async function dropNeurons(
  scope: Scope,
  experts: Experts,
  ratio: number,
  seed: number,
  layer: number,
): Promise<Experts> {
  const [count, width] = experts.gate.shape as [number, number, number];
  const fresh = { gate: like(scope, experts.gate), up: like(scope, experts.up), down: like(scope, experts.down) };
  for (let e = 0; e < count; e++) {
    const draws = new Random(seed, 4096 * (layer + 1) + e);
    const lost = someOf(width, droppedNeurons(width, ratio), draws);
    // Behind the old neurons stand the new ones.
    const order = Int32Array.from({ length: width }, (_, i) => i);
    lost.forEach((neuron, i) => (order[neuron] = width + i));
    for (const [part, axis] of [['gate', 0], ['up', 0], ['down', 1]] as const) {
      await redraw(fresh[part].at(e), experts[part].at(e), axis, { lost, order, seed: draws.bits() });
    } // prettier-ignore
  }
  return { ...fresh, shared: experts.shared };
}

interface Redraw {
  readonly lost: Int32Array;
  readonly order: Int32Array;
  readonly seed: number;
}

async function redraw(into: Tensor, from: Tensor, axis: 0 | 1, { lost, order, seed }: Redraw): Promise<void> {
  using s = new Scope(from.device);
  const old = cast(s, gather(s, from, s.from('i32', [lost.length], lost), axis), 'f32');
  const row = old.view(1, -1);
  const mean = (await reduce(s, 'mean', row, 1).float32())[0]!;
  const square = (await reduce(s, 'sumsq', row, 1).float32())[0]! / old.count;
  random(old, 'normal', seed, mean, Math.sqrt(Math.max(square - mean * mean, 0)));
  const width = order.length;
  const both = s.empty(from.dtype, from.shape.with(axis, width + lost.length));
  copyInto(both.slice(axis, 0, width), from);
  copyInto(both.slice(axis, width, width + lost.length), old);
  copyInto(into, gather(s, both, s.from('i32', [width], order), axis));
}

const like = (s: Scope, x: Tensor): Tensor => s.empty(x.dtype, x.shape);

/** `count` of 0 .. n-1, ascending. */
function someOf(n: number, count: number, random: Random): Int32Array {
  const all = Int32Array.from({ length: n }, (_, i) => i);
  for (let i = 0; i < count; i++) {
    const j = i + random.below(n - i);
    [all[i], all[j]] = [all[j]!, all[i]!];
  }
  return all.slice(0, count).sort();
}
