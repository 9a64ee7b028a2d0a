import { binary, reduce, unary } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';

/** Euclidean length of each column of down_proj [C, I]: what one unit of a neuron adds to the output. f32 [I]. */
export function columnNorms(s: Scope, down: Tensor): Tensor {
  const squares = reduce(s, 'sumsq', down.contiguous ? down : contiguous(s, down), 0);
  return unary(s, 'sqrt', squares, 0, 0, squares);
}

/** Energies (h |w_down|)^2, f32 [T, I]: the squared length of each neuron's part of the output. */
export function energies(s: Scope, h: Tensor, norms: Tensor): Tensor {
  const z = binary(s, 'mul', h, norms.view(1, -1));
  return unary(s, 'square', z, 0, 0, z);
}

/** Contribution of each neuron: E[h^2] |w_down|^2 over the rows of `z` [T, I]. */
export async function contributions(s: Scope, z: Tensor): Promise<Float32Array> {
  const mean = reduce(s, 'mean', z, 0);
  const values = await mean.float32();
  s.free(mean);
  return values;
}

function contiguous(s: Scope, x: Tensor): Tensor {
  const copy = s.empty(x.dtype, x.shape);
  x.device.run('copy', [copy, x, undefined], [], []);
  return copy;
}
