import { ConvertError } from '../base/errors.js';
import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { ExpertsCall, LinearCall, LinearSpec, Weights } from '../nn/calls.js';
import type { BlockVisitor, Site } from '../arch/stream.js';
import type { Block } from '../arch/types.js';
import { copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { captureLinear, type Evidence, type Statistics } from './capture.js';
import { ExpertStatistics } from './experts.js';
import { total } from './gptq.js';
import type { LinearPlan, QuantPlan } from './plan.js';
import { probe } from './probe.js';
import { meanError, toJson, type ExpertCoverage, type LinearReport } from './report.js';
import { valuesOf } from './rtn.js';
import { bitsPerWeight, describeScheme, type Recipe } from './scheme.js';
import { solve } from './solve.js';
import type { Target } from './target.js';

export interface VisitorOptions {
  readonly env: JobEnv;
  readonly plan: QuantPlan;
  readonly recipe: Recipe;
  readonly target: Target;
  readonly writer: CheckpointWriter;
  /** Largest share of the model's routed experts that no token may reach. */
  readonly maxUncovered: number;
  /** Routed experts of the whole model. */
  readonly experts: number;
  /** Experts without tokens in blocks that an earlier run has finished. */
  readonly uncoveredBefore: number;
}

/** Quantizes the planned linears of each block as the calibration stream comes by, and writes the block out. */
export class QuantVisitor implements BlockVisitor {
  readonly #options: VisitorOptions;
  #linears: LinearReport[] = [];
  #coverage: ExpertCoverage | undefined;
  #uncovered: number;
  #experts: ExpertStatistics | undefined;
  #stages: Record<string, number> = {};

  constructor(options: VisitorOptions) {
    this.#options = options;
    this.#uncovered = options.uncoveredBefore;
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
      await this.quantize(site.linears as LinearCall['linears'], site.weights, { statistics });
      return;
    }
    await this.#visitExperts(site);
  }

  async #visitExperts(site: Site): Promise<void> {
    const linears = site.linears as ExpertsCall['linears'];
    const count = linears[0]!.length;
    // gate and up come first; down follows with the same rows, but other inputs.
    this.#experts = await ExpertStatistics.at(site, count, this.#experts);
    const { coverage } = this.#experts;
    if (this.#coverage === undefined) {
      this.#coverage = coverage;
      this.#uncovered += coverage.uncovered;
      this.#requireCoverage(site.block);
    }
    await this.#experts.each(site, async (expert, evidence) => {
      const partners = linears.map((experts) => experts[expert]!);
      await this.quantize(partners, site.weights, evidence);
    });
  }

  #requireCoverage(block: Block): void {
    const { experts, maxUncovered } = this.#options;
    if (experts === 0 || this.#uncovered <= maxUncovered * experts) return;
    throw new ConvertError('gate', 'Too many experts saw no calibration token', {
      where: `up to ${block.name}`,
      got: `${this.#uncovered} of ${experts} experts`,
      expected: `at most ${(100 * maxUncovered).toFixed(1)}% (--max-uncovered)`,
      hint: 'Calibrate on more or more varied text (--samples, --calibration), or raise --max-uncovered: these experts are then rounded without statistics.',
    });
  }

  /** Quantizes linears that share an input as one stack, writes them, and puts what they have become into `weights`. */
  async quantize(linears: readonly LinearSpec[], weights: Weights, evidence: Evidence): Promise<void> {
    const { env, target, writer, recipe } = this.#options;
    const plans = linears
      .map(({ name }) => this.#planOf(name))
      .filter((plan) => plan?.scheme !== undefined) as Planned[];
    if (plans.length === 0) return;
    const started = performance.now();
    using scope = new Scope(env.device);
    const { scheme, dtype, stored } = plans[0]!;
    const w = this.#stack(scope, plans, weights);
    const silent = evidence.statistics?.energy.every((value) => value === 0) ?? false;
    if (silent) {
      const note = 'every calibration input was zero: rounded without statistics';
      evidence = { ...evidence, statistics: undefined, note };
    }
    const statistics = evidence.statistics && padded(scope, evidence.statistics, stored.inFeatures);
    const method = statistics && !evidence.roundOnly ? recipe.method : 'rtn';
    const solution = await solve(scope, w, statistics, scheme, { ...recipe, method }, dtype);
    const seconds = this.#time('solve', started) / plans.length;
    const writing = performance.now();
    let row = 0;
    for (const plan of plans) {
      const { outFeatures, inFeatures } = plan.linear;
      const [from, to] = [row, row + plan.stored.outFeatures];
      row = to;
      const rows = (x: Tensor) => x.slice(0, from, to);
      const { grid, blocks } = solution;
      const own = { ...grid, scale: rows(grid.scale), zero: grid.zero && rows(grid.zero) };
      const coded = { codes: rows(solution.codes), grid: own, ...(blocks && { blocks: rows(blocks) }) };
      using work = new Scope(env.device);
      const q = valuesOf(work, coded, scheme);
      for (const { name, tensor } of target.store(work, plan, scheme, coded)) await writer.write(name, tensor.source());
      weights.set(`${plan.linear.name}.weight`, q.slice(0, 0, outFeatures).slice(1, 0, inFeatures));
      const part = (values: Float32Array) => total(values.subarray(from, to));
      const scale = Math.max(part(solution.energy), Number.MIN_VALUE);
      const note = noteOf(evidence, solution.damp, recipe, method);
      this.#linears.push({
        name: plan.linear.name,
        scheme: describeScheme(scheme),
        bitsPerWeight: bitsPerWeight(scheme, plan.stored.inFeatures, dtype === 'f32' ? 32 : 16),
        error: part(solution.errors) / scale,
        plainError: part(solution.plain) / scale,
        method,
        damp: solution.damp,
        tokens: evidence.tokens ?? statistics?.tokens ?? 0,
        fallbackRows: solution.fallbackRows.slice(from, to).filter(Boolean).length,
        deadChannels: statistics?.energy.subarray(0, inFeatures).filter((value) => value === 0).length ?? 0,
        seconds: Math.round(seconds) / 1000,
        probe: await probe(q),
        ...(note !== undefined && { note }),
      });
    }
    this.#time('write', writing);
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
    const { target, writer } = this.#options;
    await target.writeThrough(block.index, writer);
    await writer.flush();
    this.#time('write', started);
    const stages = Object.fromEntries(Object.entries(this.#stages).map(([name, ms]) => [name, Math.round(ms) / 1000]));
    const linears = this.#linears;
    const report = { block: block.index, linears, stages, ...(this.#coverage && { coverage: this.#coverage }) };
    const detail = this.#detail();
    [this.#linears, this.#coverage, this.#experts, this.#stages] = [[], undefined, undefined, {}];
    return { data: toJson(report), detail };
  }

  #detail(): string {
    const linears = this.#linears;
    if (linears.length === 0) return 'nothing to quantize here';
    const bits = linears.reduce((sum, { bitsPerWeight }) => sum + bitsPerWeight, 0) / linears.length;
    const coverage = this.#coverage;
    const experts = coverage ? `, ${coverage.starved} of ${coverage.experts} experts starved` : '';
    const [error, plain] = [meanError(linears), meanError(linears, 'plainError')];
    return `relative error ${error.toExponential(2)} (rounding ${plain.toExponential(2)}), ${bits.toFixed(2)} bits${experts}`;
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

type Planned = LinearPlan & { readonly scheme: NonNullable<LinearPlan['scheme']> };

function noteOf(evidence: Evidence, damp: number, recipe: Recipe, method: string): string | undefined {
  const notes = evidence.note === undefined ? [] : [evidence.note];
  if (method === 'gptq' && damp > recipe.damp) notes.push(`damping raised to ${damp} for a positive definite Hessian`);
  return notes.length > 0 ? notes.join('; ') : undefined;
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
