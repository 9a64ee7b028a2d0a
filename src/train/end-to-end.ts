import { ConvertError } from '../base/errors.js';
import type { Job, Json } from '../base/job.js';
import { Random } from '../base/rng.js';
import type { JobEnv } from '../backend/env.js';
import { copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { GradientHealth, type Alarm, type HealthState, type HealthSummary } from '../tune/health.js';
import type { AdamOptions } from '../tune/parameters.js';
import { Schedule, shuffled } from '../tune/schedule.js';
import { ShardedOptimizer } from '../tune/sharded.js';
import { pass, type Losses, type PassOptions } from './pass.js';
import { loadTensors, saveTensors } from './state.js';

/** What another device of the group holds: the same weights, teacher and map. */
export type Replica = Pick<PassOptions, 'device' | 'outer' | 'blocks' | 'teacher' | 'map'>;

export interface EndToEndOptions extends Omit<PassOptions, 'device'> {
  readonly env: JobEnv;
  /** Of the devices of `env.group` behind the first, in their order. */
  readonly replicas?: readonly Replica[];
  /** For progress, and the step's name in the journal. */
  readonly stage: string;
  /** [n, length]. */
  readonly tokens: Int32Array;
  readonly n: number;
  readonly length: number;
  /** The last `held` sequences judge; 0: nothing does, and the last step is kept. */
  readonly held: number;
  readonly epochs: number;
  /** Ends earlier; the schedule is made for it. */
  readonly maxSteps?: number;
  /** Ends earlier, in the middle of the schedule. */
  readonly stopAfter?: number;
  /** Sequences a step, and a pass of one device. */
  readonly batch: number;
  readonly microBatch: number;
  readonly lr: number;
  /** Share of the steps over which the learning rate rises. */
  readonly warmup: number;
  readonly adam: AdamOptions;
  readonly seed: number;
  /** Sequences in their own order. */
  readonly inOrder?: boolean;
  /** The held sequences judge by predictions alone, whatever hidden states count for while training. */
  readonly byPredictions?: boolean;
  /** How often an epoch the held sequences judge. */
  readonly judgements: number;
  /** Where state is kept to go on from. */
  readonly job?: Job;
  /** Seconds between two savings. */
  readonly saveEvery?: number;
  readonly resumeHint: string;
  readonly onAlarm?: (alarm: Alarm) => void;
}

export interface StepRecord {
  readonly loss: number;
  readonly crossEntropy: number;
  /** null: there is no teacher. */
  readonly kl: number | null;
  readonly hidden: number | null;
  /** Of the gradient, before clipping. */
  readonly norm: number;
  readonly lr: number;
}

export interface Judgement {
  readonly step: number;
  readonly loss: number;
  readonly crossEntropy: number;
  readonly kl: number | null;
}

export interface EndToEndOutcome {
  readonly steps: readonly StepRecord[];
  readonly judgements: readonly Judgement[];
  /** Step whose parameters are kept; 0: the start. */
  readonly best: number;
  readonly health: HealthSummary;
}

interface Saved {
  readonly file: 'a' | 'b';
  readonly step: number;
  readonly optimizerSteps: number;
  readonly best: number;
  readonly health: HealthState;
  readonly steps: readonly StepRecord[];
  readonly judgements: readonly Judgement[];
}

/**
 * Trains a whole model against the text's next tokens, a teacher's logits and its hidden states. The best by the held
 * sequences is kept, the start among them. With a job it goes on after an interruption at any step, and ends with the
 * same bits.
 */
export class EndToEnd implements Disposable {
  readonly #o: EndToEndOptions;
  /** Rank by rank. */
  readonly #passes: readonly PassOptions[];
  readonly #optimizer: ShardedOptimizer;
  readonly #scopes: readonly Scope[];
  /** The best of the optimizer's values so far. */
  readonly #best: readonly Tensor[];
  #steps: StepRecord[] = [];
  #judgements: Judgement[] = [];
  #health = new GradientHealth();
  #bestStep = 0;
  /** Trained on since the last word on progress. */
  #tokens = 0;
  #file: 'a' | 'b' = 'b';
  #savedAt = performance.now();

  constructor(options: EndToEndOptions) {
    const { env, adam, replicas = [] } = options;
    this.#o = options;
    this.#passes = [{ ...options, device: env.device }, ...replicas.map((replica) => ({ ...options, ...replica }))];
    const copies = this.#passes.map(({ device, outer, blocks, map }) => ({
      device,
      parameters: [outer, ...blocks, ...(map ? [map] : [])].flatMap((part) => part.parameters),
    }));
    this.#optimizer = new ShardedOptimizer(copies, adam, env.group);
    this.#scopes = copies.map(({ device }) => new Scope(device));
    this.#best = this.#optimizer.values().map(({ shape }, i) => this.#scopes[i % copies.length]!.empty('f32', shape));
  }

  async train(): Promise<EndToEndOutcome> {
    const o = this.#o;
    const sequences = o.n - o.held;
    const order = (epoch: number) =>
      o.inOrder ? Array.from({ length: sequences }, (_, i) => i) : shuffled(sequences, new Random(o.seed, epoch));
    const schedule = new Schedule({ ...o, sequences, order });
    const { total, perEpoch } = schedule;
    const every = Math.max(1, Math.round(perEpoch / o.judgements));
    const report = Math.max(1, Math.ceil(total / 100));
    let step = await this.#restore();
    this.#optimizer.spread();
    if (step === 0 && this.#judgements.length === 0) await this.#judge(0);
    for (; step < Math.min(total, o.stopAfter ?? total); step++) {
      if (o.env.signal.aborted) await this.#stop(step);
      const losses = await this.#run(schedule.rows(step), true);
      const lr = schedule.rate(step);
      const norms = await this.#optimizer.step(lr);
      for (const alarm of this.#health.observe(norms)) o.onAlarm?.(alarm);
      this.#steps.push({ ...this.#shown(losses), norm: norms.norm, lr });
      const done = step + 1;
      if (o.held > 0 && (done % every === 0 || done === total)) await this.#judge(done);
      if (done % report === 0 || done === total) this.#progress(done, total);
      if (performance.now() - this.#savedAt > 1000 * (o.saveEvery ?? 120)) await this.#save(done);
    }
    if (o.held > 0) {
      this.#optimizer.values().forEach((value, i) => copyInto(value, this.#best[i]!));
      this.#optimizer.spread();
    }
    const best = o.held > 0 ? this.#bestStep : total;
    return { steps: this.#steps, judgements: this.#judgements, best, health: this.#health.summary() };
  }

  /** Mean losses of sequences, which are divided among the ranks; with their gradients where `learn`. */
  async #run(rows: readonly number[], learn: boolean): Promise<Losses> {
    const share = Math.ceil(rows.length / this.#passes.length);
    // All at the same time; when one fails the others still end first.
    const ends = await Promise.allSettled(
      this.#passes.map((_, rank) =>
        this.#runOn(rank, rows.slice(rank * share, (rank + 1) * share), rows.length, learn),
      ),
    );
    return total(
      ends.map((end) => {
        if (end.status === 'rejected') throw end.reason;
        return end.value;
      }),
    );
  }

  /** One rank's share of the mean losses of `sequences` sequences. */
  async #runOn(rank: number, rows: readonly number[], sequences: number, learn: boolean): Promise<Losses> {
    const { tokens, length, microBatch, byPredictions } = this.#o;
    const losses: Losses[] = [];
    for (let from = 0; from < rows.length; from += microBatch) {
      const part = rows.slice(from, from + microBatch);
      const ids = new Int32Array(part.length * length);
      part.forEach((row, i) => ids.set(tokens.subarray(row * length, (row + 1) * length), i * length));
      if (learn) this.#tokens += ids.length;
      const optimizer = learn ? this.#optimizer.ranks[rank] : undefined;
      const how = this.#passes[rank]!;
      const { hiddenOf: _, ...predictions } = how;
      losses.push(await pass(!learn && byPredictions ? predictions : how, ids, part.length, sequences, optimizer));
    }
    return total(losses);
  }

  #shown({ crossEntropy, kl, hidden }: Losses): Omit<StepRecord, 'norm' | 'lr'> {
    const { teacher, hiddenOf, loss: weights } = this.#o;
    return {
      loss: weights.crossEntropy * crossEntropy + weights.kl * kl + weights.hidden * hidden,
      crossEntropy,
      kl: teacher ? kl : null,
      hidden: teacher && hiddenOf ? hidden : null,
    };
  }

  /** How good the parameters are on the held sequences; the best so far are kept. */
  async #judge(step: number): Promise<void> {
    const { n, held } = this.#o;
    const keep = () => {
      this.#bestStep = step;
      this.#optimizer.values().forEach((value, i) => copyInto(this.#best[i]!, value));
    };
    if (held === 0) return keep();
    const losses = await this.#run(Array.from({ length: held }, (_, i) => n - held + i), false); // prettier-ignore
    const { hidden: _, ...shown } = this.#shown(losses);
    if (this.#judgements.every(({ loss }) => shown.loss < loss)) keep();
    this.#judgements.push({ step, ...shown });
    for (const alarm of this.#health.judge(shown.loss)) this.#o.onAlarm?.(alarm);
  }

  #progress(step: number, total: number): void {
    const { env, stage } = this.#o;
    const record = this.#steps.at(-1)!;
    const judged = this.#judgements.at(-1);
    const detail = [
      `loss ${record.loss.toPrecision(4)}`,
      ...(record.kl === null ? [] : [`KL ${record.kl.toPrecision(4)}`]),
      `gradient ${record.norm.toPrecision(3)}`,
      ...(judged ? [`held-out loss ${judged.loss.toPrecision(4)}`] : []),
    ].join(', ');
    env.log.progress({ stage, done: step, total, detail, data: { ...record, tokens: this.#tokens } });
    this.#tokens = 0;
  }

  async #stop(step: number): Promise<never> {
    const saved = this.#o.job !== undefined;
    if (saved) await this.#save(step);
    const what = saved ? 'Interrupted; the training so far is saved' : 'Interrupted';
    throw new ConvertError('interrupted', what, { hint: this.#o.resumeHint });
  }

  async #save(step: number): Promise<void> {
    const { job, stage } = this.#o;
    this.#savedAt = performance.now();
    if (!job) return;
    // The file that the journal does not speak of is overwritten.
    this.#file = this.#file === 'a' ? 'b' : 'a';
    await saveTensors(job.statePath(`training-${this.#file}.bin`), [...this.#optimizer.state(), ...this.#best]);
    const saved: Saved = {
      file: this.#file,
      step,
      optimizerSteps: this.#optimizer.steps,
      best: this.#bestStep,
      health: this.#health.state(),
      steps: this.#steps,
      judgements: this.#judgements,
    };
    await job.mark(`${stage} in progress`, JSON.parse(JSON.stringify(saved)) as Json);
    this.#savedAt = performance.now();
  }

  async #restore(): Promise<number> {
    const { job, stage, env } = this.#o;
    const saved = job?.data(`${stage} in progress`) as Saved | undefined;
    if (!job || !saved) return 0;
    await loadTensors(job.statePath(`training-${saved.file}.bin`), [...this.#optimizer.state(), ...this.#best]);
    [this.#file, this.#bestStep, this.#health] = [saved.file, saved.best, new GradientHealth(saved.health)];
    [this.#steps, this.#judgements] = [[...saved.steps], [...saved.judgements]];
    this.#optimizer.steps = saved.optimizerSteps;
    env.log.info(`Going on after step ${saved.step} (${stage})`);
    return saved.step;
  }

  [Symbol.dispose](): void {
    this.#optimizer[Symbol.dispose]();
    for (const scope of this.#scopes) scope[Symbol.dispose]();
  }
}

function total(parts: readonly Losses[]): Losses {
  const sum = { crossEntropy: 0, kl: 0, hidden: 0 };
  for (const { crossEntropy, kl, hidden } of parts) {
    sum.crossEntropy += crossEntropy;
    sum.kl += kl;
    sum.hidden += hidden;
  }
  return sum;
}
