import type { Json } from '../base/job.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { Block } from '../arch/types.js';
import type { CalibrationSet } from '../arch/calibration.js';
import { forwardContext } from '../arch/context.js';
import type { OpenModel } from '../arch/open.js';
import type { WeightReader } from '../arch/weights.js';
import type { Call, LinearSpec, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { binary, cast, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { blockScheme, typeOfBits } from './blocks.js';
import type { LinearPlan, QuantPlan } from './plan.js';
import { roundToNearest, valuesOf } from './rtn.js';
import { bitsPerWeight, type Bits, type Recipe, type Scheme } from './scheme.js';
import { fusedPartners } from './select.js';

/** What each candidate costs one set of fused linears, and what it does to the output of their block. */
export interface Sensitivity {
  readonly linears: readonly string[];
  readonly weights: number;
  /** By rising bits. `error`: mean over tokens of |y' - y|^2 / |y|^2, y the hidden state after the block. */
  readonly candidates: readonly { readonly bits: Bits; readonly bitsPerWeight: number; readonly error: number }[];
}

/** Tokens that are looked at: the figures of neighbours differ by factors, so few will do. */
const mostTokens = 4096;

export interface SensitivityOptions {
  readonly open: OpenModel;
  readonly plan: QuantPlan;
  readonly recipe: Recipe;
  readonly set: CalibrationSet;
  readonly reader: WeightReader;
  readonly env: JobEnv;
  readonly candidates: readonly Bits[];
  readonly resumeHint: string;
}

/**
 * Rounds each set of fused linears in turn, in each candidate's precision, and measures how far the hidden states after
 * its block move. Everything else is in high precision, so that errors of different places can be compared: they add up
 * in the residual stream, where each is a share of what the next block reads.
 */
export async function measureSensitivities(options: SensitivityOptions): Promise<Sensitivity[]> {
  const { open, set, env, reader } = options;
  const rows = Math.max(1, Math.min(set.n, Math.floor(mostTokens / set.seqLen)));
  const found: Sensitivity[] = [];
  using states = new Scope(env.device);
  let x = await embedded(states, open, reader, set, rows);
  for (const block of open.model.blocks) {
    stopIfAborted(env, options.resumeHint);
    using scope = new Scope(env.device);
    const weights = await reader.block(block.index, scope);
    const energies = new Map<string, Tensor>();
    const forward = (s: Scope, watch?: (call: Call) => unknown): Tensor => {
      const ctx = forwardContext(s, open.model, weights, rows, set.seqLen);
      return run(block.forward(x, ctx), ctx, watch);
    };
    const y = forward(scope, (call) => noteEnergies(scope, call, energies));
    const size = reduce(scope, 'sumsq', y, 1);
    for (const unit of unitsOf(block, options.plan)) {
      found.push(await measureUnit(unit, { ...options, weights, energies, y, size, forward }));
    }
    const next = cast(states, y, y.dtype);
    states.free(x);
    x = next;
    const data = { block: block.name, tokens: rows * set.seqLen };
    env.log.progress({ stage: 'sensitivities', done: block.index + 1, total: open.model.blocks.length, data });
  }
  return found;
}

async function embedded(
  states: Scope,
  open: OpenModel,
  reader: WeightReader,
  set: CalibrationSet,
  rows: number,
): Promise<Tensor> {
  using scope = new Scope(states.device);
  const weights = await reader.outer(scope, 'embedding');
  const tokens = scope.from('i32', [rows, set.seqLen], set.tokens.subarray(0, rows * set.seqLen));
  const x = open.model.embed(tokens, forwardContext(scope, open.model, weights, rows, set.seqLen));
  return cast(states, x, x.dtype);
}

/** Mean squares of the input channels, by linear; experts go without (their rows differ). */
function noteEnergies(scope: Scope, call: Call, energies: Map<string, Tensor>): undefined {
  if (call.kind !== 'linear') return undefined;
  const energy = reduce(scope, 'sumsq', call.x, 0);
  for (const { name } of call.linears) energies.set(name, energy);
  return undefined;
}

/** Sets of linears that get one scheme and are free to choose it. */
function unitsOf({ linears }: Block, plan: QuantPlan): LinearPlan[][] {
  const free = ({ name }: LinearSpec) => {
    const planned = plan.linears.get(name);
    return planned?.scheme !== undefined && !plan.fixed.has(name) ? [planned] : [];
  };
  return fusedPartners(linears)
    .map((partners) => partners.flatMap(free))
    .filter((unit) => unit.length > 0);
}

interface UnitOptions extends SensitivityOptions {
  readonly weights: Weights;
  readonly energies: ReadonlyMap<string, Tensor>;
  readonly y: Tensor;
  /** |y|^2 of each token. */
  readonly size: Tensor;
  readonly forward: (scope: Scope) => Tensor;
}

async function measureUnit(unit: readonly LinearPlan[], options: UnitOptions): Promise<Sensitivity> {
  const { weights, recipe, energies, candidates, env, reader } = options;
  // Read again for each candidate: all experts of a layer at once in fp32 would not fit.
  const original = (scope: Scope, { linear }: LinearPlan) => reader.tensor(`${linear.name}.weight`, scope, 'f32');
  const count = unit.reduce((sum, { linear }) => sum + linear.inFeatures * linear.outFeatures, 0);
  const measured: Sensitivity['candidates'][number][] = [];
  for (const bits of candidates) {
    using work = new Scope(env.device);
    let stored = 0;
    for (const plan of unit) {
      using one = new Scope(env.device);
      const { linear, scheme: planned, dtype } = plan;
      const k = linear.inFeatures;
      const scheme: Scheme = recipe.blocks ? blockScheme(k, typeOfBits[bits])! : { ...planned!, bits };
      const coded = roundToNearest(one, await original(one, plan), widened(scheme, k), recipe.search, dtype, energies.get(linear.name)); // prettier-ignore
      weights.set(`${linear.name}.weight`, valuesOf(one, coded, scheme));
      stored += k * linear.outFeatures * bitsPerWeight(scheme, k, dtype === 'f32' ? 32 : 16);
    }
    const moved = binary(work, 'sub', options.forward(work), options.y);
    const share = await binary(work, 'div', reduce(work, 'sumsq', moved, 1), options.size).float32();
    const error = share.reduce((sum, value) => sum + value, 0) / share.length;
    measured.push({ bits, bitsPerWeight: stored / count, error });
  }
  for (const plan of unit) {
    using one = new Scope(env.device);
    weights.set(`${plan.linear.name}.weight`, await original(one, plan));
  }
  return { linears: unit.map(({ linear }) => linear.name), weights: count, candidates: measured };
}

/** Padded linears are measured in their own width, where the group may not fit: one scale a row then. */
const widened = (scheme: Scheme, k: number): Scheme =>
  scheme.blocks === undefined && scheme.group !== 0 && k % scheme.group !== 0 ? { ...scheme, group: 0 } : scheme;

export const sensitivitiesToJson = (found: readonly Sensitivity[]): Json => JSON.parse(JSON.stringify(found)) as Json;
