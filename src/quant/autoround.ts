import type { FloatDType } from '../base/dtype.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { TuningSite } from '../arch/stream.js';
import type { Weights } from '../nn/calls.js';
import { cast, copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { tuneBlock } from '../tune/block.js';
import { SignDescent, type Parameter } from '../tune/parameters.js';
import { inCells, positionsOf, RoundingUnit } from '../tune/rounding.js';
import { Overlay } from '../tune/weights.js';
import type { RoundingReport } from './report.js';
import type { Rounding, StoredScales } from './scheme.js';
import { noWorseThanRounding } from './solve.js';
import { parts, type Stack } from './stack.js';

/** How far inside its cell a weight begins whose code error feedback chose, in parts of the cell. */
const margin = 0.1;
/** Windows that judge and are not trained on. */
const judges = 1 / 16;

/** A stack that waits, and the unit that stands for it while its block is tuned. */
interface Waiting {
  readonly stack: Stack;
  readonly unit: RoundingUnit;
}

/**
 * AutoRound (Cheng et al. 2023): once all linears of a block have codes, offsets of their rounding and factors of their
 * scales learn together, by signed gradient descent, to give the outputs that the full-precision model has there, from
 * the inputs that the quantized blocks before make. The best by windows that were not trained on is kept, the start
 * among them; where that is not the last step, what linears have learned by then is kept of those that are better by it.
 */
export class BlockRounding {
  #stacks: Stack[] = [];
  #waiting: Waiting[] = [];
  readonly #scope: Scope;

  constructor(
    readonly env: JobEnv,
    readonly rounding: Rounding,
    readonly scales: (dtype: FloatDType) => StoredScales,
    readonly resumeHint: string,
  ) {
    this.#scope = new Scope(env.device);
  }

  /** Keeps a stack until its block is tuned; `scope` loses what it owns of it. */
  take(scope: Scope, stack: Stack): void {
    const own = <T extends Tensor | undefined>(x: T): T =>
      (x && (scope.owns(x) ? scope.move(x, this.#scope) : cast(this.#scope, x, x.dtype))) as T;
    const { w, solution, statistics } = stack;
    const { grid, blocks } = solution;
    this.#stacks.push({
      ...stack,
      w: own(w),
      solution: {
        ...solution,
        codes: own(solution.codes),
        grid: { ...grid, scale: own(grid.scale), zero: own(grid.zero) },
        ...(blocks && { blocks: own(blocks) }),
      },
      statistics: statistics && { ...statistics, h: own(statistics.h), diagonal: own(statistics.diagonal) },
    });
  }

  /** Undefined: there is nothing to tune. */
  async tune(site: TuningSite): Promise<RoundingReport | undefined> {
    if (this.#stacks.length === 0) return undefined;
    const { env, rounding, resumeHint } = this;
    const { block, n, length, weights, dtype, width } = site;
    this.#waiting = this.#stacks.map((stack) => ({ stack, unit: this.#unit(stack, block.index) }));
    const units = this.#waiting.map(({ unit }) => unit);
    const held = Math.floor(n * judges);
    const perPass = Math.max(1, Math.floor((env.device.kind === 'cpu' ? 4096 : 16384) / length));
    const states = (of: TuningSite['input']) => ({ dtype, width, of });
    const { before, after, best, parts, steps } = await tuneBlock({
      ...{ device: env.device, block, n, length, held },
      parameters: units.flatMap(({ parameters }) => parameters),
      parts: partsOf(this.#waiting),
      optimizer: (parameters) => new SignDescent(env.device, parameters),
      weights: (scope) => this.#now(scope, weights, dtype, site),
      context: (scope, current, rows) => site.context(scope, current, rows),
      input: states((row, scope) => site.input(row, scope)),
      target: states((row, scope) => site.target(row, scope)),
      epochs: Number.MAX_SAFE_INTEGER,
      maxSteps: rounding.steps,
      batch: rounding.batch,
      microBatch: Math.min(rounding.batch, perPass),
      lr: rounding.lr ?? 1 / rounding.steps,
      warmup: 0,
      curve: 'linear',
      seed: rounding.seed,
      project: () => units.forEach((unit) => unit.project(this.#scope)),
      onAlarm: ({ kind, step, text }) => {
        if (kind === 'non-finite') env.log.warn(`${block.name}, step ${step}: ${text}`);
      },
      check: () => stopIfAborted(env, resumeHint),
    });
    return { before, after, best, parts: parts ?? 0, steps };
  }

  /** The stacks with what they have learned, one after another; all are given up at the end. */
  async *stacks(): AsyncGenerator<Stack> {
    for (const { stack, unit } of this.#waiting) {
      using work = new Scope(this.env.device);
      const { w, statistics, scheme, plans, solution } = stack;
      const coded = { ...unit.result(work), ...(solution.blocks && { blocks: solution.blocks }) };
      const task = { w, statistics, scheme, stored: this.scales(plans[0]!.dtype) };
      const { damp } = solution;
      yield {
        ...stack,
        method: statistics ? 'autoround' : stack.method,
        solution: { ...(await noWorseThanRounding(work, task, coded)), damp },
      };
    }
    this[Symbol.dispose]();
  }

  #unit({ plans, w, solution, method }: Stack, block: number): RoundingUnit {
    const { grid, blocks } = solution;
    const { name } = plans[0]!.linear;
    const scales = this.scales(plans[0]!.dtype);
    const { codes } = solution;
    const positions = method === 'gptq' ? inCells(this.#scope, w, codes, grid, margin) : positionsOf(this.#scope, w, grid); // prettier-ignore
    return new RoundingUnit(this.#scope, {
      ...{ name, positions, grid, block },
      stored: typeof scales === 'string' ? [scales] : scales,
      fixedGrid: blocks !== undefined,
    });
  }

  /** The block's weights as they are now, by recordable operations. */
  #now(scope: Scope, rest: Weights, dtype: FloatDType, { block }: TuningSite): Weights {
    const values = new Overlay(rest);
    const tuned = new Set<string>();
    for (const { stack, unit } of this.#waiting) {
      const all = unit.value(scope, dtype);
      for (const { plan, from, to } of parts(stack)) {
        const { name, outFeatures, inFeatures } = plan.linear;
        const value = all.slice(0, from, to).slice(0, 0, outFeatures).slice(1, 0, inFeatures);
        values.put({ names: [`${name}.weight`], stacked: false }, value);
        tuned.add(name);
      }
    }
    const experts = block.moe?.expertLinears ?? [];
    for (const part of ['gate', 'up', 'down'] as const) {
      const linears = experts.map((expert) => expert[part]);
      if (!linears.some(({ name }) => tuned.has(name))) continue;
      const { outFeatures, inFeatures } = linears[0]!;
      const stack = scope.empty(dtype, [linears.length * outFeatures, inFeatures]);
      linears.forEach(({ name }, e) => {
        copyInto(stack.slice(0, e * outFeatures, (e + 1) * outFeatures), values.get(`${name}.weight`));
      });
      values.put({ names: linears.map(({ name }) => `${name}.weight`), stacked: true }, stack);
    }
    return values;
  }

  [Symbol.dispose](): void {
    this.#scope[Symbol.dispose]();
    [this.#stacks, this.#waiting] = [[], []];
  }
}

/** Parameters of linears that stand or fall together: a stack's, all experts' as one. */
function partsOf(waiting: readonly Waiting[]): Parameter[][] {
  const isExpert = ({ stack }: Waiting) => stack.plans[0]!.linear.role === 'expert';
  const parametersOf = (some: readonly Waiting[]) => some.flatMap(({ unit }) => unit.parameters);
  const experts = waiting.filter(isExpert);
  return [...waiting.filter((one) => !isExpert(one)).map((one) => [one]), ...(experts.length > 0 ? [experts] : [])].map(parametersOf); // prettier-ignore
}
