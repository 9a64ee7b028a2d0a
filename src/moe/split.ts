import type { FloatDType } from '../base/dtype.js';
import { copyInto, gather, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Weighting } from './containers/types.js';
import type { FfnWeights } from './sample.js';
import { capacity, type MoeShape } from './shape.js';

/** Which neuron stands where: routed experts one after another, then the shared ones; -1 is a zero neuron. */
export interface Split {
  readonly shape: MoeShape;
  /** [capacity]: a partition of the neurons 0 .. ffn-1, padded. */
  readonly order: Int32Array;
}

/** Lays neurons out by expert. `shared`: neurons that are always on; `expertOf[i]`: the expert of `rest[i]`. */
export function layOut(shape: MoeShape, shared: Int32Array, rest: Int32Array, expertOf: Int32Array): Split {
  const order = new Int32Array(capacity(shape)).fill(-1);
  const filled = Int32Array.from({ length: shape.routed }, (_, e) => e * shape.width);
  rest.forEach((neuron, i) => (order[filled[expertOf[i]!]!++] = neuron));
  order.set(shared, shape.routed * shape.width);
  return { shape, order };
}

/** How many of the `ffn` neurons the shared experts get: all the room that they have. */
export const sharedNeurons = ({ shared, width, ffn }: MoeShape): number => Math.min(shared * width, ffn);

/** Weights in the order of a split: rows of gate and up, columns of down; zero neurons are zero everywhere. */
export function arrange(s: Scope, { order }: Split, w: FfnWeights): FfnWeights {
  const idx = s.from('i32', [order.length], order);
  return { gate: gather(s, w.gate, idx), up: gather(s, w.up, idx), down: gather(s, w.down, idx, 1) };
}

/** The networks of a mixture as they are stored. */
export interface Experts {
  /** [R, w, C], [R, w, C], [R, C, w] */
  readonly gate: Tensor;
  readonly up: Tensor;
  readonly down: Tensor;
  /** [S w, C], [S w, C], [C, S w]; absent without shared experts. */
  readonly shared: FfnWeights | undefined;
}

/** Cuts arranged weights into experts, down_proj times what the container's weighting asks for, as `dtype`. */
export function cut(s: Scope, shape: MoeShape, w: FfnWeights, weighting: Weighting, dtype: FloatDType): Experts {
  const { routed, width } = shape;
  const [hidden, end] = [w.gate.dim(1), routed * width];
  const rows = (x: Tensor) => {
    const y = s.empty(dtype, [routed, width, hidden]);
    copyInto(y.view(end, hidden), x.slice(0, 0, end));
    return y;
  };
  const total = capacity(shape);
  const { down, sharedDown } = cutDowns(s, shape, w.down, weighting, dtype);
  const shared = sharedDown && {
    gate: part(s, w.gate.slice(0, end, total), 1, dtype),
    up: part(s, w.up.slice(0, end, total), 1, dtype),
    down: sharedDown,
  };
  return { gate: rows(w.gate), up: rows(w.up), down, shared };
}

/** down_proj from arranged columns [C, capacity]: of the routed experts [R, C, w], of the shared ones [C, S w]. */
export function cutDowns(
  s: Scope,
  shape: MoeShape,
  down: Tensor,
  { routedDown, sharedDown }: Pick<Weighting, 'routedDown' | 'sharedDown'>,
  dtype: FloatDType,
): { down: Tensor; sharedDown: Tensor | undefined } {
  const { routed, width } = shape;
  const hidden = down.dim(0);
  using work = new Scope(s.device);
  const y = s.empty(dtype, [routed, hidden, width]);
  for (let e = 0; e < routed; e++) {
    copyInto(y.at(e), part(work, down.slice(1, e * width, (e + 1) * width), routedDown, 'f32'));
  }
  const [end, total] = [routed * width, capacity(shape)];
  return { down: y, sharedDown: total > end ? part(s, down.slice(1, end, total), sharedDown, dtype) : undefined };
}

/** A contiguous copy times `factor`, rounded once. */
function part(s: Scope, x: Tensor, factor: number, dtype: FloatDType): Tensor {
  using work = new Scope(s.device);
  const y = s.empty(dtype, x.shape);
  if (factor === 1) {
    copyInto(y, x);
    return y;
  }
  const scaled = work.empty('f32', x.shape);
  copyInto(scaled, x);
  unary(work, 'affine', scaled, factor, 0, scaled);
  copyInto(y, scaled);
  return y;
}
