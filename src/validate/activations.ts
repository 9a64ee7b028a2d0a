import { binary, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { round } from './stats.js';
import type { LayerError } from './report.js';

/** Squared norms of the rows of a - b (or of a alone): f32 [T]. */
export function rowSquares(scope: Scope, a: Tensor, b?: Tensor): Tensor {
  using inner = new Scope(scope.device);
  const out = (x: Tensor): Tensor => inner.move(reduce(inner, 'sumsq', x, 1), scope);
  if (!b) return out(a);
  return out(binary(inner, 'sub', a, b, { out: inner.empty('f32', a.shape) }));
}

/**
 * Error of one block's output against the reference's, over all tokens. The residual stream is far larger than what
 * one block adds (and in some models one token is far larger than all others), so beside the plain relative error
 * there is the mean over tokens of the error against the block's own update.
 */
export class LayerErrors {
  #error = 0;
  #output = 0;
  #ratios = 0;
  #tokens = 0;

  /** All f32 [T]: squared norms of y' - y, y and y - x, row by row. */
  add(error: Float32Array, output: Float32Array, update: Float32Array): void {
    for (let t = 0; t < error.length; t++) {
      this.#error += error[t]!;
      this.#output += output[t]!;
      this.#ratios += error[t] === 0 ? 0 : Math.sqrt(error[t]! / Math.max(update[t]!, 1e-30));
    }
    this.#tokens += error.length;
  }

  finish(): LayerError {
    const output = this.#error === 0 ? 0 : Math.sqrt(this.#error / Math.max(this.#output, 1e-30));
    return { output: round(output), update: round(this.#ratios / Math.max(this.#tokens, 1)) };
  }
}
