import type { MoeLayerSpec } from '../../nn/moe.js';
import { binary, copyInto, gather, normAdd, reduce } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { keptBy, loadOf, type Kept, type Load } from '../judge.js';
import { importance, keepLargest, type ExpertUse } from './importance.js';
import { allOutputs, chooseExperts, eachPart, routedOutput, rowsFor, type RoutedWeights } from './layer.js';

/** |y' - y|^2 / |y|^2 of the routed experts' output. */
export interface SurgeryErrors {
  readonly output: number;
  /** Of plain pruning to the same number: by REAP, by how often experts are chosen, by chance. */
  readonly reap: number;
  readonly frequency: number;
  readonly random: number;
}

interface Judged {
  readonly m: MoeLayerSpec;
  readonly before: RoutedWeights;
  readonly after: { readonly moe: MoeLayerSpec; readonly weights: RoutedWeights };
  readonly use: ExpertUse;
  readonly seed: number;
  readonly groups: number;
  /** Tokens that nothing was decided on, f32 [T, C]. */
  readonly x: Tensor;
}

export async function judgeLayer({ m, before, after, use, seed, groups, x }: Judged): Promise<{
  readonly errors: SurgeryErrors;
  readonly load: { readonly before: Load; readonly after: Load };
  readonly router: { readonly before: Kept; readonly after: Kept };
}> {
  const keep = after.moe.experts.length;
  const pruned = async (by: 'reap' | 'frequency' | 'random') => {
    using scope = new Scope(x.device);
    const kept = keepLargest(importance(use, by, seed), keep, groups);
    return await errorOf(m, before, after.moe, selected(scope, before, kept), x);
  };
  return {
    errors: {
      output: await errorOf(m, before, after.moe, after.weights, x),
      reap: await pruned('reap'),
      frequency: await pruned('frequency'),
      random: await pruned('random'),
    },
    load: { before: await loadOn(m, before, x), after: await loadOn(after.moe, after.weights, x) },
    router: { before: await keptOn(m, before, x), after: await keptOn(after.moe, after.weights, x) },
  };
}

/** The same layer with some of its experts. */
function selected(s: Scope, w: RoutedWeights, kept: readonly number[]): RoutedWeights {
  const idx = s.from('i32', [kept.length], Int32Array.from(kept));
  const stack = (all: Tensor) => gather(s, all.view(all.dim(0), -1), idx).view(kept.length, all.dim(1), all.dim(2));
  return {
    router: gather(s, w.router, idx),
    bias: w.bias && gather(s, w.bias.view(-1, 1), idx).view(-1),
    ...{ gate: stack(w.gate), up: stack(w.up), down: stack(w.down) },
  };
}

async function errorOf(
  m: MoeLayerSpec,
  before: RoutedWeights,
  moe: MoeLayerSpec,
  after: RoutedWeights,
  x: Tensor,
): Promise<number> {
  using scope = new Scope(x.device);
  const sums = scope.zeros('f32', [2, 2]);
  await eachPart(x, before, (s, part) => {
    const wanted = routedOutput(s, m, before, part);
    normAdd(sums.at(0), binary(s, 'sub', routedOutput(s, moe, after, part), wanted));
    normAdd(sums.at(1), wanted);
  });
  const [difference, , size] = await sums.float32();
  return difference! / Math.max(size!, 1e-30);
}

async function loadOn(m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Promise<Load> {
  const chosen = new Int32Array(x.dim(0) * m.route.topK);
  await eachPart(x, w, async (s, part, from) => {
    chosen.set(await chooseExperts(s, m, w, part).idx.int32(), from * m.route.topK);
  });
  return loadOf(chosen, m.route.topK, m.experts.length);
}

/** Tokens on which all experts are run, to know the best ones. */
const comparedTokens = 2048;

/** Energies are |E(x)|^2, without the router's weight; limits to groups hold for the best ones as well. */
export async function keptOn(m: MoeLayerSpec, w: RoutedWeights, x: Tensor): Promise<Kept> {
  const { topK: active, groups = 1, topGroups = groups } = m.route;
  const experts = m.experts.length;
  using scope = new Scope(x.device);
  const tokens = Math.min(x.dim(0), comparedTokens);
  const energy = scope.empty('f32', [tokens, experts]);
  const chosen = new Int32Array(tokens * active);
  const part = async (s: Scope, rows: Tensor, from: number): Promise<void> => {
    const squares = reduce(s, 'sumsq', allOutputs(s, m, w, rows).view(-1, rows.dim(1)), 1);
    copyInto(energy.slice(0, from, from + rows.dim(0)), squares.view(experts, rows.dim(0)).transpose());
    chosen.set(await chooseExperts(s, m, w, rows).idx.int32(), from * active);
  };
  await eachPart(x.slice(0, 0, tokens), w, part, rowsFor(experts, x.dim(1)));
  return await keptBy(energy, chosen, { active, ...(topGroups < groups && { limit: { groups, topGroups } }) });
}
