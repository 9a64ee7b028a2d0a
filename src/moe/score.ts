import { binary, fill, gemm, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

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
  using work = new Scope(s.device);
  return await columnMeans(work, z).float32();
}

/** Means of the columns of x f32 [T, N]: f32 [N]. A product, for long columns a whole device and not one thread each. */
export function columnMeans(s: Scope, x: Tensor): Tensor {
  using work = new Scope(s.device);
  const weights = work.empty('f32', [1, x.dim(0)]);
  fill(weights, 1 / x.dim(0));
  return gemm(s, weights, x).view(-1);
}

function contiguous(s: Scope, x: Tensor): Tensor {
  const copy = s.empty(x.dtype, x.shape);
  x.device.run('copy', [copy, x, undefined], [], []);
  return copy;
}
