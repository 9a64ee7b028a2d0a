import { Random } from '../../base/rng.js';
import type { MoeLayerSpec } from '../../nn/moe.js';
import { gather, reduce } from '../../tensor/ops.js';
import type { Tensor } from '../../tensor/tensor.js';
import { chooseExperts, eachPart, expertOutputs, type RoutedWeights } from './layer.js';
import type { ExpertMeasure } from './options.js';

/** What the experts of a layer do on the tokens that the router sends them; g is the router's weight. */
export interface ExpertUse {
  /** Tokens that each expert gets, of `tokens` in all. */
  readonly counts: Float64Array;
  /** Sums over them of |E(x)|, g |E(x)| and g^2 |E(x)|^2. */
  readonly activations: Float64Array;
  readonly norms: Float64Array;
  readonly energies: Float64Array;
  readonly tokens: number;
}

/** On the rows of x [T, C]. */
export async function measureUse(m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Promise<ExpertUse> {
  const experts = m.experts.length;
  const sums = () => new Float64Array(experts);
  const use = { counts: sums(), activations: sums(), norms: sums(), energies: sums(), tokens: x.dim(0) };
  await eachPart(x, w, async (s, part) => {
    const choice = chooseExperts(s, m, w, part);
    const squares = reduce(s, 'sumsq', expertOutputs(s, m, w, part, choice.order), 1);
    const weights = gather(s, choice.w.view(-1, 1), choice.order.slots);
    const [square, g, offsets] = [await squares.float32(), await weights.float32(), await choice.order.offsets.int32()];
    for (let e = 0; e < experts; e++) {
      for (let r = offsets[e]!; r < offsets[e + 1]!; r++) {
        const norm = Math.sqrt(square[r]!);
        use.counts[e]! += 1;
        use.activations[e]! += norm;
        use.norms[e]! += g[r]! * norm;
        use.energies[e]! += (g[r]! * norm) ** 2;
      }
    }
  });
  return use;
}

/**
 * What each expert is worth. `reap`: the mean of g |E(x)| over the tokens that it gets (router-weighted expert activation
 * pruning, Lasby et al. 2025): what these tokens would miss, however few they are. `activation`: the same without g (Liu
 * et al. 2026). `energy`: the sum of (g |E(x)|)^2 over all tokens. Experts without tokens are worth nothing.
 */
export function importance(use: ExpertUse, by: ExpertMeasure, seed: number): Float64Array {
  const { counts, activations, norms, energies } = use;
  const mean = (sums: Float64Array) => sums.map((sum, e) => sum / Math.max(counts[e]!, 1));
  switch (by) {
    case 'reap':
      return mean(norms);
    case 'activation':
      return mean(activations);
    case 'energy':
      return energies;
    case 'frequency':
      return counts;
    case 'random': {
      const random = new Random(seed, 5);
      return counts.map(() => random.uniform());
    }
  }
}

/** The `keep` experts with the largest values, the same number of each group; ties to the lower index. Ascending. */
export function keepLargest(values: ArrayLike<number>, keep: number, groups: number): number[] {
  const size = values.length / groups;
  return Array.from({ length: groups }, (_, g) => {
    const group = Array.from({ length: size }, (_, i) => g * size + i);
    group.sort((a, b) => values[b]! - values[a]! || a - b);
    return group.slice(0, keep / groups).sort((a, b) => a - b);
  }).flat();
}
