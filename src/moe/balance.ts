import { binary, expertSort } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { choose, scoresOf, type Router } from './choose.js';
import type { Choice } from './shape.js';

/** About twenty reach a bound of 0.1, fifty one of 0.02. */
const mostSteps = 200;
/** Loads near what prices aim at from above: they aim at this part of the bound. */
const aimed = 0.9;
/** The first step of a price, in deviations of the scores. */
const firstStep = 0.1;

export interface Balanced {
  readonly router: Router;
  readonly bound: number;
  readonly steps: number;
  /** Largest load over the mean load, less 1, on the tokens that were balanced. */
  readonly maxVio: readonly [before: number, after: number];
}

/**
 * Lowers the selection bias of experts until none has more than 1 + `bound` times the mean load of the tokens x f32 [T, C].
 * As in loss-free balancing (Wang et al. 2024; DeepSeek-V3) a bias moves against the error of its expert's load; but only
 * experts at the bound pay a price, which is what the choice with the largest scores within capacities takes (linear
 * programming duality): the others stay as they are. Steps grow while their direction stays and are halved when it turns (Rprop).
 */
export async function balanceLoad(
  scope: Scope,
  x: Tensor,
  router: Router,
  choice: Choice,
  bound: number,
): Promise<Balanced> {
  using work = new Scope(scope.device);
  const scores = scoresOf(work, x, router);
  const [tokens, experts] = scores.shape as [number, number];
  const mean = (tokens * choice.active) / experts;
  const price = new Float64Array(experts);
  const size = new Float64Array(experts).fill(firstStep);
  const direction = new Float64Array(experts);
  const priced = (s: Scope, from: Tensor) => binary(s, 'sub', from, s.from('f32', [experts], Float32Array.from(price)).expand(...from.shape)); // prettier-ignore
  let before: number | undefined;
  for (let steps = 0; ; steps++) {
    using step = new Scope(scope.device);
    const offsets = await expertSort(step, choose(step, priced(step, scores), choice), experts).offsets.int32();
    const load = Array.from({ length: experts }, (_, e) => offsets[e + 1]! - offsets[e]!);
    const worst = Math.max(...load) / mean - 1;
    before ??= worst;
    if (worst <= bound || steps === mostSteps) {
      return {
        router: { weight: router.weight, bias: priced(scope, router.bias) },
        bound,
        steps,
        maxVio: [before, worst],
      };
    }
    load.forEach((count, e) => {
      const over = Math.sign(count - (1 + aimed * bound) * mean);
      if (over <= 0 && price[e] === 0) return;
      if (over * direction[e]! > 0) size[e]! *= 1.3;
      else if (over * direction[e]! < 0) size[e]! *= 0.5;
      direction[e] = over;
      price[e] = Math.max(0, price[e]! + over * size[e]!);
    });
  }
}
