import type { FloatDType } from '../base/dtype.js';
import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { TensorSink } from '../checkpoint/types.js';
import type { ExpertsCall, LinearCall, LinearSpec, Weights } from '../nn/calls.js';
import type { BlockVisitor, Site } from '../arch/stream.js';
import type { Block } from '../arch/types.js';
import { binary, cast, copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { AllExpertStatistics } from './all-experts.js';
import { normInFront, searchScaling, type Scaling } from './awq.js';
import { captureLinear, type Evidence, type Statistics } from './capture.js';
import { BlockRounding } from './autoround.js';
import type { CoverageGate } from './coverage.js';
import { ExpertStatistics } from './experts.js';
import { total } from './gptq.js';
import type { LinearPlan, Planned, QuantPlan } from './plan.js';
import { probe } from './probe.js';
import { meanError, toJson, type ExpertCoverage, type LinearReport, type RoundingReport } from './report.js';
import { valuesOf } from './rtn.js';
import { bitsPerWeight, codesOf, describeScheme, roundingOf, type Recipe, type StoredScales } from './scheme.js';
import { solve } from './solve.js';
import { parts, type Stack } from './stack.js';
import type { Target } from './target.js';

export interface TargetWriter {
  readonly name: string;
  readonly target: Target;
  readonly writer: TensorSink;
}

export interface VisitorOptions {
  readonly env: JobEnv;
  readonly plan: QuantPlan;
  readonly recipe: Recipe;
  /** What the result is written into; the codes and what calibration goes on with are those of the plan. */
  readonly targets: readonly TargetWriter[];
  /** Precisions that scales must survive, for a weight of this type. */
  readonly scales: (dtype: FloatDType) => StoredScales;
  readonly coverage: CoverageGate;
  /** Every expert is calibrated on every token. */
  readonly calibrateAllExperts: boolean;
  /** What to do after an interruption. */
  readonly resumeHint: string;
  /** In which precision the output holds a tensor that is not quantized. */
  readonly plannedDType: (name: string) => FloatDType;
}

/** Quantizes the planned linears of each block as the calibration stream comes by, and writes the block out. */
export class QuantVisitor implements BlockVisitor {
  readonly #options: VisitorOptions;
  #linears: LinearReport[] = [];
  #coverage: ExpertCoverage | undefined;
  #experts: ExpertStatistics | undefined;
  #allExperts: AllExpertStatistics | undefined;
  #stages: Record<string, number> = {};
  #tuned: RoundingReport | undefined;
  /** Of the stack that was stored last, on the way to the files. */
  #writes: Promise<void>[] = [];
  /** Norms of this block that have taken up scales, and are written. */
  readonly #folded = new Set<string>();

  /** With autoround: stacks wait until their block is tuned. */
  readonly #rounding: BlockRounding | undefined;
  readonly tune: BlockVisitor['tune'];

  constructor(options: VisitorOptions) {
    this.#options = options;
    const { env, recipe, scales } = options;
    if (recipe.method !== 'autoround') return;
    const rounding = new BlockRounding(env, roundingOf(recipe), scales, options.resumeHint);
    this.#rounding = rounding;
    this.tune = async (site) => {
      const started = performance.now();
      this.#tuned = await rounding.tune(site);
      this.#time('tune', started);
      for await (const stack of rounding.stacks()) await this.#store(stack, site.weights);
    };
  }

  holds(call: LinearCall | ExpertsCall): boolean {
    return call.linears.flat().some(({ name }) => this.#planOf(name)?.scheme !== undefined);
  }

  async visit(site: Site): Promise<void> {
    using scope = new Scope(this.#options.env.device);
    if (site.kind === 'linear') {
      const started = performance.now();
      const statistics = await captureLinear(site, scope);
      this.#time('capture', started);
      await this.quantize(site.linears as LinearCall['linears'], site.weights, { statistics, block: site.block });
      return;
    }
    await this.#visitExperts(site);
  }

  async #visitExperts(site: Site): Promise<void> {
    const linears = site.linears as ExpertsCall['linears'];
    const count = linears[0]!.length;
    // gate and up come first; down follows with the same rows, but other inputs.
    this.#experts = await ExpertStatistics.at(site, count, this.#experts);
    if (this.#options.calibrateAllExperts && !this.#allExperts) {
      const natural = this.#experts.coverage;
      this.#allExperts = new AllExpertStatistics(site, { ...natural, starved: 0, uncovered: 0, calibratedOnAll: true });
    }
    const source = this.#allExperts ?? this.#experts;
    if (this.#coverage === undefined) {
      this.#coverage = source.coverage;
      this.#options.coverage.add(source.coverage.uncovered, site.block.name);
    }
    await source.each(site, async (expert, evidence) => {
      const partners = linears.map((experts) => experts[expert]!);
      await this.quantize(partners, site.weights, evidence);
    });
  }

  /** Frees what is kept from one call of a block to the next; to be called when the job ends, however it does. */
  [Symbol.dispose](): void {
    this.#allExperts?.[Symbol.dispose]();
    this.#allExperts = undefined;
    this.#rounding?.[Symbol.dispose]();
  }

  /** Quantizes linears that share an input, writes them, and puts what they have become into `weights`. */
  async quantize(linears: readonly LinearSpec[], weights: Weights, evidence: Evidence): Promise<void> {
    const alike = new Map<string, Planned[]>();
    for (const { name } of linears) {
      const plan = this.#planOf(name);
      if (plan?.scheme === undefined) continue;
      const key = JSON.stringify(plan.scheme);
      alike.set(key, [...(alike.get(key) ?? []), plan as Planned]);
    }
    for (const plans of alike.values()) await this.#quantizeAlike(plans, weights, evidence);
  }

  /** Linears of one scheme, as one stack. */
  async #quantizeAlike(plans: readonly Planned[], weights: Weights, evidence: Evidence): Promise<void> {
    using scope = new Scope(this.#options.env.device);
    const stack = await this.#solve(scope, plans, weights, evidence);
    if (!this.#rounding) return await this.#store(stack, weights);
    this.#rounding.take(scope, stack);
    using work = new Scope(this.#options.env.device);
    for (const { plan, coded } of parts(stack)) this.#put(weights, plan, valuesOf(work, coded, stack.scheme));
  }

  async #solve(scope: Scope, plans: readonly Planned[], weights: Weights, evidence: Evidence): Promise<Stack> {
    const { scales, recipe } = this.#options;
    const started = performance.now();
    const { scheme, dtype, stored } = plans[0]!;
    let w = this.#stack(scope, plans, weights);
    const silent = evidence.statistics?.energy.every((value) => value === 0) ?? false;
    if (silent) {
      const note = 'every calibration input was zero: rounded without statistics';
      evidence = { ...evidence, statistics: undefined, note };
    }
    let statistics = evidence.statistics && padded(scope, evidence.statistics, stored.inFeatures);
    const method = statistics && !evidence.roundOnly ? codesOf(recipe) : 'rtn';
    const scaling = statistics && (await this.#scaling(scope, plans, w, statistics, weights, evidence));
    if (scaling) ({ w, statistics } = scaling);
    const solution = await solve(scope, w, statistics, scheme, { ...recipe, method }, scales(dtype));
    const notes = notesOf(evidence, solution.damp, recipe, method, scaling?.alpha);
    const seconds = this.#time('solve', started) / plans.length;
    const tokens = evidence.tokens ?? statistics?.tokens ?? 0;
    return { plans, scheme, w, statistics, solution, scaling, method, tokens, notes, seconds };
  }

  /** Writes a stack, sets its weights and reports it. */
  async #store(stack: Stack, weights: Weights): Promise<void> {
    const { env, targets } = this.#options;
    const { scheme, w, statistics, solution, scaling, method, tokens, notes, seconds } = stack;
    const writing = performance.now();
    await this.#written();
    for (const { plan, from, to, coded } of parts(stack)) {
      using work = new Scope(env.device);
      const q = valuesOf(work, coded, scheme);
      const source = {
        weight: w.slice(0, from, to),
        energy: statistics?.diagonal,
        statistics: statistics && { energy: statistics.energy, tokens },
      };
      const probes: Record<string, string> = {};
      for (const { name: targetName, target, writer } of targets) {
        const { tensors, values } = target.store(work, plan, scheme, coded, source);
        this.#write(writer, tensors, work);
        if (values) probes[targetName] = await probe(values);
      }
      this.#put(weights, plan, scaling ? binary(work, 'div', q, scaling.s) : q);
      const part = (values: Float32Array) => total(values.subarray(from, to));
      const scale = Math.max(part(solution.energy), Number.MIN_VALUE);
      this.#linears.push({
        name: plan.linear.name,
        scheme: describeScheme(scheme),
        bitsPerWeight: bitsPerWeight(scheme, plan.stored.inFeatures, plan.dtype === 'f32' ? 32 : 16),
        error: part(solution.errors) / scale,
        plainError: part(solution.plain) / scale,
        method,
        damp: solution.damp,
        tokens,
        fallbackRows: solution.fallbackRows.slice(from, to).filter(Boolean).length,
        deadChannels: statistics?.energy.subarray(0, plan.linear.inFeatures).filter((value) => value === 0).length ?? 0,
        seconds: Math.round(seconds) / 1000,
        probe: await probe(q),
        ...(Object.keys(probes).length > 0 && { probes }),
        ...(notes.length > 0 && { note: notes.join('; ') }),
      });
    }
    this.#time('write', writing);
  }

  /** Starts to write `tensors`, which may be of `work`; they are kept until they are written. */
  #write(
    writer: TensorSink,
    tensors: readonly { readonly name: string; readonly tensor: Tensor }[],
    work: Scope,
  ): void {
    const kept = new Scope(this.#options.env.device);
    // All at once: a transfer waits for whatever is enqueued before it.
    const writes = tensors.map(({ name, tensor }) => {
      if (work.owns(tensor)) work.move(tensor, kept);
      const own = kept.owns(tensor) ? tensor : cast(kept, tensor, tensor.dtype);
      return writer.write(name, own.source());
    });
    const written = Promise.allSettled(writes).then((ends) => {
      kept[Symbol.dispose]();
      const failed = ends.find((end) => end.status === 'rejected');
      if (failed) throw failed.reason;
    });
    written.catch(() => undefined); // reported where it is awaited
    this.#writes.push(written);
  }

  async #written(): Promise<void> {
    const writes = this.#writes;
    this.#writes = [];
    await Promise.all(writes);
  }

  /** Resolves when no transfer is under way any more, however they have ended. */
  async settled(): Promise<void> {
    await Promise.allSettled(this.#writes);
  }

  #put(weights: Weights, { linear }: Planned, q: Tensor): void {
    weights.set(`${linear.name}.weight`, q.slice(0, 0, linear.outFeatures).slice(1, 0, linear.inFeatures));
  }

  /** With awq: scales of the input channels, taken up by the norm in front, which is written at once. */
  async #scaling(
    scope: Scope,
    plans: readonly Planned[],
    w: Tensor,
    statistics: Statistics,
    weights: Weights,
    { block }: Evidence,
  ): Promise<Scaling | undefined> {
    const { recipe, targets, scales, plannedDType } = this.#options;
    if (!recipe.method.startsWith('awq') || block === undefined) return undefined;
    const linears = plans.map(({ linear }) => linear);
    const front = normInFront(block, linears);
    if (front === undefined) return undefined;
    const name = `${front.name}.weight`;
    const norm = cast(scope, weights.get(name), 'f32');
    const { scheme, dtype } = plans[0]!;
    const how = { scheme, recipe, stored: scales(dtype) };
    const scaling = await searchScaling(scope, w, statistics, norm, plannedDType(name), how);
    if (!scaling) return undefined;
    for (const { writer } of targets) await writer.write(name, scaling.norm.source());
    this.#folded.add(name);
    return scaling;
  }

  /** The weights of linears on top of each other, f32 [sum N, K], with zeros where they are padded. */
  #stack(scope: Scope, plans: readonly Planned[], weights: Weights): Tensor {
    const rows = plans.reduce((sum, { stored }) => sum + stored.outFeatures, 0);
    const columns = plans[0]!.stored.inFeatures;
    const padding = plans.some(
      ({ linear, stored }) => stored.outFeatures !== linear.outFeatures || stored.inFeatures !== linear.inFeatures,
    );
    const w = padding ? scope.zeros('f32', [rows, columns]) : scope.empty('f32', [rows, columns]);
    let row = 0;
    for (const { linear, stored } of plans) {
      const part = w.slice(0, row, row + linear.outFeatures).slice(1, 0, linear.inFeatures);
      copyInto(part, weights.get(`${linear.name}.weight`));
      row += stored.outFeatures;
    }
    return w;
  }

  async finish(block: Block): Promise<{ data: Json; detail: string }> {
    const started = performance.now();
    for (const { target, writer } of this.#options.targets) {
      await target.writeThrough(block.index, writer, this.#folded);
    }
    await this.#written();
    for (const { writer } of this.#options.targets) if (writer.blockByBlock) await writer.flush();
    this.#time('write', started);
    const stages = Object.fromEntries(Object.entries(this.#stages).map(([name, ms]) => [name, Math.round(ms) / 1000]));
    const linears = this.#linears;
    const rounding = this.#tuned && { rounding: this.#tuned };
    const report = { block: block.index, linears, stages, ...(this.#coverage && { coverage: this.#coverage }), ...rounding }; // prettier-ignore
    const detail = this.#detail();
    this[Symbol.dispose]();
    this.#folded.clear();
    [this.#linears, this.#coverage, this.#experts, this.#stages, this.#tuned] = [[], undefined, undefined, {}, undefined]; // prettier-ignore
    return { data: toJson(report), detail };
  }

  async flush(): Promise<void> {
    for (const { writer } of this.#options.targets) if (!writer.blockByBlock) await writer.flush();
  }

  #detail(): string {
    const linears = this.#linears;
    if (linears.length === 0) return 'nothing to quantize here';
    const bits = linears.reduce((sum, { bitsPerWeight }) => sum + bitsPerWeight, 0) / linears.length;
    const coverage = this.#coverage;
    const experts = coverage ? `, ${coverage.starved} of ${coverage.experts} experts starved` : '';
    const [error, plain] = [meanError(linears), meanError(linears, 'plainError')];
    const { before = 0, after = 0 } = this.#tuned ?? {};
    const tuned = this.#tuned ? `, block ${before.toExponential(2)} -> ${after.toExponential(2)}` : '';
    return `relative error ${error.toExponential(2)} (rounding ${plain.toExponential(2)})${tuned}, ${bits.toFixed(2)} bits${experts}`;
  }

  #planOf(name: string): LinearPlan | undefined {
    return this.#options.plan.linears.get(name);
  }

  #time(stage: string, started: number): number {
    const passed = performance.now() - started;
    this.#stages[stage] = (this.#stages[stage] ?? 0) + passed;
    return passed;
  }
}

function notesOf(
  evidence: Evidence,
  damp: number,
  recipe: Recipe,
  method: string,
  alpha: number | undefined,
): string[] {
  const notes = evidence.note === undefined ? [] : [evidence.note];
  if (alpha !== undefined) notes.push(`input channels scaled by their activation to the power ${alpha}`);
  if (method === 'gptq' && damp > recipe.damp) notes.push(`damping raised to ${damp} for a positive definite Hessian`);
  return notes;
}

/** The same statistics for an input with channels added that are always zero. */
function padded(scope: Scope, statistics: Statistics, columns: number): Statistics {
  const k = statistics.h.dim(0);
  if (columns === k) return statistics;
  const h = scope.zeros('f32', [columns, columns]);
  copyInto(h.slice(0, 0, k).slice(1, 0, k), statistics.h);
  const diagonal = scope.zeros('f32', [columns]);
  copyInto(diagonal.slice(0, 0, k), statistics.diagonal);
  const energy = new Float32Array(columns);
  energy.set(statistics.energy);
  return { ...statistics, h, diagonal, energy };
}
