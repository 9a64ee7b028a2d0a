import { allEnded } from '../base/ended.js';
import type { Json } from '../base/job.js';
import { dtypeSize } from '../base/dtype.js';
import type { JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { Call, ExpertsCall, ForwardContext, LinearCall, Weights } from '../nn/calls.js';
import type { BlockVisitor, Site } from '../arch/stream.js';
import type { Block, FfnSpec } from '../arch/types.js';
import type { WeightReader } from '../arch/weights.js';
import { cast, matmulT } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { StandingTest } from './standing-test.js';
import { baselineErrors } from './baseline-errors.js';
import { bestExperts, heldEnergies, judgeRouter, relativeError } from './judge.js';
import { applyMask, heldNeurons, maskOf, routingMask } from './masks.js';
import { measure, type Measured } from './measured.js';
import { Activations, mixtureOutput, runsWhole } from './mixture.js';
import { writeThrough } from './output.js';
import { ffnOf, type MoePlan } from './plan.js';
import { outputOf, refitDown } from './refit.js';
import { detailOf, toJson, type LayerReport, type OwnErrors } from './report.js';
import { restructure } from './restructure.js';
import type { Restructured, SplitOptions } from './restructured.js';
import { captureSample, freeBytes, heldOut, heldPart, type FfnWeights } from './sample.js';
import { capacity } from './shape.js';
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
  /** Bytes of device memory to work in; default: what is free. */
  readonly budget: number | undefined;
  readonly check: StandingTest;
}

/** Copies of a sample's neurons that the baselines take at most. */
const besides = 3;

/** What later tokens of a block see in place of its feed-forward part. */
interface Converted {
  readonly ffn: FfnSpec;
  readonly output: (s: Scope, x: Tensor) => Tensor;
}

/**
 * Divides the feed-forward part of each block as the calibration stream comes by, and writes the block out while the next
 * one is under way.
 */
export class SplitVisitor implements BlockVisitor, AsyncDisposable {
  readonly #options: VisitorOptions;
  /** Holds what was made of the current block. */
  #scope: Scope | undefined;
  #converted: Converted | undefined;
  #store: LayerStore | undefined;
  #report: LayerReport | undefined;
  #timer: Timer | undefined;
  /** Outputs made at the gate/up call, for the down call of the same pass. */
  readonly #outputs = new WeakMap<ForwardContext, Tensor>();
  /** Of finished blocks; keeps what they are made of until then. */
  #writing: Promise<void> = Promise.resolve();

  constructor(options: VisitorOptions) {
    this.#options = options;
  }

