import { Random } from '../base/rng.js';
import { binary, cholesky, choleskySolve, gather, gemm, hessianAdd, matmulT, normAdd, reduce, unary } from '../tensor/ops.js'; // prettier-ignore
import { Scope, type Tensor } from '../tensor/tensor.js';
import { oneHot } from './cluster.js';
import { choose, maskOf, RouterFitter, scoresOf, type Router } from './router.js';
import type { FfnWeights, Sample } from './sample.js';
import { columnNorms, energies } from './score.js';
import { pieces, type MoeShape } from './shape.js';

/** |a - b|^2 / |b|^2 over all rows. */
export async function relativeError(a: Tensor, b: Tensor): Promise<number> {
  using s = new Scope(a.device);
  const sums = s.zeros('f32', [2, 2]);
  normAdd(sums.at(0), binary(s, 'sub', a, b));
  normAdd(sums.at(1), b);
  const [difference, , size] = await sums.float32();
  return difference! / Math.max(size!, 1e-30);
}

/** How tokens spread over the routed experts. */
export interface Load {
  /** Share of the tokens that use each expert. */
  readonly share: readonly number[];
  /** max / mean - 1 (Wang et al. 2024). */
  readonly maxVio: number;
  /** Of the shares, in parts of the entropy of a uniform spread. */
  readonly entropy: number;
  /** Experts that fewer than 0.1 / R of the choices take. */
  readonly dead: number;
}

export function loadOf(idx: Int32Array, active: number, experts: number): Load {
  const counts = new Array<number>(experts).fill(0);
  for (const expert of idx) counts[expert]! += 1;
  const total = idx.length;
  const part = counts.map((count) => count / total);
  const entropy = part.reduce((sum, p) => sum - (p > 0 ? p * Math.log(p) : 0), 0);
  return {
    share: part.map((p) => p * active),
    maxVio: Math.max(...part) * experts - 1,
    entropy: experts > 1 ? entropy / Math.log(experts) : 1,
    dead: part.filter((p) => p < 0.1 / experts).length,
  };
}

/** The K largest of each row of [T, R], ties to the lower index: [T, K]. */
export function largest(values: Float32Array, experts: number, active: number): Int32Array {
  const tokens = values.length / experts;
  const idx = new Int32Array(tokens * active);
  const order = Array.from({ length: experts }, (_, e) => e);
  for (let t = 0; t < tokens; t++) {
    const row = values.subarray(t * experts, (t + 1) * experts);
    order.sort((a, b) => row[b]! - row[a]! || a - b);
    for (let k = 0; k < active; k++) idx[t * active + k] = order[k]!;
  }
  return idx;
}

/** What the router does on tokens that it was not fitted to. */
export interface RouterJudgement {
  readonly load: Load;
  /** Share of the routed experts' energy that the chosen ones keep, and that the best choice would keep. */
  readonly kept: number;
  readonly oracleKept: number;
  /** Share of the best K experts that are chosen. */
  readonly overlap: number;
}

/** `energy` f32 [T, R]: the energies of the experts on the tokens `x` [T, C]. */
export async function judgeRouter(x: Tensor, energy: Tensor, router: Router, active: number): Promise<RouterJudgement> {
  using s = new Scope(x.device);
  const [tokens, experts] = energy.shape as [number, number];
  const chosen = await choose(s, scoresOf(s, x, router), active).int32();
  const values = await energy.float32();
  const best = largest(values, experts, active);
  const [chosenMask, bestMask] = [maskOf(chosen, active, experts), maskOf(best, active, experts)];
  let [all, kept, oracle, both] = [0, 0, 0, 0];
  for (let i = 0; i < values.length; i++) {
    all += values[i]!;
    kept += values[i]! * chosenMask[i]!;
    oracle += values[i]! * bestMask[i]!;
    both += chosenMask[i]! * bestMask[i]!;
  }
  return {
    load: loadOf(chosen, active, experts),
    kept: kept / Math.max(all, 1e-30),
    oracleKept: oracle / Math.max(all, 1e-30),
    overlap: both / (tokens * active),
  };
}

/** Errors |y' - y|^2 / |y|^2 of the layer's output on held-out tokens, at the same number of neurons a token. */
export interface Baselines {
  /** The neurons with the largest contributions always, the mean of the others as a bias. */
  readonly staticBias: number;
  /** The same neurons with down_proj refitted by least squares. */
  readonly staticRefit: number;
  /** Experts drawn at random, the ridge router. */
  readonly randomSplit: number;
}

