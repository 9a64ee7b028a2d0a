import { badUsage } from '../../base/errors.js';
import type { Block, Model } from '../../arch/types.js';

/** Places in `model.blocks`: from the first to before `to`. */
export interface Range {
  readonly from: number;
  readonly to: number;
}

/** What a block costs, as far as shards share it out: the weights of its linears, all experts counted. */
const weightOf = ({ linears }: Block): number =>
  linears.flat().reduce((sum, { inFeatures, outFeatures }) => sum + inFeatures * outFeatures, 0);

/** The blocks of each shard: neighbours, so that the heaviest shard is as light as can be. Follows from the model. */
export function shardRanges({ blocks }: Pick<Model, 'blocks'>, shards: number): Range[] {
  if (shards > blocks.length) {
    throw badUsage('--shards is larger than the model has blocks', {
      got: String(shards),
      expected: `at most ${blocks.length}`,
    });
  }
  return balanced(blocks.map(weightOf), shards);
}

/** Cuts `weights` into `n` runs, none empty, whose heaviest is as light as can be. */
export function balanced(weights: readonly number[], n: number): Range[] {
  const sums = weights.reduce<number[]>((all, weight) => [...all, all.at(-1)! + weight], [0]);
  // heaviest[k][end]: of the first `end` blocks in k + 1 runs; cut[k][end]: where the last of these runs begins.
  const heaviest = [sums];
  const cut: number[][] = [sums.map(() => 0)];
  for (let k = 1; k < n; k++) {
    heaviest.push([]);
    cut.push([]);
    for (let end = k + 1; end <= weights.length; end++) {
      heaviest[k]![end] = Infinity;
      for (let from = k; from < end; from++) {
        const most = Math.max(heaviest[k - 1]![from]!, sums[end]! - sums[from]!);
        if (most < heaviest[k]![end]!) [heaviest[k]![end], cut[k]![end]] = [most, from];
      }
    }
  }
  const ranges: Range[] = [];
  for (let k = n - 1, to = weights.length; k >= 0; k--) {
    const from = cut[k]![to]!;
    ranges.unshift({ from, to });
    to = from;
  }
  return ranges;
}
