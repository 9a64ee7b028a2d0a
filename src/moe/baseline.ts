import { Random } from '../base/rng.js';
import { binary, gather, gemm, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { clusterNeurons } from './cluster.js';
import { groupExperts } from './groups.js';
import { membership } from './masks.js';
import type { Measured } from './measured.js';
import type { Restructured, SplitKind, SplitOptions } from './restructured.js';
import { evenRows } from './sample.js';
import { columnMeans, energies } from './score.js';
import { chooseShared, evenCapacities } from './shared.js';
import { layOut, sharedNeurons } from './split.js';

/** Neurons that count as active on a token, and tokens that are looked at: K_a of CMoE. */
const [activeNeurons, markerTokens] = [10, 4096] as const;

/**
 * The baselines as mixtures of the same shape, so that whole models are compared:
 * - static: the experts that are on are the same for every token, and hold the neurons with the largest contributions.
 *   Needs a selection bias, whose order alone decides.
 * - random: neurons dealt out at random, shared ones too; ridge router.
 * - cmoe: after CMoE (Pei et al. 2025): shared neurons by how often they are among a token's ten largest, balanced
 *   clusters of these markers, routed by each cluster's representative neuron. Their router computes that neuron; a
 *   container's is linear, so ridge regression stands in for it.
 */
export async function baselineSplit(
  kind: Exclude<SplitKind, 'fitted'>,
  scope: Scope,
  measured: Measured,
  options: SplitOptions,
): Promise<Restructured> {
  const { shape, seed } = options;
  const { h, scores, fitter } = measured;
  using work = new Scope(scope.device);
  const room = sharedNeurons(shape);
  const finish = (shared: Int32Array, rest: Int32Array, expertOf: Int32Array, router: Restructured['router']) => ({
    split: layOut(shape, shared, rest, expertOf),
    ...{ router, scores, expertOf, rest },
  });

  if (kind === 'static') {
    const { shared, rest } = chooseShared(scores, room);
    const strongest = rest.slice().sort((a, b) => scores[b]! - scores[a]! || a - b);
    const expertOf = inTurn(evenCapacities(rest.length, shape.routed));
    const bias = Float32Array.from({ length: shape.routed }, (_, e) => shape.routed - e);
    const router = {
      weight: scope.zeros('f32', [shape.routed, measured.x.dim(1)]),
      bias: scope.from('f32', [shape.routed], bias),
    };
    return finish(shared, strongest, expertOf, router);
  }

  if (kind === 'random') {
    const order = shuffled(shape.ffn, new Random(seed, 3));
    const [shared, rest] = [order.slice(0, room).sort(), order.slice(room)];
    const expertOf = inTurn(evenCapacities(rest.length, shape.routed));
    const all = energies(work, h, measured.norms);
    const z = gather(work, all, work.from('i32', [rest.length], rest), 1);
    const energy = gemm(work, z, membership(work, expertOf, shape.routed));
    return finish(shared, rest, expertOf, await fitter.ridge(scope, unary(work, 'sqrt', energy)));
  }

  const marked = markers(work, h);
  const rates = await columnMeans(work, marked).float32();
  const { shared, rest } = chooseShared(rates, room);
  const part = gather(work, marked, work.from('i32', [rest.length], rest), 1);
  const routerInto = async (s: Scope, experts: Int32Array) => {
    const chosen = await representatives(work, part, experts, shape.routed);
    const idx = work.from('i32', [shape.routed], chosen.map((i) => rest[i]!)); // prettier-ignore
    return await fitter.ridge(s, unary(work, 'abs', gather(work, h, idx, 1)));
  };
  const clusters = await clusterNeurons(scope.device, part, evenCapacities(rest.length, shape.routed), seed);
  const { active, limit } = shape;
  const expertOf = limit ? await groupExperts(clusters, measured.x, await routerInto(work, clusters), { active, limit }, seed) : clusters; // prettier-ignore
  return finish(shared, rest, expertOf, await routerInto(scope, expertOf));
}

/** Places filled one after another. */
const inTurn = (capacities: Int32Array): Int32Array =>
  Int32Array.from([...capacities].flatMap((size, e) => Array<number>(size).fill(e)));

function shuffled(n: number, random: Random): Int32Array {
  const order = Int32Array.from({ length: n }, (_, i) => i);
  for (let i = n - 1; i > 0; i--) {
    const j = random.below(i + 1);
    [order[i], order[j]] = [order[j]!, order[i]!];
  }
  return order;
}

/** f32 [rows, I]: 1 where a neuron is among the largest of its token (and where it equals one); tokens evenly spread. */
function markers(s: Scope, h: Tensor): Tensor {
  const sizes = evenRows(s, h, markerTokens);
  unary(s, 'abs', sizes, 0, 0, sizes);
  // The largest of a row goes far below the others, as often as there are active ones; then what lies there is marked.
  const far = 1e30;
  for (let i = 0; i < Math.min(activeNeurons, h.dim(1)); i++) {
    using pass = new Scope(s.device);
    const top = reduce(pass, 'max', sizes, 1).view(-1, 1);
    binary(s, 'sub', sizes, binary(pass, 'equal', sizes, top), { alpha: far, out: sizes });
  }
  unary(s, 'affine', sizes, -1 / far, 0, sizes);
  return unary(s, 'clamp', sizes, 0, 1, sizes);
}

/** Of each cluster the neuron whose markers are most like the cluster's mean (cosine). */
async function representatives(s: Scope, marked: Tensor, expertOf: Int32Array, experts: number): Promise<Int32Array> {
  const sums = gemm(s, marked, membership(s, expertOf, experts));
  const like = await gemm(s, marked.transpose(), sums).float32();
  const counts = await reduce(s, 'sum', marked, 0).float32();
  const chosen = new Int32Array(experts).fill(-1);
  const best = new Float64Array(experts).fill(-Infinity);
  expertOf.forEach((expert, i) => {
    const value = like[i * experts + expert]! / Math.sqrt(Math.max(counts[i]!, 1));
    if (value > best[expert]!) [best[expert], chosen[expert]] = [value, i];
  });
  return chosen;
}
