import type { Site } from '../arch/stream.js';
import type { FfnSpec } from '../nn/mlp.js';
import {
  binary,
  cast,
  cholesky,
  choleskySolve,
  copyInto,
  gather,
  gemm,
  hessianAdd,
  matmulT,
  swiglu,
} from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { relativeError } from './judge.js';
import { maskOf } from './masks.js';
import { choose, scoresOf, type Router } from './router.js';
import type { FfnWeights } from './sample.js';
import { capacity, type MoeShape } from './shape.js';

/** Ridge penalties that are tried, relative to the mean of the diagonal; the one that judges best is taken. */
const penalties = [1e-3, 1e-2, 1e-1, 1];
/** Fewer tokens than this cannot judge. */
const fewest = 64;

export interface Refit {
  /** down_proj in the order of the split, f32 [C, capacity]. */
  readonly down: Tensor;
  readonly lambda: number;
}

/** Tokens that were left out of fitting: hidden neurons under the routing's mask, and without it. f32 [T, capacity]. */
export interface Held {
  readonly masked: Tensor;
  readonly whole: Tensor;
}

/**
 * Masked least squares (METHODS, "refit"): with H~ the neurons that routing leaves on, W' = W + (Y - W H~) H~' (H~ H~' +
 * lambda I)^-1 makes those that are on stand in for those that are off. `w` stands in the order of the split. Tokens for
 * which `isHeld` is true stay out. Undefined where no penalty makes held-out tokens better.
 */
export async function refitDown(
  scope: Scope,
  site: Site,
  w: FfnWeights,
  ffn: FfnSpec,
  router: Router,
  shape: MoeShape,
  held: Held,
  isHeld: (token: number) => boolean,
): Promise<Refit | undefined> {
  if (held.masked.dim(0) < fewest) return undefined;
  using work = new Scope(scope.device);
  const [total, hidden] = [capacity(shape), w.down.dim(0)];
  const gram = work.zeros('f32', [total, total]);
  const cross = work.zeros('f32', [total, hidden]);
  let from = 0;
  await site.each(async (call) => {
    using step = new Scope(scope.device);
    const rows: number[] = [];
    for (let row = 0; row < call.x.dim(0); row++) if (!isHeld(from + row)) rows.push(row);
    from += call.x.dim(0);
    if (rows.length === 0) return;
    const x = gather(step, call.x, step.from('i32', [rows.length], Int32Array.from(rows)));
    const h = swiglu(step, matmulT(step, x, w.gate), matmulT(step, x, w.up), ffn.activation);
    const masked = applyMask(step, h, routingMask(step, x, router, shape), shape);
    const off = binary(step, 'sub', h, masked, { out: h });
    hessianAdd(gram, masked, { alpha: 1 / site.tokens });
    const missing = matmulT(step, off, w.down);
    gemm(step, masked.transpose(), missing, { alpha: 1 / site.tokens, beta: 1, out: cross });
  });
  const plain = work.empty('f32', [hidden, total]);
  copyInto(plain, w.down);
  const outputs = (h: Tensor, down: Tensor) => matmulT(work, h, down, { fast: 'split' });
  const target = outputs(held.whole, plain);
  let best: { error: number; lambda: number; down: Tensor } | undefined;
  let least = await relativeError(outputs(held.masked, plain), target);
  for (const lambda of penalties) {
    const { factor, info } = cholesky(work, gram, lambda);
    if ((await info.int32())[0] === 0) {
      const change = choleskySolve(work, factor, cross);
      const down = binary(work, 'add', plain, change.transpose());
      const error = await relativeError(outputs(held.masked, down), target);
      if (error < least) [least, best] = [error, { error, lambda, down }];
      work.free(change);
    }
    work.free(factor, info);
  }
  if (!best) return undefined;
  return { down: cast(scope, best.down, 'f32'), lambda: best.lambda };
}

/** f32 [T, pieces]: 1 where a token uses an expert (shared ones: always). */
export const routingMask = (s: Scope, x: Tensor, router: Router, { routed, active, shared }: MoeShape): Tensor =>
  maskOf(s, choose(s, scoresOf(s, x, router), active), routed, shared);

/** h [T, capacity], in the order of the split, with the experts that are off set to zero. */
export function applyMask(s: Scope, h: Tensor, mask: Tensor, shape: MoeShape): Tensor {
  const [tokens, count] = mask.shape as [number, number];
  const masked = binary(s, 'mul', h.view(tokens, count, shape.width), mask.view(tokens, count, 1));
  return masked.view(tokens, count * shape.width);
}
