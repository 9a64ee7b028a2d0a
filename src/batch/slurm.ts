import { createHash } from 'node:crypto';
import { resolve } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { badInput, ConvertError } from '../base/errors.js';
import { writeFileAtomic } from '../base/files.js';
import type { Log } from '../base/log.js';
import { tool } from '../base/version.js';
import type { Metrics, MetricsFile } from './metrics.js';
import { endOf, inBatch, jobReports, publishRecords, type BatchOptions, type BatchReport } from './run.js';
import { Slurm, type Queue } from './slurm-queue.js';
import { sbatchOptions, sbatchScript, slurmPath, specOf, stemOf, tasksOf, type SlurmTask } from './slurm-script.js';
import { jobRecordOf, readSubmissions, viewsOf, writeSubmissions, type Submission } from './slurm-status.js';
import { argumentsOf, BatchState, isDone, newRecord, type JobRecord } from './state.js';
import type { Job, JobState } from './types.js';

export interface SlurmBatchOptions extends Omit<BatchOptions, 'parallel' | 'gpus' | 'keepGoing'> {
  /** What runs a task on a node: src/batch/slurm-main.ts, built. */
  readonly taskProgram: string;
  /** Stay until all have ended. */
  readonly wait: boolean;
}

type Known = Pick<BatchOptions, 'jobs' | 'workFolder' | 'environment'>;

/** Slurm's controller serves everybody: it is asked seldom. The records of tasks are files, and are looked at oftener. */
const askEveryMs = 5000;
const lookEveryMs = 1000;
/** How long the record of an ended task may take to show itself on a shared file system. */
const patienceMs = 60_000;

/**
 * Gives Slurm what is not done, each job with the jobs that it must wait for, and with `wait` stays until all have
 * ended. Jobs that are in the queue already stay there. Errors: input, where Slurm refuses a job.
 */
export async function runOnSlurm(options: SlurmBatchOptions, log: Log, signal: AbortSignal): Promise<BatchReport> {
  return await inBatch(options, log, (state, metrics, file) =>
    new Run(options, state, metrics, file, log, signal).all(),
  );
}

/** How all jobs stand, wherever they run. Nothing is written and no lock is taken. */
export async function batchStatus({ jobs, workFolder, environment }: Known): Promise<BatchReport> {
  const started = performance.now();
  const stored = await BatchState.read(workFolder);
  const view = await View.open(workFolder, environment);
  const records = new Map<string, JobRecord>();
  for (const job of jobs) records.set(job.name, await view.recordOf(job, stored.get(job.name), (need) => records.get(need)!.state)); // prettier-ignore
  return reportOf(jobs, records, new Set(), workFolder, started);
}

/** Ends what Slurm has of this batch; finished blocks stay. Gives the names of the jobs. */
export async function cancelOnSlurm({ jobs, workFolder, environment }: Known): Promise<string[]> {
  const view = await View.open(workFolder, environment);
  const live: string[] = [];
  for (const { name } of jobs) if ((await view.tasksOf(name)).some((task) => task.live)) live.push(name);
  await view.slurm.cancel(live.flatMap((name) => view.submissions[name]!.tasks.map(({ id }) => id)));
  return live;
}

/** Before jobs run here: takes over what Slurm has finished. Errors: input, while Slurm still has some. */
export async function takeBackFromSlurm({ jobs, workFolder, environment }: Known): Promise<void> {
  if (Object.keys(await readSubmissions(workFolder)).length === 0) return;
  const state = await BatchState.open(workFolder);
  try {
    const view = await View.open(workFolder, environment);
    const live: string[] = [];
    for (const job of jobs) {
      const record = await view.recordOf(job, state.get(job.name), (need) => state.get(need)?.state ?? 'waiting');
      await state.set(job.name, record);
      if ((await view.tasksOf(job.name)).some((task) => task.live)) live.push(job.name);
    }
    if (live.length > 0) throw badInput('Slurm has jobs of this batch', { where: workFolder, got: live.slice(0, 5).join(', '), hint: '--status shows them, --cancel ends them; with --executor slurm the batch goes on there.' }); // prettier-ignore
    await writeSubmissions(workFolder, {});
  } finally {
    await state.close();
  }
}

/** What Slurm and the tasks say at one moment. */
class View {
  private constructor(
    readonly slurm: Slurm,
    private readonly workFolder: string,
    readonly submissions: Record<string, Submission>,
    private queue: Queue,
  ) {}

  static async open(workFolder: string, environment: NodeJS.ProcessEnv): Promise<View> {
    const view = new View(new Slurm(environment), workFolder, { ...(await readSubmissions(workFolder)) }, new Map());
    await view.ask();
    return view;
  }

