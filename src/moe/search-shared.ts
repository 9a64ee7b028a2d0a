import { badUsage } from '../base/errors.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { CalibrationSet } from '../arch/calibration.js';
import { forwardContext } from '../arch/context.js';
import type { OpenModel } from '../arch/open.js';
import type { Site } from '../arch/stream.js';
import type { Block } from '../arch/types.js';
import { WeightReader } from '../arch/weights.js';
import type { Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { cast, copyInto, gather } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { relativeError } from './judge.js';
import { applyMask, routingMask } from './masks.js';
import { measure } from './measured.js';
import { Activations } from './mixture.js';
import { ffnOf, makePlan, type MoePlan, type MoeRecipe } from './plan.js';
import { outputOf, refitDown } from './refit.js';
import { restructure } from './restructure.js';
import type { SplitOptions } from './restructured.js';
import { heldOut, heldPart, neurons, sampleBytes, tokensThatFit, type FfnWeights, type Sample } from './sample.js';
import { arrange } from './split.js';

/** One number of shared experts: the mixture that it makes at the same number of neurons a token, and what it loses. */
export interface SharedTrial {
  readonly shared: number;
  readonly experts: number;
  readonly active: number;
  /** |y' - y|^2 / |y|^2 of the feed-forward output on held-out tokens, for each of the layers looked at. */
  readonly errors: readonly number[];
  readonly error: number;
}

export interface SharedSearch {
  readonly layers: readonly number[];
  readonly tokens: number;
  readonly trials: readonly SharedTrial[];
  readonly best: SharedTrial;
}

export interface SearchOptions {
  readonly recipe: MoeRecipe;
  readonly split: Omit<SplitOptions, 'shape' | 'intercept'>;
  readonly refit: boolean;
  readonly dtype: 'f32' | 'bf16';
  readonly budget: number | undefined;
  readonly torch: boolean;
  readonly resumeHint: string;
}

/** Tokens and rounds of a trial: enough to tell numbers apart, a fraction of what the conversion takes. */
const [trialTokens, trialRounds] = [16_384, 3] as const;
/** Where in the model layers are looked at. */
const places = [1 / 6, 1 / 2, 5 / 6];

/**
 * Numbers of shared experts to try for `recipe`, which has the container's default number: parts, and those that are on,
 * stay as many. Powers of two up to a quarter of the parts; every one leaves an expert to route to.
 */
export function sharedCandidates(recipe: MoeRecipe, { container, shape }: MoePlan): MoeRecipe[] {
  const { min, max } = container.shared;
  if (max === 0) throw badUsage(`The container ${container.name} cannot have shared experts`, { got: '--shared auto', expected: '--shared 0' }); // prettier-ignore
  if (recipe.method !== 'split' || shape.active === shape.routed) {
    throw badUsage('--shared auto weighs what experts that are off cost: here none is', {
      got: `--method ${recipe.method}, ${shape.active} of ${shape.routed} experts active`,
    });
  }
  const [parts, on] = [shape.routed + shape.shared, shape.active + shape.shared];
  return [0, 1, 2, 4, 8, 16, 32, 64]
    .filter((shared) => shared >= min && shared <= Math.min(max, Math.max(min, parts / 4), on - 1))
    .map((shared) => ({ ...recipe, shared, experts: parts - shared, active: on - shared }))
    .filter(
      ({ experts, active, limit }) =>
        !limit || (experts % limit.groups === 0 && active <= (limit.topGroups * experts) / limit.groups),
    );
}

/**
 * The number of shared experts whose mixture has the smallest mean error on held-out tokens over a few layers of the
 * dense model. One number for all layers: no container has a number for each.
 */
export async function searchShared(
  open: OpenModel,
  set: CalibrationSet,
  options: SearchOptions,
  env: JobEnv,
): Promise<SharedSearch> {
  const { recipe, dtype, budget, torch } = options;
  const first = makePlan(open, recipe, torch);
  const plans = sharedCandidates(recipe, first).map((candidate) => makePlan(open, candidate, torch));
  const { model } = open;
  const converted = model.blocks.filter(({ index }) => !first.source.dense.includes(index));
  const layers = [...new Set(places.map((place) => converted[Math.floor(place * converted.length)]!.index))];
  const limit = Math.min(
    trialTokens,
    tokensThatFit(sampleBytes(model.hidden, first.shape.ffn, first.shape.routed), env, budget),
  );
  const rows = Math.min(set.n, Math.max(1, Math.floor(limit / set.seqLen)));
  const reader = new WeightReader(open, env.device, dtype);
  const errors = plans.map((): number[] => []);
  using scope = new Scope(env.device);
  const windows = Array.from({ length: rows }, (_, row) => set.tokens.subarray(row * set.seqLen, (row + 1) * set.seqLen)); // prettier-ignore
  let states = await embed(open, reader, windows, scope);
  for (const block of model.blocks.slice(0, layers.at(-1)! + 1)) {
    stopIfAborted(env, options.resumeHint);
    using work = new Scope(env.device);
    const weights = await reader.block(block.index, work);
    const inputs: Tensor[] = [];
    const next = windows.map((tokens, row) => {
      using step = new Scope(env.device);
      const ctx = forwardContext(step, model, weights, 1, tokens.length, { tokens });
      const after = run(block.forward(states[row]!, ctx), ctx, (call) => {
        if (call.kind === 'linear' && call.linears[0]!.name === ffnOf(block).gate.name) inputs.push(cast(work, call.x, 'f32')); // prettier-ignore
        return undefined;
      });
      return step.move(after, scope);
    });
    scope.free(...states);
    states = next;
    if (!layers.includes(block.index)) continue;
    const w = ffnWeights(block, weights);
    const sample = await sampleOf(work, block, w, inputs);
    for (const [i, plan] of plans.entries())
      errors[i]!.push(await trialError(plan, block, weights, w, sample, options));
  }
  const trials = plans.map(({ shape: { shared, routed, active } }, i) => {
    const error = errors[i]!.reduce((a, b) => a + b, 0) / layers.length;
    return { shared, experts: routed, active, errors: errors[i]!, error };
  });
  const best = trials.reduce((a, b) => (b.error < a.error ? b : a));
  return { layers, tokens: rows * set.seqLen, trials, best };
}

async function embed({ model }: OpenModel, reader: WeightReader, windows: Int32Array[], scope: Scope) {
  using work = new Scope(scope.device);
  const outer = await reader.outer(work, 'embedding');
  return windows.map((tokens) => {
    using step = new Scope(scope.device);
    const ctx = forwardContext(step, model, outer, 1, tokens.length);
    return step.move(model.embed(step.from('i32', [1, tokens.length], tokens), ctx), scope);
  });
}

function ffnWeights(block: Block, weights: Weights): FfnWeights {
  const { gate, up, down } = ffnOf(block);
  const [g, u, d] = [gate, up, down].map(({ name }) => weights.get(`${name}.weight`));
  return { gate: g!, up: u!, down: d! };
}

/** Held-out tokens last. */
async function sampleOf(s: Scope, block: Block, w: FfnWeights, inputs: readonly Tensor[]): Promise<Sample> {
  using work = new Scope(s.device);
  const tokens = inputs.reduce((n, x) => n + x.dim(0), 0);
  const all = work.empty('f32', [tokens, w.gate.dim(1)]);
  let at = 0;
  for (const x of inputs) copyInto(all.slice(0, at, (at += x.dim(0))), x);
  const numbers = Array.from({ length: tokens }, (_, i) => i);
  const held = numbers.filter(heldOut);
  const order = Int32Array.from([...numbers.filter((token) => !heldOut(token)), ...held]);
  const x = gather(s, all, work.from('i32', [tokens], order));
  const h = neurons(s, cast(work, x, w.gate.dtype), w, ffnOf(block));
  await s.device.sync();
  return { x, h, fit: tokens - held.length, held: held.length };
}

/** Of one layer as the conversion would make it, refitted where it would be. */
async function trialError(
  { shape, container }: MoePlan,
  block: Block,
  weights: Weights,
  w: FfnWeights,
  sample: Sample,
  { split, refit, dtype }: SearchOptions,
): Promise<number> {
  using s = new Scope(sample.x.device);
  const options = { ...split, rounds: Math.min(split.rounds, trialRounds), shape, intercept: container.selectionBias };
  const measured = await measure(s, sample, w, options);
  const made = await restructure(s, measured, options);
  const arranged = arrange(s, made.split, w);
  const { x, h } = heldPart(sample);
  const whole = gather(s, h, s.from('i32', [made.split.order.length], made.split.order), 1);
  const down = cast(s, arranged.down, 'f32');
  const target = outputOf(s, whole, down);
  const masked = applyMask(s, whole, routingMask(s, x, made.router, shape), shape);
  const ffn = ffnOf(block);
  const linears = [ffn.gate, ffn.up];
  const site: Site = {
    ...{ block, index: 0, kind: 'linear', linears, weights, tokens: sample.fit, held: true },
    each: async (handle) => {
      await handle({ kind: 'linear', linears, x: cast(s, measured.x, dtype) }, 0);
    },
  };
  const activations = new Activations(s, arranged, made.router, shape, ffn.activation);
  const refitted = refit ? await refitDown(s, site, activations, arranged.down, { masked, target }, () => false) : undefined; // prettier-ignore
  return refitted?.errors.refit ?? (await relativeError(outputOf(s, masked, down), target));
}
