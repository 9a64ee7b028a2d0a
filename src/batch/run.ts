import { cpus } from 'node:os';
import { relative } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { ConvertError } from '../base/errors.js';
import type { Log } from '../base/log.js';
import { duration } from '../base/text.js';
import { tool } from '../base/version.js';
import { Meter } from './meter.js';
import { Metrics, MetricsFile, serveMetrics } from './metrics.js';
import { runShards, type Places } from './shards.js';
import { stemOf } from './slurm-script.js';
import { argumentsOf, BatchState, fingerprintOf, isDone, newRecord, wasFinished, type JobRecord } from './state.js';
import type { Job, JobState } from './types.js';
import { patience, shellCode, Worker, worthRetrying, type Outcome } from './worker.js';

export interface BatchOptions {
  readonly jobs: readonly Job[];
  readonly workFolder: string;
  /** Path of our own program, which the workers run. */
  readonly program: string;
  readonly environment: NodeJS.ProcessEnv;
  /** Workers at a time. */
  readonly parallel: number;
  /** GPUs of this machine; worker i takes GPU i modulo this, where its job may. */
  readonly gpus: number;
  /** Go on with other jobs when one has failed. */
  readonly keepGoing: boolean;
  readonly retries: number;
  readonly metricsFile: string | undefined;
  readonly metricsAddress: { readonly host: string; readonly port: number } | undefined;
}

export interface JobReport extends JobRecord {
  readonly name: string;
  readonly command: string;
  readonly needs: readonly string[];
  readonly out: string | null;
  /** Done by an earlier run. */
  readonly before: boolean;
}

export interface BatchReport {
  readonly jobs: readonly JobReport[];
  readonly seconds: number;
  readonly workFolder: string;
  readonly retries: number;
  readonly interrupted: boolean;
}

/**
 * Runs jobs, each in a process of its own, in an order that their needs allow. What an earlier run finished is left
 * alone. On `signal` the workers finish their block and the jobs wait for the next run. The state is on disk after
 * each change. Failed jobs do not throw: they are in the report.
 */
export async function runBatch(options: BatchOptions, log: Log, signal: AbortSignal): Promise<BatchReport> {
  return await inBatch(options, log, (state, metrics, file) =>
    new Run(options, state, metrics, file, log, signal).all(),
  );
}

/** Holds the work folder of a batch, and serves and keeps its numbers, for as long as `body` runs. */
export async function inBatch<T>(
  options: Pick<BatchOptions, 'workFolder' | 'metricsFile' | 'metricsAddress'>,
  log: Log,
  body: (state: BatchState, metrics: Metrics, file: MetricsFile | undefined) => Promise<T>,
): Promise<T> {
  const state = await BatchState.open(options.workFolder);
  try {
    const metrics = new Metrics(tool.version);
    const served = options.metricsAddress && (await serveMetrics(metrics, options.metricsAddress));
    if (served) log.info(`Metrics: ${served.url}`);
    const file = options.metricsFile === undefined ? undefined : new MetricsFile(options.metricsFile, metrics);
    try {
      return await body(state, metrics, file);
    } finally {
      served?.server.close();
      metrics.set('batch_running', {}, 0);
      await file?.flush();
    }
  } finally {
    await state.close();
  }
}

/** What the records of all jobs say in numbers. */
export function publishRecords(metrics: Metrics, records: ReadonlyMap<string, JobRecord>): void {
  metrics.setStates([...records.values()].map(({ state }) => state));
  for (const [name, { attempts, seconds, memory }] of records) {
    if (attempts === 0) continue;
    metrics.set('job_attempts', { name }, attempts);
    metrics.set('job_duration_seconds', { name }, seconds);
    if (memory !== null) metrics.raise('job_memory_peak_bytes', { name }, memory);
  }
}

/** How a job has ended, in a few words. */
export function endOf(name: string, { state, message, seconds }: JobRecord): string {
  const words: Partial<Record<JobState, string>> = { gate: 'a quality gate failed', interrupted: 'interrupted; goes on with the next run' }; // prettier-ignore
  const why = state === 'done' || message === null ? '' : `: ${message.split('\n')[0]}`;
  const time = state === 'skipped' ? '' : `, ${duration(seconds)}`;
  return `${name} ${words[state] ?? state}${time}${why}`;
}

