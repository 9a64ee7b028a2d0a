import { assign, binary, cast, choleskyRetry, choleskySolve, gather, gemm, hessianAdd, matmulT, reduce, unary } from '../../tensor/ops.js'; // prettier-ignore
import { Scope, type Tensor } from '../../tensor/tensor.js';
import type { FfnWeights } from '../sample.js';

/**
 * Which neuron of `other` stands for each neuron of `base`: the assignment with the largest sum of inner products of
 * their rows of gate and up and columns of down (weight matching, Ainsworth et al. 2023, as M-SMoE merges experts), each
 * matrix counted in units of its size.
 */
export async function alignNeurons(base: FfnWeights, other: FfnWeights): Promise<Int32Array> {
  using s = new Scope(base.gate.device);
  const width = base.gate.dim(0);
  const likeness = s.zeros('f32', [width, width]);
  const pairs: [Tensor, Tensor][] = [
    [base.gate, other.gate],
    [base.up, other.up],
    [base.down.transpose(), other.down.transpose()],
  ];
  for (const [a, b] of pairs) {
    const size = Math.sqrt((await sizeOf(a)) * (await sizeOf(b)));
    if (size > 0) gemm(s, a, b.transpose(), { alpha: 1 / size, beta: 1, out: likeness });
  }
  return await assign(likeness, new Int32Array(width).fill(1), new Float64Array(width));
}

async function sizeOf(x: Tensor): Promise<number> {
  using s = new Scope(x.device);
  return (await reduce(s, 'sumsq', cast(s, x, 'f32').view(1, -1), 1).float32())[0]!;
}

/**
 * One network in place of several: the mean of their weights by `masses`, after the neurons of each were brought into
 * the order of the heaviest's. f32.
 */
export async function mergeNetworks(
  scope: Scope,
  networks: readonly FfnWeights[],
  masses: readonly number[],
): Promise<FfnWeights> {
  const heaviest = masses.indexOf(Math.max(...masses));
  const all = [...masses.keys()];
  const base = networks[heaviest]!;
  const sum = {
    gate: scope.zeros('f32', base.gate.shape),
    up: scope.zeros('f32', base.up.shape),
    down: scope.zeros('f32', base.down.shape),
  };
  for (const [i, own] of networks.entries()) {
    using work = new Scope(scope.device);
    const order = i === heaviest ? undefined : await alignNeurons(base, own);
    const idx = order && work.from('i32', [order.length], order);
    const put = (into: Tensor, x: Tensor, axis: 0 | 1) =>
      binary(work, 'add', into, idx ? gather(work, x, idx, axis) : x, { alpha: shareOf(i, all, masses), out: into });
    put(sum.gate, own.gate, 0);
    put(sum.up, own.up, 0);
    put(sum.down, own.down, 1);
  }
  return sum;
}

/** What part of the mass of all members one has; without any, equal parts. */
export function shareOf(member: number, members: readonly number[], masses: ArrayLike<number>): number {
  const total = members.reduce((sum, e) => sum + masses[e]!, 0);
  return total > 0 ? masses[member]! / total : 1 / members.length;
}

/** Penalty of the merged rows' correction, in parts of the mean diagonal. */
const lambda = 1e-2;

/**
 * Router rows of merged experts, f32 [M, C]: their mean by masses, corrected so that a merged expert's logit is the log of
 * the sum of its members' exponentials, which under a softmax gives it the sum of their weights (ridge regression of what
 * the mean row misses on the rows of x f32 [T, C]). `router` f32 [E, C]; `clusters` the members of each.
 */
export async function mergeRows(
  scope: Scope,
  router: Tensor,
  clusters: readonly (readonly number[])[],
  masses: ArrayLike<number>,
  x: Tensor,
): Promise<Tensor> {
  using s = new Scope(scope.device);
  const [experts, channels] = router.shape as [number, number];
  const matrix = (value: (expert: number, members: readonly number[]) => number) => {
    const values = new Float32Array(clusters.length * experts);
    clusters.forEach((members, c) => members.forEach((e) => (values[c * experts + e] = value(e, members))));
    return s.from('f32', [clusters.length, experts], values);
  };
  const mean = gemm(
    scope,
    matrix((e, members) => shareOf(e, members, masses)),
    router,
  );
  const logits = matmulT(s, x, router);
  const top = reduce(s, 'max', logits, 1).view(-1, 1);
  const exponentials = unary(s, 'exp', binary(s, 'sub', logits, top));
  const sums = matmulT(
    s,
    exponentials,
    matrix(() => 1),
  );
  const wanted = binary(s, 'add', unary(s, 'log', unary(s, 'clamp', sums, 1e-30, Infinity)), top);
  const missed = binary(s, 'sub', wanted, matmulT(s, x, mean));
  const h = s.zeros('f32', [channels, channels]);
  const alpha = 1 / x.dim(0);
  hessianAdd(h, x, { alpha });
  const { factor } = await choleskyRetry(s, h, lambda);
  const correction = choleskySolve(s, factor, gemm(s, x.transpose(), missed, { alpha }));
  return binary(s, 'add', mean, correction.transpose(), { out: mean });
}
