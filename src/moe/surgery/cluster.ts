import type { MoeLayerSpec } from '../../nn/moe.js';
import { gemm } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { allOutputs, eachPart, rowsFor, type RoutedWeights } from './layer.js';

/**
 * Mean squared distances |E_i(x) - E_j(x)|^2 over the rows of x [T, C], every expert on every row (as in HC-SMoE, Chen et
 * al. 2024, which compares mean outputs): what taking one expert for another costs. [E, E], row by row.
 */
export async function outputDistances(m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Promise<Float64Array> {
  using scope = new Scope(x.device);
  const experts = m.experts.length;
  const [tokens, channels] = x.shape as [number, number];
  const gram = scope.zeros('f32', [experts, experts]);
  await eachPart(
    x,
    w,
    (s, part) => {
      const outputs = allOutputs(s, m, w, part).view(experts, -1);
      gemm(s, outputs, outputs.transpose(), { beta: 1, alpha: 1 / tokens, out: gram });
    },
    rowsFor(experts, channels),
  );
  const g = await gram.float32();
  const own = (e: number) => g[e * experts + e]!;
  return Float64Array.from(g, (inner, i) => Math.max(own(Math.floor(i / experts)) + own(i % experts) - 2 * inner, 0));
}

/**
 * Agglomerative clustering with Ward's linkage under masses (Ward 1963, updated after Lance & Williams 1967): the two
 * clusters are joined whose means' squared distance times a b / (a + b) is smallest, which is what the sum of
 * mass |x - mean|^2 grows by. `distances` [n, n] are squared ones. Items of different groups are never joined, and each
 * group ends with `count / groups` clusters. Members ascend, clusters by their first member.
 */
export function ward(distances: Float64Array, masses: ArrayLike<number>, count: number, groups: number): number[][] {
  const n = masses.length;
  const size = n / groups;
  return Array.from({ length: groups }, (_, g) => {
    const items = Array.from({ length: size }, (_, i) => g * size + i);
    return join(items, distances, masses, count / groups);
  }).flat();
}

function join(items: readonly number[], distances: Float64Array, masses: ArrayLike<number>, count: number): number[][] {
  const n = masses.length;
  const clusters = items.map((item) => ({ members: [item], mass: masses[item]! }));
  const d = items.map((a) => items.map((b) => distances[a * n + b]!));
  // Where a mass is zero joining costs nothing: then the nearest are joined.
  const cost = (i: number, j: number): [number, number] => {
    const [a, b] = [clusters[i]!.mass, clusters[j]!.mass];
    return [a + b > 0 ? (d[i]![j]! * a * b) / (a + b) : 0, d[i]![j]!];
  };
  while (clusters.length > count) {
    let [best, least]: [[number, number], [number, number]] = [[0, 1], cost(0, 1)];
    for (let i = 0; i < clusters.length; i++) {
      for (let j = i + 1; j < clusters.length; j++) {
        const c = cost(i, j);
        if (c[0] < least[0] || (c[0] === least[0] && c[1] < least[1])) [best, least] = [[i, j], c];
      }
    }
    const [i, j] = best;
    const [a, b] = [clusters[i]!, clusters[j]!];
    const mass = a.mass + b.mass;
    const [p, q] = mass > 0 ? [a.mass / mass, b.mass / mass] : [0.5, 0.5];
    for (let k = 0; k < clusters.length; k++) {
      d[i]![k] = d[k]![i] = k === i ? 0 : p * d[i]![k]! + q * d[j]![k]! - p * q * d[i]![j]!;
    }
    clusters[i] = { members: [...a.members, ...b.members].sort((x, y) => x - y), mass };
    clusters.splice(j, 1);
    d.splice(j, 1);
    for (const row of d) row.splice(j, 1);
  }
  return clusters.map(({ members }) => members).sort((a, b) => a[0]! - b[0]!);
}
