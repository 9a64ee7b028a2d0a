import { binary, expertCombine, fill, gather } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { choose, scoresOf, type Router } from './choose.js';
import type { Restructured } from './restructured.js';
import { heldPart, type Sample } from './sample.js';
import type { MoeShape } from './shape.js';

/** f32 [T, experts + always]: 1 at the experts idx i32 [T, K] that a row names, and in all columns behind the experts. */
export function maskOf(s: Scope, idx: Tensor, experts: number, always = 0): Tensor {
  using work = new Scope(s.device);
  const columns = experts + always;
  const units = new Float32Array(experts * columns);
  for (let e = 0; e < experts; e++) units[e * columns + e] = 1;
  const ones = work.empty('f32', idx.shape);
  fill(ones, 1);
  const behind = new Float32Array(columns).fill(1, experts);
  const base = always > 0 ? work.from('f32', [1, columns], behind).expand(idx.dim(0), columns) : undefined;
  // A sum of rows of the unit matrix: no mask passes through the host.
  return expertCombine(s, work.from('f32', [experts, columns], units), idx, ones, base);
}

/** f32 [n, experts] with a 1 where item n belongs. */
export function membership(s: Scope, assigned: Int32Array, experts: number): Tensor {
  using work = new Scope(s.device);
  return maskOf(s, work.from('i32', [assigned.length, 1], assigned), experts);
}

/** f32 [T, pieces]: 1 where a token uses an expert (shared ones: always). */
export const routingMask = (s: Scope, x: Tensor, router: Router, shape: MoeShape): Tensor =>
  maskOf(s, choose(s, scoresOf(s, x, router), shape), shape.routed, shape.shared);

/** h [T, capacity], in the order of the split, with the experts that are off set to zero. */
export function applyMask(s: Scope, h: Tensor, mask: Tensor, shape: MoeShape): Tensor {
  const [tokens, count] = mask.shape as [number, number];
  const masked = binary(s, 'mul', h.view(tokens, count, shape.width), mask.view(tokens, count, 1));
  return masked.view(tokens, count * shape.width);
}

/** Held-out tokens' neurons in the order of the split, all of them and as routed. */
export function heldNeurons(s: Scope, sample: Sample, { split, router }: Pick<Restructured, 'split' | 'router'>) {
  const { x, h } = heldPart(sample);
  const { order, shape } = split;
  const whole = gather(s, h, s.from('i32', [order.length], order), 1);
  return { whole, masked: applyMask(s, whole, routingMask(s, x, router, shape), shape) };
}