/** `before`: the jobs that earlier runs had done. */
export const jobReports = (jobs: readonly Job[], records: ReadonlyMap<string, JobRecord>, before: ReadonlySet<string>): JobReport[] =>
  jobs.map((job) => ({
    name: job.name,
    command: job.command,
    needs: job.needs,
    out: job.out === undefined ? null : relative(process.cwd(), job.out),
    before: before.has(job.name),
    ...records.get(job.name)!,
  })); // prettier-ignore

class Run {
  readonly #running = new Map<string, Promise<void>>();
  readonly #workers = new Set<Worker>();
  readonly #records = new Map<string, JobRecord>();
  readonly #before = new Set<string>();
  readonly #freeSlots: number[];
  /** Jobs in shards that could use more places. */
  readonly #hungry = new Set<() => void>();
  #wake: () => void = () => undefined;
  #failed = false;
  #retries = 0;
  #ended = 0;

  constructor(
    private readonly options: BatchOptions,
    private readonly state: BatchState,
    private readonly metrics: Metrics,
    private readonly file: MetricsFile | undefined,
    private readonly log: Log,
    private readonly signal: AbortSignal,
  ) {
    this.#freeSlots = Array.from({ length: options.parallel }, (_, i) => i);
  }

  async all(): Promise<BatchReport> {
    const started = performance.now();
    const { jobs } = this.options;
    const stopAll = () => {
      this.state.event('batch-interrupt', { running: [...this.#running.keys()] }).catch(() => undefined); // batch-end tells of a full disk
      this.#workers.forEach((worker) => worker.stop());
    };
    // Whatever ends this process, short of SIGKILL, leaves no worker behind.
    const killAll = () => this.#workers.forEach((worker) => worker.kill());
    this.signal.addEventListener('abort', stopAll);
    process.once('exit', killAll);
    try {
      await this.state.event('batch-start', { jobs: jobs.length, parallel: this.options.parallel, version: tool.version }); // prettier-ignore
      await this.#lookBack();
      for (;;) {
        await this.#startReady();
        if (this.#running.size === 0) break;
        for (const feed of this.#hungry) feed();
        const woken = new Promise<void>((wake) => (this.#wake = wake));
        await Promise.race([...this.#running.values(), woken]);
      }
      const report = this.#report((performance.now() - started) / 1000);
      const counts = Object.fromEntries(report.jobs.map(({ name, state }) => [name, state]));
      await this.state.event('batch-end', { seconds: report.seconds, interrupted: report.interrupted, jobs: counts });
      return report;
    } finally {
      killAll(); // only where something above has thrown are there any
      await Promise.allSettled(this.#running.values());
      this.signal.removeEventListener('abort', stopAll);
      process.removeListener('exit', killAll);
    }
  }

  /** What earlier runs left: finished jobs stay; all others begin or go on. */
  async #lookBack(): Promise<void> {
    for (const job of this.options.jobs) {
      const stored = this.state.get(job.name);
      const needsRun = job.needs.some((need) => !this.#before.has(need));
      if (!needsRun && (await isDone(job, stored))) {
        this.#before.add(job.name);
        await this.#set(job.name, stored!);
      } else if (!needsRun && (await wasFinished(job, stored))) {
        this.#before.add(job.name);
        await this.#set(job.name, { ...stored!, state: 'done', exitCode: 0, message: null });
      } else {
        this.#records.set(job.name, { ...newRecord(''), attempts: stored?.attempts ?? 0 });
      }
    }
    this.#ended = this.#before.size;
    if (this.#before.size > 0) this.log.info(`${this.#before.size} of ${this.options.jobs.length} jobs are done already.`); // prettier-ignore
    this.#publish();
  }

  async #startReady(): Promise<void> {
    const stateOf = (name: string): JobState => this.#records.get(name)!.state;
    for (const job of this.options.jobs) {
      if (stateOf(job.name) !== 'waiting') continue;
      const broken = job.needs.find((need) => ['failed', 'gate', 'skipped'].includes(stateOf(need)));
      if (broken !== undefined) {
        await this.#end(job, { ...this.#records.get(job.name)!, state: 'skipped', message: `needs ${broken}, which is not done` }); // prettier-ignore
        continue;
      }
      if (this.signal.aborted || (this.#failed && !this.options.keepGoing)) continue;
      if (!job.needs.every((need) => stateOf(need) === 'done')) continue;
      const slot = this.#freeSlots.shift();
      if (slot === undefined) return;
      await this.#set(job.name, { ...this.#records.get(job.name)!, fingerprint: await fingerprintOf(job), state: 'running', started: new Date().toISOString() }); // prettier-ignore
      const work = this.#run(job, slot).finally(() => {
        this.#running.delete(job.name);
        this.#freeSlots.unshift(slot);
      });
      this.#running.set(job.name, work);
    }
  }

  async #run(job: Job, slot: number): Promise<void> {
    const retries = job.retries ?? this.options.retries;
    for (let attempt = 1; ; attempt++) {
      const outcome =
        job.shards === undefined
          ? await this.#step(job, [...argumentsOf(job), ...this.#place(job, slot)])
          : await runShards(job, slot, this.#places, (argv, place, shard) => this.#step(job, [...argv, ...this.#place(job, place)], shard)); // prettier-ignore
      const before = this.#records.get(job.name)!;
      const record = {
        ...before,
        attempts: before.attempts + 1,
        seconds: outcome.seconds,
        exitCode: outcome.exitCode,
        signal: outcome.signal,
        message: outcome.message,
        memory: outcome.usage.memory,
        ended: new Date().toISOString(),
      };
      if (outcome.exitCode === 0) {
        await this.state.storeResult(job.name, outcome.result ?? null);
        return this.#end(job, { ...record, state: 'done', message: null });
      }
      if (outcome.result !== undefined) await this.state.storeResult(job.name, outcome.result);
      // Asked to stop, a worker that crashed instead also waits for the next run.
      if (this.signal.aborted && worthRetrying(outcome)) return this.#end(job, { ...record, state: 'interrupted' });
      if (outcome.exitCode === 3) this.metrics.add('gate_failures_total', {}, 1);
      if (attempt > retries || !worthRetrying(outcome)) {
        return this.#end(job, { ...record, state: outcome.exitCode === 3 ? 'gate' : 'failed' });
      }
      this.#retries++;
      this.metrics.add('retries_total', {}, 1);
      await this.#set(job.name, record);
      const firstLine = outcome.message?.split('\n')[0] ?? '';
      this.log.warn(`${job.name}: ${firstLine}; trying again (${attempt} of ${retries})`);
      await this.state.event('job-retry', { job: job.name, attempt, exitCode: outcome.exitCode, signal: outcome.signal, message: outcome.message }); // prettier-ignore
      if (outcome.exitCode === 4) await delay(1000 * patience(attempt), undefined, { signal: this.signal }).catch(() => undefined); // prettier-ignore
      if (this.signal.aborted) return this.#end(job, { ...record, state: 'interrupted' });
    }
  }

  /** Of the last worker of each job, or of each of its shards. */
  readonly #meters = new Map<string, Meter>();

  readonly #places: Places = {
    take: () => (this.signal.aborted ? undefined : this.#freeSlots.shift()),
    give: (slot) => {
      this.#freeSlots.unshift(slot);
      this.#wake();
    },
    watch: (feed) => {
      this.#hungry.add(feed);
      return () => this.#hungry.delete(feed);
    },
  };

  /** Runs our own program for a job; `shard` where it solves one of the job's shards. */
  async #step(job: Job, argv: readonly string[], shard?: number): Promise<Outcome> {
    const key = `${job.name} ${shard ?? ''}`;
    const meter = new Meter(this.metrics, job.name, this.#meters.get(key));
    this.#meters.set(key, meter);
    const say = (event: string, facts: Readonly<Record<string, unknown>>) =>
      this.state.event(event, { job: job.name, ...facts }).catch(() => undefined); // the end of the job tells of a full disk
    const worker = new Worker({
      program: this.options.program,
      argv,
      environment: this.options.environment,
      logPath: this.state.logPath(shard === undefined ? job.name : stemOf(job.name, 'worker', shard)),
      onStep: (step) => {
        meter.step(step);
        this.file?.touch();
        const { stage, done, total, detail, data } = step;
        this.log.debug(`${job.name}: ${stage} ${done}/${total}${detail === undefined ? '' : `  ${detail}`}`);
        void say('progress', { stage, done, total, detail, data });
      },
      onUsage: (usage) => meter.usage(usage),
      onWarning: (text) => {
        this.log.warn(`${job.name}: ${text}`);
        void say('warning', { text });
      },
    });
    this.#workers.add(worker);
    // The signal may have come while the worker was being made.
    if (this.signal.aborted) worker.stop();
    await this.state.event('job-start', { job: job.name, pid: worker.pid ?? null, argv });
    const outcome = await worker.ended;
    this.#workers.delete(worker);
    meter.end(outcome);
    const { exitCode, signal, seconds, usage, message } = outcome;
    await this.state.event('job-end', { job: job.name, exitCode, signal, seconds, ...usage, message });
    return outcome;
  }

  /** The share of the machine that a job gets where it names none itself. */
  #place(job: Job, slot: number): string[] {
    const { gpus, parallel } = this.options;
    const device = gpus > 0 && job.values.device === 'auto' ? [`--device=cuda:${slot % gpus}`] : [];
    const shares = parallel > 1 && 'threads' in job.values && job.values.threads === undefined;
    return [...device, ...(shares ? [`--threads=${Math.max(1, Math.floor(cpus().length / parallel))}`] : [])];
  }

  async #end(job: Job, record: JobRecord): Promise<void> {
    if (record.state === 'failed' || record.state === 'gate') this.#failed = true;
    await this.#set(job.name, record);
    const detail = endOf(job.name, record);
    this.log.progress({ stage: 'batch', done: ++this.#ended, total: this.options.jobs.length, detail, data: { job: job.name, state: record.state } }); // prettier-ignore
  }

  async #set(name: string, record: JobRecord): Promise<void> {
    const before = this.#records.get(name);
    this.#records.set(name, record);
    await this.state.set(name, record);
    this.#publish();
    const { state, attempts, message } = record;
    if (state !== before?.state) await this.state.event('job-state', { job: name, state, attempts, message });
  }

  #publish(): void {
    publishRecords(this.metrics, this.#records);
    this.file?.touch();
  }

  #report(seconds: number): BatchReport {
    const jobs = jobReports(this.options.jobs, this.#records, this.#before);
    return { jobs, seconds, workFolder: this.options.workFolder, retries: this.#retries, interrupted: this.signal.aborted && jobs.some(({ state }) => ['waiting', 'interrupted'].includes(state)) }; // prettier-ignore
  }
}

/**
 * What a batch with failed jobs ends with; undefined when all are done. Interrupted: 75. Otherwise the code of the
 * gravest failure: a bug (70), resources or a crash (4), usage (2), input (1), a gate (3).
 */
export function failureOf(report: BatchReport): ConvertError | undefined {
  const bad = report.jobs.filter(({ state }) => state !== 'done');
  if (bad.length === 0) return undefined;
  const of = `${bad.length} of ${report.jobs.length} jobs are not done`;
  if (report.interrupted) return new ConvertError('interrupted', `Interrupted: ${of}`);
  const codes = report.jobs.filter(({ state }) => state === 'failed' || state === 'gate').map((job) => shellCode(job)); // prettier-ignore
  const kind = codes.includes(70)
    ? 'internal'
    : codes.some((code) => code === 4 || code > 70)
      ? 'resource'
      : codes.includes(2)
        ? 'usage'
        : codes.some((code) => code !== 3)
          ? 'input'
          : 'gate';
  const causes = bad.filter(({ state }) => state === 'failed' || state === 'gate').map(({ name }) => name);
  return new ConvertError(kind, of, {
    got: `${causes.slice(0, 5).join(', ')}${causes.length > 5 ? ` and ${causes.length - 5} more` : ''} failed`,
    hint: `Logs: ${report.workFolder}/logs. The same command does only what is not done.`,
  });
}
