import { createHash } from 'node:crypto';
import { binary, random, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

/**
 * A short name for the values of Q f32 [N, K]: the hash of Q r for a fixed random vector r. Taken when a linear is
 * quantized, and again from what is read back of the finished output: any code, scale or shape that differs shows.
 */
export async function probe(q: Tensor): Promise<string> {
  using scope = new Scope(q.device);
  const r = scope.empty('f32', [q.dim(1)]);
  random(r, 'uniform', 20117, 0.5, 1.5);
  const product = binary(scope, 'mul', q, r);
  const sums = await reduce(scope, 'sum', product, 1).bytesOut();
  return createHash('sha256').update(sums).digest('hex').slice(0, 32);
}
