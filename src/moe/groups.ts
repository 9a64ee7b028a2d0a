import { add, binary, choiceGradient, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { choose, scoresOf, type Router } from './choose.js';
import { clusterNeurons } from './cluster.js';
import { maskOf } from './masks.js';
import type { Choice, GroupLimit } from './shape.js';

/**
 * The experts of neurons, numbered anew so that those that tokens choose together stand in one group: balanced clusters of
 * the experts by what `router` chooses on x f32 [T, C] without a limit.
 */
export async function groupExperts(
  expertOf: Int32Array,
  x: Tensor,
  router: Router,
  { active, limit: { groups } }: Choice & { readonly limit: GroupLimit },
  seed: number,
): Promise<Int32Array> {
  using work = new Scope(x.device);
  const experts = router.weight.dim(0);
  const size = experts / groups;
  const chosen = maskOf(work, choose(work, scoresOf(work, x, router), { active }), experts);
  const groupOf = await clusterNeurons(work.device, chosen, new Int32Array(groups).fill(size), seed);
  const next = Int32Array.from({ length: groups }, (_, g) => g * size);
  const place = groupOf.map((g) => next[g]!++);
  return expertOf.map((e) => place[e]!);
}

/** Farther apart than scores ever are: in a soft choice nothing falls to what lies so far below the rest. */
const apart = 64;

export interface SoftChoice extends Choice {
  readonly temperature: number;
  readonly scale: number;
}

/**
 * `choiceGradient` under a limit: a soft choice of K among the experts of the groups that are open, and beside it one of
 * the open groups, by the sums of their two best scores, each worth what the token would take of it if it were open.
 * scores, c f32 [T, R]: f32 [T, R].
 */
export function limitedGradient(
  s: Scope,
  scores: Tensor,
  c: Tensor,
  { active, limit, ...soft }: SoftChoice & { readonly limit: GroupLimit },
): Tensor {
  using work = new Scope(s.device);
  const { groups, topGroups } = limit;
  const [tokens, experts] = scores.shape as [number, number];
  const size = experts / groups;
  const { value, best } = groupValues(work, scores, groups);
  const byGroup = (x: Tensor) => x.view(tokens, groups, size);

  const ds = s.zeros('f32', scores.shape);
  if (active < topGroups * size) {
    const open = maskOf(work, choose(work, value, { active: topGroups }), groups);
    const within = binary(work, 'add', byGroup(scores), open.view(tokens, groups, 1), { alpha: apart });
    add(work, ds, choiceGradient(work, within.view(tokens, experts), c, { active, ...soft }), ds);
  }
  if (topGroups < groups) {
    // What a token would take of a group: what lies above the least that it takes of those that are open, softly.
    const taken = maskOf(work, choose(work, scores, { active, limit }), experts);
    const least = reduce(work, 'min', binary(work, 'sub', scores, taken, { alpha: apart }), 1);
    const above = binary(work, 'sub', scores, least.view(-1, 1));
    unary(work, 'affine', above, 1 / soft.temperature, -apart / soft.temperature, above);
    unary(work, 'sigmoid', above, 0, 0, above);
    const worth = reduce(work, 'sum', byGroup(binary(work, 'mul', c, above)), 2);
    const gradient = choiceGradient(work, value, worth, { active: topGroups, ...soft });
    add(work, byGroup(ds), binary(work, 'mul', byGroup(best), gradient.view(tokens, groups, 1)), byGroup(ds));
  }
  return ds;
}

/** f32 [T, G]: sums of each group's two best scores; f32 [T, R]: 1 at these two. */
export function groupValues(s: Scope, scores: Tensor, groups: number): { value: Tensor; best: Tensor } {
  const [tokens, experts] = scores.shape as [number, number];
  const each = scores.view(tokens * groups, experts / groups);
  const first = reduce(s, 'max', each, 1);
  const best = binary(s, 'equal', each, first.view(-1, 1));
  const others = binary(s, 'sub', each, best, { alpha: 1e30 });
  const second = reduce(s, 'max', others, 1);
  add(s, best, binary(s, 'equal', others, second.view(-1, 1)), best);
  return { value: add(s, first, second).view(tokens, groups), best: best.view(tokens, experts) };
}

/**
 * The K experts with which a token keeps most of `values` [T, R] as far as a limit lets it: i32 [T, K]. Groups are worth
 * what lies above a threshold, the threshold is the least value that is kept then, in turns until no more is won.
 */
export function bestWithin(
  values: Float32Array,
  experts: number,
  { active, limit }: Choice & { readonly limit: GroupLimit },
): Int32Array {
  const { groups, topGroups } = limit;
  const size = experts / groups;
  const chosen = new Int32Array((values.length / experts) * active);
  const all = Array.from({ length: experts }, (_, e) => e);
  const everyGroup = Array.from({ length: groups }, (_, g) => g);
  for (let at = 0; at * experts < values.length; at++) {
    const row = values.subarray(at * experts, (at + 1) * experts);
    const order = all.toSorted((a, b) => row[b]! - row[a]! || a - b);
    let threshold = row[order[active - 1]!]!;
    for (let most = -1; ;) {
      const worth = everyGroup.map((g) => row.subarray(g * size, (g + 1) * size).reduce((sum, x) => sum + Math.max(x - threshold, 0), 0)); // prettier-ignore
      const open = new Set(everyGroup.toSorted((a, b) => worth[b]! - worth[a]! || a - b).slice(0, topGroups));
      const best = order.filter((e) => open.has(Math.floor(e / size))).slice(0, active);
      const kept = best.reduce((sum, e) => sum + row[e]!, 0);
      if (kept <= most) break;
      most = kept;
      threshold = row[best.at(-1)!]!;
      chosen.set(best, at * active);
    }
  }
  return chosen;
}
