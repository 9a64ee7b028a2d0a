import type { Site } from '../arch/stream.js';
import type { FfnSpec } from '../nn/mlp.js';
import { binary, cast, cholesky, choleskySolve, copyInto, gemm, hessianAdd, matmulT, swiglu } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { relativeError } from './judge.js';
import { choose, scoresOf, type Router } from './router.js';
import type { FfnWeights } from './sample.js';
import { capacity, pieces, type MoeShape } from './shape.js';

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
    const { x } = call;
    const start = from;
    from += x.dim(0);
    const h = swiglu(step, matmulT(step, x, w.gate), matmulT(step, x, w.up), ffn.activation);
    const mask = await routingMask(step, x, router, shape, (row) => !isHeld(start + row));
    const masked = applyMask(step, h, mask, shape);
    const off = binary(step, 'sub', h, masked, { out: h });
    hessianAdd(gram, masked, { alpha: 1 / site.tokens });
    const missing = matmulT(step, off, w.down);
    gemm(step, masked.transpose(), missing, { alpha: 1 / site.tokens, beta: 1, out: cross });
  });
  const plain = work.empty('f32', [hidden, total]);
  copyInto(plain, w.down);
  const target = matmulT(work, held.whole, plain);
  let best: { error: number; lambda: number; down: Tensor } | undefined;
  let least = await relativeError(matmulT(work, held.masked, plain), target);
  for (const lambda of penalties) {
    const { factor, info } = cholesky(work, gram, lambda);
    if ((await info.int32())[0] === 0) {
      const change = choleskySolve(work, factor, cross);
      const down = binary(work, 'add', plain, change.transpose());
      const error = await relativeError(matmulT(work, held.masked, down), target);
      if (error < least) [least, best] = [error, { error, lambda, down }];
      work.free(change);
    }
    work.free(factor, info);
  }
  if (!best) return undefined;
  return { down: cast(scope, best.down, 'f32'), lambda: best.lambda };
}

/** [T, pieces]: 1 where a token uses an expert (shared ones: always), all 0 for tokens that are not `wanted`. */
export async function routingMask(
  s: Scope,
  x: Tensor,
  router: Router,
  shape: MoeShape,
  wanted: (row: number) => boolean = () => true,
): Promise<Tensor> {
  return pieceMask(s, await choose(s, scoresOf(s, x, router), shape.active).int32(), shape, wanted);
}

/** The same for choices [T, K] that are known. */
export function pieceMask(
  s: Scope,
  idx: Int32Array,
  shape: MoeShape,
  wanted: (row: number) => boolean = () => true,
): Tensor {
  const { routed, active } = shape;
  const count = pieces(shape);
  const tokens = idx.length / active;
  const mask = new Float32Array(tokens * count);
  for (let t = 0; t < tokens; t++) {
    if (!wanted(t)) continue;
    for (let k = 0; k < active; k++) mask[t * count + idx[t * active + k]!] = 1;
    mask.fill(1, t * count + routed, (t + 1) * count);
  }
  return s.from('f32', [tokens, count], mask);
}

/** h [T, capacity], in the order of the split, with the experts that are off set to zero. */
export function applyMask(s: Scope, h: Tensor, mask: Tensor, shape: MoeShape): Tensor {
  const [tokens, count] = mask.shape as [number, number];
  const masked = binary(s, 'mul', h.view(tokens, count, shape.width), mask.view(tokens, count, 1));
  return masked.view(tokens, count * shape.width);
}