  #converts(block: Block): boolean {
    return !this.#options.plan.source.dense.includes(block.index);
  }

  holds(call: LinearCall | ExpertsCall, block: Block): boolean {
    return this.#converts(block) && call.kind === 'linear' && call.linears[0]?.name === block.ffn?.gate.name;
  }

  async visit(site: Site): Promise<void> {
    const { env, plan, split, sampleTokens, budget } = this.#options;
    const timer = (this.#timer = new Timer());
    const ffn = ffnOf(site.block);
    this.#scope = new Scope(env.device);
    using work = new Scope(env.device);
    const w = ffnWeights(site.weights, ffn);
    const sample = await captureSample(site, w, ffn, sampleTokens, work);
    await timer.mark('sample', env);
    const options = { ...split, shape: plan.shape, intercept: plan.container.selectionBias };
    const measured = await measure(work, sample, w, options);
    const target = outputOf(work, heldPart(sample).h, cast(work, w.down, 'f32'));
    const make = () => this.#make(work, site, ffn, w, measured, options, target, timer);
    const judge = () => baselineErrors(measured, w, options, target);
    // Beside each other where there is room for both: assignments of one are computed on the host meanwhile.
    const room = freeBytes(env, budget) >= besides * dtypeSize('f32') * sample.h.count;
    const [report, baselines] = room ? await allEnded([make(), judge()]) : [await make(), await judge()];
    this.#report = { ...report, errors: { ...report.errors, ...baselines }, seconds: timer.seconds };
    await timer.mark('judge', env);
  }

  /** The layer as it will be, and what there is to say of it. */
  async #make(
    work: Scope,
    site: Site,
    ffn: FfnSpec,
    w: FfnWeights,
    measured: Measured,
    options: SplitOptions,
    target: Tensor,
    timer: Timer,
  ): Promise<Omit<LayerReport, 'errors' | 'seconds'> & { readonly errors: OwnErrors }> {
    const { env, plan, reader, refit, budget } = this.#options;
    const { shape, container } = plan;
    const { sample } = measured;
    const scope = this.#scope!;
    const made = await restructure(scope, measured, options);
    await timer.mark('split', env);

    const arranged = arrange(scope, made.split, w);
    const { whole, masked } = heldNeurons(work, sample, made);
    const activations = new Activations(scope, arranged, made.router, shape, ffn.activation);
    const bytes = site.tokens * capacity(shape) * dtypeSize(reader.dtype);
    const keep = site.held && runsWhole(shape) && bytes <= freeBytes(env, budget) / 2;
    const held = { masked, target };
    const refitted = refit ? await refitDown(work, site, activations, arranged.down, held, heldOut, keep) : undefined;
    await timer.mark('refit', env);

    // What is stored is cut from the weights as they lie in the file, not as the forward pass reads them.
    const exact = await this.#exactWeights(work, ffn, w);
    const stored = arrange(work, made.split, exact);
    const router = await storeRouter(scope, made.router, sample.x, container);
    const networks = cut(scope, shape, { ...stored, down: refitted?.down ?? stored.down }, plan.weighting, plan.dtype);
    const before = refitted && this.#unrefitted(scope, networks, stored.down);
    this.#store = new LayerStore(plan, site.block.index, networks, router, before);
    const plain = { ...arranged, down: refitted ? refitted.down : arranged.down };
    this.#converted = { ffn, output: this.#output(scope, plain, activations) };
    await timer.mark('cut', env);

    const down = cast(work, arranged.down, 'f32');
    const error = (h: Tensor) => relativeError(outputOf(work, h, down), target);
    const energy = heldEnergies(work, measured, made.rest, made.expertOf, shape.routed);
    const best = maskOf(work, await bestExperts(work, energy, shape), shape.routed, shape.shared);
    const { x } = heldPart(sample);
    const unbalanced = async ({ unbalanced: router, ...balance }: NonNullable<Restructured['balance']>) => ({
      ...balance,
      before: await judgeRouter(x, energy, router, shape),
      error: await error(applyMask(work, whole, routingMask(work, x, router, shape), shape)),
    });
    return {
      block: site.block.index,
      tokens: sample.fit,
      held: sample.held,
      router: await judgeRouter(x, energy, made.router, shape),
      ...(made.balance && { balance: await unbalanced(made.balance) }),
      errors: {
        ...(refitted?.errors ?? { routed: await error(masked) }),
        oracle: await error(applyMask(work, whole, best, shape)),
      },
      ...(refitted && { refitLambda: refitted.lambda }),
    };
  }

  /** How a batch gets from the input of the layer to its output, as routed. */
  #output(scope: Scope, w: FfnWeights, activations: Activations): Converted['output'] {
    const { dtype } = this.#options.reader;
    const { shape, router, activation } = activations;
    if (!runsWhole(shape)) {
      const experts = cut(scope, shape, w, { routedDown: 1, sharedDown: 1, normalized: false }, dtype);
      return (s, x) => mixtureOutput(s, x, router, experts, shape, activation);
    }
    const down = cast(scope, w.down, dtype);
    return (s, x) => {
      using work = new Scope(s.device);
      return matmulT(s, activations.take(work, x), down);
    };
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

  answer(call: Call, ctx: ForwardContext, block: Block): unknown {
    if (call.kind !== 'linear' || !this.#converted || !this.#converts(block)) return undefined;
    const { ffn, output: made } = this.#converted;
    const name = call.linears[0]?.name;
    if (name === ffn.gate.name) {
      this.#outputs.set(ctx, made(ctx.scope, call.x));
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
    await this.#timer?.mark('output', env);
    await check.advance(block.index, this.#store, weights);
    await this.#timer?.mark('test', env);
    // One block's weights wait for their file at most.
    await this.#writing;
    const [scope, store, report] = [this.#scope, this.#store, this.#report];
    this.#scope = this.#converted = this.#store = this.#report = this.#timer = undefined;
    this.#writing = (async () => {
      using _kept = scope;
      const through = writeThrough(plan.tensors, block.index, writer, reader, env.device);
      await allEnded([through, ...(store ? [store.write(writer)] : [])]);
    })();
    this.#writing.catch(() => undefined); // reported by whoever waits for it next
    return { data: toJson(report ?? null), detail: detailOf(report) };
  }

  async flush(last: number): Promise<void> {
    const { writer, check } = this.#options;
    await this.#writing;
    await writer.flush();
    await check.flush(last);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#writing.catch(() => undefined);
    this.#scope?.[Symbol.dispose]();
  }
}

const ffnWeights = (weights: Weights, { gate, up, down }: FfnSpec): FfnWeights => ({
  gate: weights.get(`${gate.name}.weight`),
  up: weights.get(`${up.name}.weight`),
  down: weights.get(`${down.name}.weight`),
});
