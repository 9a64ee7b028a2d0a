import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { Call, ExpertsCall, ForwardContext, LinearCall, Weights } from '../nn/calls.js';
import type { BlockVisitor, Site } from '../arch/stream.js';
import type { Block, FfnSpec } from '../arch/types.js';
import type { WeightReader } from '../arch/weights.js';
import { cast, matmulT } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { StandingTest } from './standing-test.js';
import { baselineSplit } from './baseline.js';
import { baselines, heldEnergies, judgeRouter, largest, relativeError } from './judge.js';
import { mixtureOutput } from './mixture.js';
import { writeThrough } from './output.js';
import { ffnOf, type MoePlan } from './plan.js';
import { applyMask, pieceMask, refitDown, routingMask, type Refit } from './refit.js';
import { detailOf, toJson, type LayerReport } from './report.js';
import { restructure } from './restructure.js';
import type { Restructured, SplitOptions } from './restructured.js';
import type { Router } from './router.js';
import { captureSample, heldOut, neurons, type FfnWeights, type Sample } from './sample.js';
import { arrange, cut, cutDowns, type Experts } from './split.js';
import { storeRouter } from './store-router.js';
import { LayerStore } from './store.js';
import { Timer } from './timer.js';

export interface VisitorOptions {
  readonly env: JobEnv;
  readonly plan: MoePlan;
  readonly split: Omit<SplitOptions, 'shape' | 'intercept'>;
  readonly refit: boolean;
  readonly writer: CheckpointWriter;
  readonly reader: WeightReader;
  /** Tokens of a sample at most. */
  readonly sampleTokens: number;
  readonly check: StandingTest;
}

/** What later tokens of a block see in place of its feed-forward part. */
interface Converted {
  readonly ffn: FfnSpec;
  readonly router: Router;
  readonly experts: Experts;
}

/** Divides the feed-forward part of each block as the calibration stream comes by, and writes the block out. */
export class SplitVisitor implements BlockVisitor, Disposable {
  readonly #options: VisitorOptions;
  /** Holds what was made of the current block. */
  #scope: Scope | undefined;
  #converted: Converted | undefined;
  #store: LayerStore | undefined;
  #report: LayerReport | undefined;
  /** Outputs made at the gate/up call, for the down call of the same pass. */
  readonly #outputs = new WeakMap<ForwardContext, Tensor>();

  constructor(options: VisitorOptions) {
    this.#options = options;
  }