export async function baselines(
  sample: Sample,
  w: FfnWeights,
  shape: MoeShape,
  scores: Float32Array,
  router: { readonly intercept: boolean; readonly lambda: number },
  seed: number,
): Promise<Baselines> {
  using s = new Scope(sample.x.device);
  const { fit } = sample;
  const end = fit + sample.held;
  const h = { fit: sample.h.slice(0, 0, fit), held: sample.h.slice(0, fit, end) };
  const target = matmulT(s, h.held, w.down, { dtype: 'f32' });
  const budget = Math.round((shape.ffn * (shape.active + shape.shared)) / pieces(shape));
  const order = Int32Array.from(scores, (_, i) => i).sort((a, b) => scores[b]! - scores[a]! || a - b);
  const [on, off] = [order.slice(0, budget).sort(), order.slice(budget).sort()];
  if (off.length === 0) return { staticBias: 0, staticRefit: 0, randomSplit: 0 };
  const index = (list: Int32Array) => s.from('i32', [list.length], list);
  const [kept, lost] = [index(on), index(off)];
  const columns = { on: gather(s, w.down, kept, 1, 'f32'), off: gather(s, w.down, lost, 1, 'f32') };

  const plain = matmulT(s, gather(s, h.held, kept, 1), columns.on);
  const mean = reduce(s, 'mean', gather(s, h.fit, lost, 1), 0);
  const bias = matmulT(s, mean.view(1, -1), columns.off);
  const staticBias = await relativeError(binary(s, 'add', plain, bias), target);
  const staticRefit = await refitStatic(s, h, { kept, lost, columns }, target, plain);
  const randomSplit = await randomError(sample, w, shape, router, seed, target);
  return { staticBias, staticRefit, randomSplit };
}

async function refitStatic(
  s: Scope,
  h: { fit: Tensor; held: Tensor },
  { kept, lost, columns }: { kept: Tensor; lost: Tensor; columns: { on: Tensor; off: Tensor } },
  target: Tensor,
  plain: Tensor,
): Promise<number> {
  const x = gather(s, h.fit, kept, 1);
  const gram = s.zeros('f32', [x.dim(1), x.dim(1)]);
  const alpha = 1 / x.dim(0);
  hessianAdd(gram, x, { alpha });
  const missing = matmulT(s, gather(s, h.fit, lost, 1), columns.off);
  const cross = gemm(s, x.transpose(), missing, { alpha });
  const { factor, info } = cholesky(s, gram, 1e-2);
  if ((await info.int32())[0] !== 0) return NaN;
  const change = choleskySolve(s, factor, cross);
  const y = gemm(s, gather(s, h.held, kept, 1), change, { beta: 1, out: plain });
  return relativeError(y, target);
}

async function randomError(
  sample: Sample,
  w: FfnWeights,
  shape: MoeShape,
  { intercept, lambda }: { readonly intercept: boolean; readonly lambda: number },
  seed: number,
  target: Tensor,
): Promise<number> {
  using s = new Scope(sample.x.device);
  const { routed, active, shared, ffn } = shape;
  const random = new Random(seed, 3);
  const order = Int32Array.from({ length: ffn }, (_, i) => i);
  for (let i = ffn - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  // Neurons i of the random order: the first ones shared, the others dealt out in turn.
  const always = Math.floor((ffn * shared) / pieces(shape));
  const expertOf = new Int32Array(ffn).fill(-1);
  order.forEach((neuron, i) => (expertOf[neuron] = i < always ? -1 : (i - always) % routed));
  const member = new Float32Array(ffn * routed);
  expertOf.forEach((expert, i) => expert >= 0 && (member[i * routed + expert] = 1));
  const membership = s.from('f32', [ffn, routed], member);
  const norms = columnNorms(s, w.down);
  const parts = (from: number, to: number) => ({ x: sample.x.slice(0, from, to), h: sample.h.slice(0, from, to) });
  const [fit, held] = [parts(0, sample.fit), parts(sample.fit, sample.fit + sample.held)];
  const energy = gemm(s, energies(s, fit.h, norms), membership);
  const fitter = await RouterFitter.make(s, fit.x, { intercept, lambda, active, seed });
  const router = await fitter.ridge(s, unary(s, 'sqrt', energy));
  const chosen = maskOf(await choose(s, scoresOf(s, held.x, router), active).int32(), active, routed);
  const mask = s.from('f32', [sample.held, routed], chosen);
  const on = gemm(s, mask, membership.transpose());
  const sharedOn = s.from(
    'f32',
    [1, ffn],
    Float32Array.from(expertOf, (expert) => (expert < 0 ? 1 : 0)),
  );
  binary(s, 'add', on, sharedOn, { out: on });
  return relativeError(matmulT(s, binary(s, 'mul', held.h, on), w.down, { dtype: 'f32' }), target);
}

/** Energies of the routed experts on held-out tokens: f32 [held, R]. */
export function heldEnergies(
  s: Scope,
  sample: Sample,
  w: FfnWeights,
  rest: Int32Array,
  expertOf: Int32Array,
  experts: number,
): Tensor {
  // prettier-ignore
  const held = sample.h.slice(0, sample.fit, sample.fit + sample.held);
  const z = gather(s, energies(s, held, columnNorms(s, w.down)), s.from('i32', [rest.length], rest), 1);
  return gemm(s, z, s.from('f32', [rest.length, experts], oneHot(expertOf, experts)));
}
