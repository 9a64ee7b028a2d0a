import type { Site } from '../arch/stream.js';
import { binary, cast, cholesky, choleskySolve, copyInto, gather, gemm, hessianAdd, matmulT } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { relativeError } from './judge.js';
import type { Activations } from './mixture.js';

/** Ridge penalties, relative to the mean of the diagonal, tried in turn; the one that judges best is taken. */
const penalties = [1e-3, 1e-2, 1e-1, 1];
/** Fewer tokens than this cannot judge. */
const fewest = 64;

export interface Refit {
  /** down_proj in the order of the split, f32 [C, capacity]. */
  readonly down: Tensor;
  readonly lambda: number;
  /** On held-out tokens, without it and with it. */
  readonly errors: { readonly routed: number; readonly refit: number };
}

/** Tokens that were left out of fitting. */
export interface Held {
  /** Hidden neurons under the routing's mask, f32 [T, capacity]. */
  readonly masked: Tensor;
  /** The dense layer's output, f32 [T, C]. */
  readonly target: Tensor;
}

/**
 * Masked least squares (METHODS, "refit"): with H~ the neurons that routing leaves on, W' = W + (Y - W H~) H~' (H~ H~' +
 * lambda I)^-1 makes those that are on stand in for those that are off. `down` f32 or 16 bit [C, capacity] stands in the
 * order of the split. Tokens for which `isHeld` is true stay out; lambda grows until their error does. With `keep` the
 * activations stay where the batches' next pass finds them. Undefined where no penalty makes held-out tokens better.
 */
export async function refitDown(
  scope: Scope,
  site: Site,
  activations: Activations,
  down: Tensor,
  held: Held,
  isHeld: (token: number) => boolean,
  keep = false,
): Promise<Refit | undefined> {
  if (held.masked.dim(0) < fewest) return undefined;
  using work = new Scope(scope.device);
  const [hidden, total] = down.shape as [number, number];
  const gram = work.zeros('f32', [total, total]);
  const cross = work.zeros('f32', [total, hidden]);
  let from = 0;
  await site.each(async (call) => {
    using step = new Scope(scope.device);
    const rows: number[] = [];
    for (let row = 0; row < call.x.dim(0); row++) if (!isHeld(from + row)) rows.push(row);
    from += call.x.dim(0);
    const { whole, masked } = activations.of(step, call.x);
    if (rows.length > 0) {
      const off = binary(step, 'sub', whole, masked, { out: whole });
      const idx = step.from('i32', [rows.length], Int32Array.from(rows));
      const [seen, missing] = [gather(step, masked, idx), matmulT(step, gather(step, off, idx), down)];
      hessianAdd(gram, seen, { alpha: 1 / site.tokens });
      gemm(step, seen.transpose(), missing, { alpha: 1 / site.tokens, beta: 1, out: cross });
    }
    if (keep) activations.keep(call.x, masked, step);
  });
  const plain = work.empty('f32', [hidden, total]);
  copyInto(plain, down);
  const errorOf = (columns: Tensor) => relativeError(outputOf(work, held.masked, columns), held.target);
  let best: { lambda: number; down: Tensor } | undefined;
  const routed = await errorOf(plain);
  let least = routed;
  let before = Infinity;
  for (const lambda of penalties) {
    const { factor, info } = cholesky(work, gram, lambda);
    const change = choleskySolve(work, factor, cross);
    const refitted = binary(work, 'add', plain, change.transpose());
    work.free(factor, change);
    const [[bad], error] = await Promise.all([info.int32(), errorOf(refitted)]);
    if (bad !== 0) continue;
    if (error < least) [least, best] = [error, { lambda, down: refitted }];
    if (error > before) break;
    before = error;
  }
  if (!best) return undefined;
  return { down: cast(scope, best.down, 'f32'), lambda: best.lambda, errors: { routed, refit: least } };
}

/** A layer's output from its hidden neurons h f32 [T, I] and columns f32 [C, I]. */
export const outputOf = (s: Scope, h: Tensor, columns: Tensor): Tensor => matmulT(s, h, columns, { fast: 'split' });