  #converts(block: Block): boolean {
    return block.index >= this.#options.plan.source.dense;
  }

  holds(call: LinearCall | ExpertsCall, block: Block): boolean {
    return this.#converts(block) && call.kind === 'linear' && call.linears[0]?.name === block.ffn?.gate.name;
  }

  async visit(site: Site): Promise<void> {
    const { env, plan, reader, refit, split, sampleTokens } = this.#options;
    const { shape, container } = plan;
    const timer = new Timer();
    const ffn = ffnOf(site.block);
    const scope = (this.#scope = new Scope(env.device));
    using work = new Scope(env.device);
    const w = ffnWeights(site.weights, ffn);
    const sample = await captureSample(site, w, ffn, sampleTokens, work);
    await timer.mark('sample', env);
    const intercept = container.selectionBias;
    const made = await restructure(scope, sample, w, { ...split, shape, intercept });
    await timer.mark('split', env);

    const arranged = arrange(work, made.split, w);
    const held = await this.#hold(work, sample, arranged, ffn, made.router);
    const refitted = refit ? await refitDown(work, site, arranged, ffn, made.router, shape, held, heldOut) : undefined;
    await timer.mark('refit', env);

    // What is stored is cut from the weights as they lie in the file, not as the forward pass reads them.
    const exact = await this.#exactWeights(work, ffn, w);
    const stored = arrange(work, made.split, exact);
    const router = await storeRouter(scope, made.router, sample.x, container);
    const networks = cut(scope, shape, { ...stored, down: refitted?.down ?? stored.down }, plan.weighting, plan.dtype);
    const before = refitted && this.#unrefitted(scope, networks, stored.down);
    this.#store = new LayerStore(plan, site.block.index, networks, router, before);
    const dtype = reader.dtype;
    const plain = { ...arranged, down: refitted ? refitted.down : arranged.down };
    const experts = cut(scope, shape, plain, { routedDown: 1, sharedDown: 1, normalized: false }, dtype);
    this.#converted = { ffn, router: made.router, experts };
    await timer.mark('cut', env);
    this.#report = await this.#judge(site, sample, w, ffn, made, arranged, held, refitted, timer);
  }

  /** The same networks with down_proj as it was. */
  #unrefitted(scope: Scope, networks: Experts, arranged: Tensor): Experts {
    const { shape, weighting, dtype } = this.#options.plan;
    const { down, sharedDown } = cutDowns(scope, shape, arranged, weighting, dtype);
    return { ...networks, down, shared: networks.shared && { ...networks.shared, down: sharedDown! } };
  }

  async #exactWeights(s: Scope, ffn: FfnSpec, w: FfnWeights): Promise<FfnWeights> {
    const { plan, reader } = this.#options;
    const { dtype } = plan;
    if (reader.dtype === 'f32' || reader.dtype === dtype) return w;
    const read = (name: string) => reader.tensor(`${name}.weight`, s, dtype);
    return { gate: await read(ffn.gate.name), up: await read(ffn.up.name), down: await read(ffn.down.name) };
  }

  /** Held-out tokens' neurons in the order of the split, all of them and as routed. */
  async #hold(s: Scope, sample: Sample, arranged: FfnWeights, ffn: FfnSpec, router: Router) {
    const { shape } = this.#options.plan;
    const x = sample.x.slice(0, sample.fit, sample.fit + sample.held);
    const whole = neurons(s, x, arranged, ffn);
    return { whole, masked: applyMask(s, whole, await routingMask(s, x, router, shape), shape) };
  }

  async #judge(
    site: Site,
    sample: Sample,
    w: FfnWeights,
    ffn: FfnSpec,
    made: Restructured,
    arranged: FfnWeights,
    held: { readonly whole: Tensor; readonly masked: Tensor },
    refitted: Refit | undefined,
    timer: Timer,
  ): Promise<LayerReport> {
    const { env, plan, split } = this.#options;
    const { shape, container } = plan;
    const { routed, active } = shape;
    using s = new Scope(env.device);
    const x = sample.x.slice(0, sample.fit, sample.fit + sample.held);
    const down = cast(s, arranged.down, 'f32');
    const target = matmulT(s, held.whole, down);
    const energy = heldEnergies(s, sample, w, made.rest, made.expertOf, routed);
    const oracle = applyMask(
      s,
      held.whole,
      pieceMask(s, largest(await energy.float32(), routed, active), shape),
      shape,
    );
    const same = await baselines(sample, w, shape, made.scores, { intercept: container.selectionBias, lambda: split.lambda }, split.seed); // prettier-ignore
    const cmoe = await this.#cmoeError(sample, w, ffn, target);
    const report: LayerReport = {
      block: site.block.index,
      tokens: sample.fit,
      held: sample.held,
      router: await judgeRouter(x, energy, made.router, active),
      errors: {
        routed: await relativeError(matmulT(s, held.masked, down), target),
        ...(refitted && { refit: await relativeError(matmulT(s, held.masked, refitted.down), target) }),
        oracle: await relativeError(matmulT(s, oracle, down), target),
        ...same,
        cmoe,
      },
      ...(refitted && { refitLambda: refitted.lambda }),
      seconds: timer.seconds,
    };
    await timer.mark('judge', env);
    return report;
  }

  /** Of a split after CMoE at the same shape. */
  async #cmoeError(sample: Sample, w: FfnWeights, ffn: FfnSpec, target: Tensor): Promise<number> {
    const { env, plan, split } = this.#options;
    const { shape, container } = plan;
    using s = new Scope(env.device);
    const made = await baselineSplit('cmoe', s, sample, w, { ...split, shape, intercept: container.selectionBias });
    const arranged = arrange(s, made.split, w);
    const { masked } = await this.#hold(s, sample, arranged, ffn, made.router);
    return await relativeError(matmulT(s, masked, arranged.down, { dtype: 'f32' }), target);
  }

  answer(call: Call, ctx: ForwardContext, block: Block): unknown {
    if (call.kind !== 'linear' || !this.#converted || !this.#converts(block)) return undefined;
    const { ffn, router, experts } = this.#converted;
    const name = call.linears[0]?.name;
    if (name === ffn.gate.name) {
      const { active } = this.#options.plan.shape;
      this.#outputs.set(ctx, mixtureOutput(ctx.scope, call.x, router, experts, active, ffn.activation));
      // The dense activations would go nowhere: one column in place of all keeps the pass going.
      return call.linears.map(() => ctx.scope.zeros(call.x.dtype, [call.x.dim(0), 1]));
    }
    if (name !== ffn.down.name) return undefined;
    const output = this.#outputs.get(ctx);
    this.#outputs.delete(ctx);
    return output && [output];
  }

  async finish(block: Block, weights: Weights): Promise<{ data: Json; detail: string }> {
    const { env, plan, writer, reader, check } = this.#options;
    await writeThrough(plan.tensors, block.index, writer, reader, env.device);
    await this.#store?.write(writer);
    await check.advance(block.index, this.#store, weights);
    await writer.flush();
    const report = this.#report;
    this[Symbol.dispose]();
    return { data: toJson(report ?? null), detail: detailOf(report) };
  }

  [Symbol.dispose](): void {
    this.#scope?.[Symbol.dispose]();
    [this.#scope, this.#converted, this.#store, this.#report] = [undefined, undefined, undefined, undefined];
  }
}

const ffnWeights = (weights: Weights, { gate, up, down }: FfnSpec): FfnWeights => ({
  gate: weights.get(`${gate.name}.weight`),
  up: weights.get(`${up.name}.weight`),
  down: weights.get(`${down.name}.weight`),
});