  /** Asks Slurm again; where nothing was given to it there is nothing to ask. */
  async ask(): Promise<void> {
    const ids = Object.values(this.submissions).flatMap(({ tasks }) => tasks.map(({ id }) => id));
    if (ids.length === 0) return;
    const queue = await this.slurm.queue();
    const known = new Set([...queue.keys()].map((key) => key.split('_')[0]));
    this.queue = new Map([...(await this.slurm.accounts(ids.filter((id) => !known.has(id)))), ...queue]);
  }

  tasksOf = async (name: string) => {
    const submission = this.submissions[name];
    return submission === undefined ? [] : viewsOf(this.workFolder, name, submission, this.queue);
  };

  /** The job's record: of its tasks, or `stored` where Slurm has none. Tasks that left no record count as running while `isLate`. */
  async recordOf(job: Job, stored: JobRecord | undefined, stateOfNeed: (name: string) => JobState, isLate = (): boolean => false): Promise<JobRecord> {
    const submission = this.submissions[job.name];
    if (submission === undefined) return stored ?? newRecord('');
    const views = await this.tasksOf(job.name);
    const shown = views.map((view) => (view.lost && isLate() ? { ...view, state: 'running' as const, live: true } : view)); // prettier-ignore
    return jobRecordOf(job, submission, shown, stateOfNeed);
  } // prettier-ignore
}

class Run {
  readonly #started = performance.now();
  readonly #records = new Map<string, JobRecord>();
  readonly #before = new Set<string>();
  readonly #ended = new Set<string>();
  /** When a job was first seen to have ended without a record. */
  readonly #late = new Map<string, number>();
  readonly #workFolder: string;
  readonly #context;

  constructor(
    private readonly options: SlurmBatchOptions,
    private readonly state: BatchState,
    private readonly metrics: Metrics,
    private readonly file: MetricsFile | undefined,
    private readonly log: Log,
    private readonly signal: AbortSignal,
  ) {
    this.#workFolder = resolve(options.workFolder);
    const { program, taskProgram, retries } = options;
    this.#context = { program, taskProgram, retries, workFolder: this.#workFolder, folder: process.cwd() };
  }

