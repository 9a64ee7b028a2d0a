import type { FloatDType } from '../base/dtype.js';
import { binary, cast, cholesky, choleskySolve, gather, gemm, hessianAdd, matmulT } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { baselineSplit } from './baseline.js';
import { relativeError } from './judge.js';
import { heldNeurons } from './masks.js';
import type { Measured } from './measured.js';
import { outputOf } from './refit.js';
import type { SplitKind, SplitOptions } from './restructured.js';
import { heldPart, type FfnWeights } from './sample.js';
import { columnMeans } from './score.js';
import { pieces, type MoeShape } from './shape.js';
import { arrange } from './split.js';

/** Errors |y' - y|^2 / |y|^2 of the layer's output on held-out tokens, at the same number of neurons a token. */
interface StaticErrors {
  /** The neurons with the largest contributions always, the mean of the others as a bias. */
  readonly staticBias: number;
  /** The same neurons with down_proj refitted by least squares. */
  readonly staticRefit: number;
}

/** Products run at full speed where sides are whole tiles: lists of neurons are filled up with zero neurons (-1). */
const tile = 64;
const fullTiles = (n: number): number => Math.ceil(n / tile) * tile;
const filled = (list: Int32Array): Int32Array => {
  const whole = new Int32Array(fullTiles(list.length)).fill(-1);
  whole.set(list);
  return whole;
};

async function staticErrors(
  { sample, h: fit, scores }: Measured,
  w: FfnWeights,
  shape: MoeShape,
  target: Tensor,
): Promise<StaticErrors> {
  using s = new Scope(target.device);
  const h = { fit, held: heldPart(sample).h };
  const budget = Math.round((shape.ffn * (shape.active + shape.shared)) / pieces(shape));
  const order = Int32Array.from(scores, (_, i) => i).sort((a, b) => scores[b]! - scores[a]! || a - b);
  const [on, off] = [order.slice(0, budget).sort(), order.slice(budget).sort()];
  if (off.length === 0) return { staticBias: 0, staticRefit: 0 };
  const index = (list: Int32Array) => s.from('i32', [fullTiles(list.length)], filled(list));
  const [kept, lost] = [index(on), index(off)];
  const columns = { on: gather(s, w.down, kept, 1, 'f32'), off: gather(s, w.down, lost, 1, 'f32') };

  const plain = matmulT(s, gather(s, h.held, kept, 1), columns.on, { fast: 'split' });
  const mean = columnMeans(s, gather(s, h.fit, lost, 1));
  const bias = matmulT(s, mean.view(1, -1), columns.off);
  const staticBias = await relativeError(binary(s, 'add', plain, bias), target);
  const staticRefit = await refitStatic(s, h, { kept, lost, columns }, w.down.dtype as FloatDType, target, plain, on.length); // prettier-ignore
  return { staticBias, staticRefit };
}

/** Ridge penalty relative to the mean of the diagonal. */
const penalty = 1e-2;

async function refitStatic(
  s: Scope,
  h: { fit: Tensor; held: Tensor },
  { kept, lost, columns }: { kept: Tensor; lost: Tensor; columns: { on: Tensor; off: Tensor } },
  dtype: FloatDType,
  target: Tensor,
  plain: Tensor,
  neurons: number,
): Promise<number> {
  // In the precision of the forward pass, as the method's own refit is.
  const x = gather(s, h.fit, kept, 1, dtype);
  const gram = s.zeros('f32', [x.dim(1), x.dim(1)]);
  const alpha = 1 / x.dim(0);
  hessianAdd(gram, x, { alpha });
  const missing = matmulT(s, gather(s, h.fit, lost, 1, dtype), cast(s, columns.off, dtype));
  const cross = gemm(s, x.transpose(), missing, { alpha, dtype: 'f32' });
  // The mean of the diagonal is that of the neurons there are.
  const { factor, info } = cholesky(s, gram, (penalty * gram.dim(0)) / neurons);
  if ((await info.int32())[0] !== 0) return NaN;
  const change = choleskySolve(s, factor, cross);
  const y = gemm(s, gather(s, h.held, kept, 1), change, { beta: 1, out: plain, fast: 'split' });
  return relativeError(y, target);
}

export interface BaselineErrors extends StaticErrors {
  /** Experts drawn at random, the ridge router. */
  readonly randomSplit: number;
  /** A split after CMoE, without refit. */
  readonly cmoe: number;
}

/** `target`: the layer's output on held-out tokens, f32 [held, C]. */
export async function baselineErrors(
  measured: Measured,
  w: FfnWeights,
  options: SplitOptions,
  target: Tensor,
): Promise<BaselineErrors> {
  const split = async (kind: Exclude<SplitKind, 'fitted'>): Promise<number> => {
    using work = new Scope(target.device);
    const made = await baselineSplit(kind, work, measured, options);
    const { masked } = heldNeurons(work, measured.sample, made);
    return await relativeError(outputOf(work, masked, cast(work, arrange(work, made.split, w).down, 'f32')), target);
  };
  return {
    ...(await staticErrors(measured, w, options.shape, target)),
    cmoe: await split('cmoe'),
    randomSplit: await split('random'),
  };
}
