import { badInput, bug } from '../base/errors.js';
import type { ExpertsCall, LinearCall } from '../nn/calls.js';
import type { Site } from '../arch/stream.js';
import type { Block } from '../arch/types.js';
import { binary, copyInto, gemm, hessianAdd, reduce, symmetrize, unary } from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';

/** What calibration knows of one input: its second moments. */
export interface Statistics {
  /** H = X'X / T, f32 [K, K], symmetric, both triangles. */
  readonly h: Tensor;
  /** diag H, on the device f32 [K] and here. */
  readonly diagonal: Tensor;
  readonly energy: Float32Array;
  /** T: tokens that were seen. */
  readonly tokens: number;
}

/** Statistics, or what stands in for them, of one stack of linears. */
export interface Evidence {
  readonly statistics: Statistics | undefined;
  readonly note?: string;
  /** Quantize by rounding alone (weighted with the statistics' energies). */
  readonly roundOnly?: boolean;
  /** Tokens that reached the linears, where the statistics are not theirs alone. */
  readonly tokens?: number;
  /** Where the linears stand, when their inputs are those of one call. */
  readonly block?: Block;
}

/** One Hessian of the input that the linears of a call share. Lives in `scope`. */
export async function captureLinear(site: Site, scope: Scope): Promise<Statistics> {
  const first = (site.linears as LinearCall['linears'])[0];
  if (site.kind !== 'linear' || first === undefined) throw bug('captureLinear at another call');
  const h = scope.zeros('f32', [first.inFeatures, first.inFeatures]);
  await site.each((call) => hessianAdd(h, call.x, { alpha: 1 / site.tokens }));
  return await finish(h, site.tokens, scope, first.name);
}

/** Rows of each expert: counts and, for the ops, offsets per batch as the calls carry them. */
export async function countTokens(site: Site, experts: number): Promise<number[]> {
  const counts = new Array<number>(experts).fill(0);
  await site.each(async (call) => {
    const offsets = await (call as ExpertsCall).order.offsets.int32();
    for (let e = 0; e < experts; e++) counts[e]! += offsets[e + 1]! - offsets[e]!;
  });
  return counts;
}

/**
 * Hessians [to - from, K, K] of experts from..to, each X_e'X_e / T_e over the tokens routed to it (zero where there are
 * none); both triangles.
 */
export async function captureExperts(
  site: Site,
  from: number,
  to: number,
  counts: readonly number[],
  scope: Scope,
): Promise<Tensor> {
  const k = (site.linears as ExpertsCall['linears'])[0]![0]!.inFeatures;
  const h = scope.zeros('f32', [to - from, k, k]);
  await site.each((call) => {
    hessianAdd(h, call.x, { offsets: (call as ExpertsCall).order.offsets.slice(0, from, to + 1) });
  });
  symmetrize(h);
  for (let e = from; e < to; e++) {
    const one = h.at(e - from);
    if (counts[e]! > 0) unary(scope, 'affine', one, 1 / counts[e]!, 0, one);
  }
  return h;
}

/** The Hessian over all rows, whichever expert they went to: mean of one row. */
export async function captureAll(site: Site, rows: number, scope: Scope): Promise<Tensor> {
  const k = (site.linears as ExpertsCall['linears'])[0]![0]!.inFeatures;
  const h = scope.zeros('f32', [k, k]);
  await site.each((call) => hessianAdd(h, call.x, { alpha: 1 / Math.max(rows, 1) }));
  symmetrize(h);
  return h;
}

async function finish(h: Tensor, tokens: number, scope: Scope, name: string): Promise<Statistics> {
  symmetrize(h);
  return await statisticsOf(h, tokens, scope, name);
}

/** Statistics of a finished symmetric H. Error: an input that is not finite, naming the linear. */
export async function statisticsOf(h: Tensor, tokens: number, scope: Scope, name: string): Promise<Statistics> {
  const k = h.dim(0);
  const diagonal = scope.empty('f32', [k]);
  copyInto(diagonal, diagonalOf(h));
  const energy = await diagonal.float32();
  const broken = energy.findIndex((value) => !Number.isFinite(value));
  if (broken !== -1) {
    throw badInput('The calibration inputs of a linear are not finite', {
      where: `${name}, input channel ${broken}`,
      got: String(energy[broken]),
      hint: 'The source checkpoint itself overflows on this text: check it with `deepseek-convert score`, or try --states f32.',
    });
  }
  return { h, diagonal, energy, tokens };
}

/** A view of the diagonal of X [K, K]. */
export const diagonalOf = (x: Tensor): Tensor =>
  new Tensor(x.storage, x.byteOffset, x.dtype, [x.dim(0)], [x.strides[0]! + x.strides[1]!]);

/** H = (1 - share) H + share other, in place. */
export function blend(h: Tensor, other: Tensor, share: number): void {
  using scope = new Scope(h.device);
  unary(scope, 'affine', h, 1 - share, 0, h);
  binary(scope, 'add', h, other, { alpha: share, out: h });
}

/** Parts of the rows of W [N, K], alike, whose temporaries are of moderate size. */
export function rowParts(w: Tensor): [from: number, to: number][] {
  const [n, k] = [w.dim(0), w.dim(1)];
  const most = Math.max(1, Math.floor((w.device.kind === 'cpu' ? 2 ** 24 : 2 ** 26) / k));
  const count = Math.ceil(n / most);
  return Array.from({ length: count }, (_, i) => [Math.floor((n * i) / count), Math.floor((n * (i + 1)) / count)]);
}

/** The sums of a * b by row, f32 [N]. */
export function rowDots(scope: Scope, a: Tensor, b: Tensor): Tensor {
  using work = new Scope(a.device);
  return reduce(scope, 'sum', binary(work, 'mul', a, b), 1);
}

/**
 * d H d' for each row d of D f32 [N, K]: its output error; f32 [N] on the host. `roughly`: to three digits, for D that no
 * one has fitted to H, whose terms do not cancel.
 */
export async function rowErrors(d: Tensor, h: Tensor, roughly = false): Promise<Float32Array> {
  using scope = new Scope(d.device);
  const out = scope.empty('f32', [d.dim(0)]);
  for (const [from, to] of rowParts(d)) {
    using work = new Scope(d.device);
    const part = d.slice(0, from, to);
    copyInto(out.slice(0, from, to), rowDots(work, gemm(work, part, h, { fast: roughly || 'split' }), part));
  }
  return await out.float32();
}