  async all(): Promise<BatchReport> {
    const { jobs, wait } = this.options;
    await this.state.event('batch-start', { jobs: jobs.length, executor: 'slurm', version: tool.version });
    const view = await View.open(this.#workFolder, this.options.environment);
    await this.#lookBack(view);
    for (const job of jobs) {
      if (this.#before.has(job.name) || this.signal.aborted) continue;
      if (view.submissions[job.name] === undefined) await this.#submit(job, view);
      else this.#requireSame(job, view.submissions[job.name]!);
    }
    publishRecords(this.metrics, this.#records);
    const waiting = jobs.length - this.#before.size;
    if (wait && waiting > 0) await this.#watch(view);
    const report = reportOf(jobs, this.#records, this.#before, this.#workFolder, this.#started);
    const interrupted = this.signal.aborted && this.#isOpen();
    if (interrupted) this.log.warn('Slurm goes on with the jobs: --status shows them, --cancel ends them.');
    const counts = Object.fromEntries(report.jobs.map(({ name, state }) => [name, state]));
    await this.state.event('batch-end', { seconds: report.seconds, interrupted, jobs: counts });
    return { ...report, interrupted: interrupted || report.interrupted };
  }

  /** What earlier runs left: finished jobs stay, and so do those in the queue; all others are submitted. */
  async #lookBack(view: View): Promise<void> {
    for (const job of this.options.jobs) {
      const { name } = job;
      const stored = await view.recordOf(job, this.state.get(name), (need) => this.#records.get(need)!.state);
      const live = (await view.tasksOf(name)).some((task) => task.live);
      if (!live) delete view.submissions[name];
      if (!live && job.needs.every((need) => this.#before.has(need)) && (await isDone(job, stored))) this.#before.add(name); // prettier-ignore
      this.#records.set(name, stored);
      if (view.submissions[name] === undefined) await this.state.set(name, stored);
    }
    await writeSubmissions(this.#workFolder, view.submissions);
    for (const name of this.#before) this.#ended.add(name);
    if (this.#before.size > 0) this.log.info(`${this.#before.size} of ${this.options.jobs.length} jobs are done already.`); // prettier-ignore
  }

  async #submit(job: Job, view: View): Promise<void> {
    const tasks: Submission['tasks'][number][] = [];
    try {
      for (const task of tasksOf(job)) {
        const id = await this.#submitTask(task, view, tasks.at(-1)?.id);
        tasks.push({ stage: task.stage ?? null, id, count: task.count ?? null });
      }
    } catch (error) {
      await view.slurm.cancel(tasks.map(({ id }) => id)).catch(() => undefined); // the refusal is what matters
      throw error;
    }
    const attempts = this.#records.get(job.name)!.attempts;
    view.submissions[job.name] = { tasks, request: requestHash(job), attempts };
    await writeSubmissions(this.#workFolder, view.submissions);
    const ids = tasks.map(({ id }) => id);
    await this.state.event('job-submit', { job: job.name, slurm: ids });
    await this.#set(job.name, { ...newRecord(''), attempts, message: `in Slurm’s queue as ${ids.join(', ')}` });
    this.log.info(`${job.name}: in Slurm’s queue as ${ids.join(', ')}`);
  }

  async #submitTask(task: SlurmTask, view: View, stageBefore: string | undefined): Promise<string> {
    const stem = stemOf(task.job.name, task.stage);
    const script = slurmPath(this.#workFolder, stem, 'sh');
    await writeFileAtomic(slurmPath(this.#workFolder, stem, 'json'), `${JSON.stringify(specOf(task, this.#context), null, 1)}\n`); // prettier-ignore
    await writeFileAtomic(script, sbatchScript(task, this.#context));
    const needs = task.job.needs.flatMap((need) => view.submissions[need]?.tasks.at(-1)?.id ?? []);
    const after = stageBefore === undefined ? needs : [stageBefore];
    const dependency = after.length === 0 ? [] : [`--dependency=afterok:${after.join(':')}`];
    return view.slurm.submit([...sbatchOptions(task, this.#context), ...dependency], script, stem);
  }

  #requireSame(job: Job, { request }: Submission): void {
    if (request === requestHash(job)) return;
    throw badInput('A job has changed while Slurm has it', { where: job.name, hint: 'Wait for it, or end it with --cancel and submit again.' }); // prettier-ignore
  }

  async #watch(view: View): Promise<void> {
    for (let asked = 0, silent = false; ;) {
      if (performance.now() - asked > askEveryMs || asked === 0) {
        asked = performance.now();
        try {
          await view.ask();
          silent = false;
        } catch (error) {
          if (!(error instanceof ConvertError)) throw error;
          if (!silent) this.log.warn(`${error.message.split('\n')[0]}; asking again.`);
          silent = true;
        }
      }
      await this.#look(view);
      if (!this.#isOpen() || this.signal.aborted) return;
      await delay(lookEveryMs, undefined, { signal: this.signal }).catch(() => undefined);
    }
  }

  async #look(view: View): Promise<void> {
    for (const job of this.options.jobs) {
      const { name } = job;
      if (this.#ended.has(name)) continue;
      const record = await view.recordOf(job, undefined, (need) => this.#records.get(need)!.state, () => this.#isLate(name)); // prettier-ignore
      await this.#set(name, record);
      if (isOpen(record)) continue;
      this.#ended.add(name);
      delete view.submissions[name];
      await writeSubmissions(this.#workFolder, view.submissions);
      if (record.state === 'gate') this.metrics.add('gate_failures_total', {}, 1);
      this.log.progress({ stage: 'batch', done: this.#ended.size, total: this.options.jobs.length, detail: endOf(name, record), data: { job: name, state: record.state } }); // prettier-ignore
    }
  }

  #isLate(name: string): boolean {
    const since = this.#late.get(name) ?? Date.now();
    this.#late.set(name, since);
    return Date.now() - since < patienceMs;
  }

  #isOpen = (): boolean => [...this.#records.values()].some(isOpen);

  async #set(name: string, record: JobRecord): Promise<void> {
    const before = this.#records.get(name);
    this.#records.set(name, record);
    if (before?.state === record.state && before.message === record.message && before.attempts === record.attempts) return; // prettier-ignore
    await this.state.set(name, record);
    publishRecords(this.metrics, this.#records);
    this.file?.touch();
    const { state, attempts, message } = record;
    if (state !== before?.state) await this.state.event('job-state', { job: name, state, attempts, message });
  }
}

const isOpen = ({ state }: JobRecord): boolean => state === 'waiting' || state === 'running';

const requestHash = (job: Job): string =>
  createHash('sha256')
    .update(JSON.stringify(tasksOf(job).map(({ stage, count }) => [stage, count])) + JSON.stringify(argumentsOf(job)))
    .digest('hex')
    .slice(0, 32);

function reportOf(jobs: readonly Job[], records: ReadonlyMap<string, JobRecord>, before: ReadonlySet<string>, workFolder: string, started: number): BatchReport {
  const reports = jobReports(jobs, records, before);
  const has = (...states: JobState[]) => reports.some(({ state }) => states.includes(state));
  return {
    jobs: reports,
    seconds: (performance.now() - started) / 1000,
    workFolder,
    // One worker for each task is no retry.
    retries: jobs.reduce((sum, job, i) => sum + Math.max(0, reports[i]!.attempts - tasksOf(job).reduce((n, { count }) => n + (count ?? 1), 0)), 0), // prettier-ignore
    interrupted: has('interrupted') && !has('failed', 'gate'),
  };
} // prettier-ignore
