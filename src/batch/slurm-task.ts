import { hostname } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { badInput, ConvertError, exitCodes } from '../base/errors.js';
import { exists, readJsonFile, writeFileAtomic } from '../base/files.js';
import { FileLock, isLocked, LockHeld } from '../base/lock.js';
import { machine } from './shards.js';
import { Slurm } from './slurm-queue.js';
import { slurmPath, stemOf, type TaskSpec } from './slurm-script.js';
import { fingerprintOf, flagsOf, isDone, newRecord } from './state.js';
import type { Job } from './types.js';
import { patience, shellCode, Worker, worthRetrying, type Outcome } from './worker.js';

/** What a task says of itself (`slurm/<stem>.record.json`): the state of the batch is put together from these. */
export interface TaskRecord {
  readonly version: 1;
  /** `12`; the id of the array for its tasks. */
  readonly id: string;
  /** How often Slurm has started it again. */
  readonly restarts: number;
  readonly state: 'running' | 'ended';
  /** It put itself back into the queue. */
  readonly requeued: boolean;
  readonly host: string;
  readonly fingerprint: string;
  /** The output was not there when the first attempt for this id began: where it is now, one of them has made it. */
  readonly isNew: boolean;
  /** Workers started for this id. */
  readonly attempts: number;
  readonly exitCode: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly message: string | null;
  readonly memory: number | null;
  readonly started: string;
  readonly ended: string | null;
}

/** How often an attempt looks whether another holds, or has taken, its lock. */
const lookEveryMs = 5000;

/** Signals that Slurm sends: TERM to all processes of a job that must go, USR2 to us alone when its time is nearly up. */
export interface TaskSignals {
  readonly gone: AbortSignal;
  readonly timeUp: AbortSignal;
}

/**
 * One attempt at one task, on the node. Slurm may start a task again while the first attempt still lives (a node that
 * was cut off): an attempt waits until no other holds the task's lock, and stops when another has taken it.
 * Gives the exit code: 75 when the task goes on later.
 */
export async function runTask(
  specPath: string,
  environment: NodeJS.ProcessEnv,
  signals: TaskSignals,
  everyMs = lookEveryMs,
): Promise<number> {
  const spec = await readSpec(specPath);
  const task = new Task(spec, environment, signals, everyMs);
  const lock = await task.fence();
  if (lock === undefined) return exitCodes.interrupted;
  try {
    return await task.run(lock);
  } finally {
    await lock.release();
  }
}

async function readSpec(path: string): Promise<TaskSpec> {
  const spec = (await readJsonFile(path)) as TaskSpec | undefined;
  if (spec?.version === 1) return spec;
  throw badInput('This is no task of a batch of this version', { where: path, got: spec === undefined ? 'no such file' : `version ${String(spec.version)}`, hint: 'Submit it again with batch --executor slurm.' }); // prettier-ignore
}

class Task {
  readonly #job: Job;
  readonly #stem: string;
  readonly #index: number | undefined;
  readonly #id: string;
  readonly #recordPath: string;

  constructor(
    private readonly spec: TaskSpec,
    private readonly environment: NodeJS.ProcessEnv,
    private readonly signals: TaskSignals,
    private readonly everyMs: number,
  ) {
    const { SLURM_ARRAY_TASK_ID: index, SLURM_ARRAY_JOB_ID: array, SLURM_JOB_ID: id = '' } = environment;
    this.#job = { ...spec.job, given: new Map(spec.job.given) } as Job;
    this.#index = spec.stage === 'worker' && index !== undefined ? Number(index) : undefined;
    this.#id = this.#index === undefined ? id : (array ?? id);
    this.#stem = stemOf(spec.job.name, spec.stage, this.#index);
    this.#recordPath = slurmPath(spec.workFolder, this.#stem, 'record.json');
  }

  #say(text: string): void {
    process.stderr.write(`${new Date().toISOString()} ${this.#stem}: ${text}\n`);
  }

  /** Waits for the lock of the task, and for workers that an earlier attempt left; undefined when told to go. */
  async fence(): Promise<FileLock | undefined> {
    const path = slurmPath(this.spec.workFolder, this.#stem, 'lock');
    for (let said = false; !this.signals.gone.aborted && !this.signals.timeUp.aborted; said = true) {
      let holder = 'its worker';
      try {
        const lock = await FileLock.take(path, 'The task');
        if (!(await this.#workerLeft())) return lock;
        await lock.release();
      } catch (error) {
        if (!(error instanceof LockHeld)) throw error;
        holder = error.facts.got ?? '';
      }
      if (!said) this.#say(`An earlier attempt still lives (${holder}): waiting for its end.`);
      await delay(this.everyMs, undefined, { signal: this.signals.gone }).catch(() => undefined);
    }
    return undefined;
  }

  /** A worker whose own attempt was killed may live on: it holds the lock of what it writes. */
  async #workerLeft(): Promise<boolean> {
    const { out } = this.#job;
    if (out === undefined) return false;
    const folder = this.#index === undefined ? `${out}.part` : join(`${out}.part`, 'shards', `${this.#index}.part`);
    return isLocked(join(folder, 'lock'));
  }

  async run(lock: FileLock): Promise<number> {
    const fingerprint = await fingerprintOf(this.#job);
    const before = await readTaskRecord(this.spec.workFolder, this.#stem);
    const earlier = before?.id === this.#id ? before : undefined;
    const record: TaskRecord = {
      version: 1,
      id: this.#id,
      restarts: Number(this.environment.SLURM_RESTART_COUNT ?? 0),
      state: 'running',
      requeued: false,
      host: this.environment.SLURMD_NODENAME ?? hostname(),
      fingerprint,
      isNew: earlier?.isNew ?? !(await this.#hasOutput()),
      attempts: (earlier?.attempts ?? 0) + 1,
      exitCode: null,
      signal: null,
      message: null,
      memory: null,
      started: new Date().toISOString(),
      ended: null,
    };
    if (before !== undefined && (await this.#isDone(before))) {
      this.#say('An earlier attempt has finished this.');
      await this.#write({ ...before, id: this.#id, state: 'ended', exitCode: 0, signal: null, message: null, requeued: false, ended: before.ended ?? record.started }); // prettier-ignore
      return 0;
    }
    await this.#write(record);
    try {
      return await this.#work(record, lock);
    } catch (error) {
      if (!(error instanceof ConvertError)) throw error;
      await this.#write({ ...record, state: 'ended', exitCode: error.exitCode, message: error.message, ended: new Date().toISOString() }); // prettier-ignore
      return error.exitCode;
    }
  }

  /** Whether an earlier attempt came to its end, also where nobody saw it. Stages before the last know that themselves. */
  async #isDone(before: TaskRecord): Promise<boolean> {
    if (this.spec.stage === 'plan' || this.spec.stage === 'worker') return false;
    const { state, exitCode, fingerprint, id, isNew } = before;
    if (state === 'ended') return exitCode === 0 && (await isDone(this.#job, newRecord(fingerprint, 'done')));
    if (id !== this.#id || !isNew || !(await this.#hasOutput())) return false;
    return !(await exists(`${this.#job.out}.part`)); // what is left there the command clears away
  }

  #hasOutput = async (): Promise<boolean> => this.#job.out !== undefined && (await exists(this.#job.out));

  async #work(start: TaskRecord, lock: FileLock): Promise<number> {
    const argv = [...(await this.#argv()), ...this.#share()];
    for (let record = start, attempt = 1; ; attempt++) {
      const { outcome, steps, lost } = await this.#attempt(argv, lock);
      if (lost) {
        this.#say('Another attempt has taken this task over; nothing more is written here.');
        return exitCodes.interrupted;
      }
      const { exitCode, signal, message, usage } = outcome;
      record = { ...record, exitCode, signal, message, memory: usage.memory };
      if (outcome.result !== undefined) await this.#store(outcome.result);
      const stopped = this.#isStopped();
      if (stopped && exitCode !== 0 && worthRetrying(outcome)) return await this.#goOnLater(record, steps);
      if (exitCode === 75) return await this.#goOnLater(record, steps); // somebody told the worker alone
      if (exitCode === 0 || stopped || attempt > this.spec.retries || !worthRetrying(outcome)) {
        await this.#end(record);
        return Math.min(255, shellCode(outcome));
      }
      this.#say(`${message?.split('\n')[0] ?? ''}; trying again (${attempt} of ${this.spec.retries})`);
      record = { ...record, attempts: record.attempts + 1 };
      await this.#write(record);
      if (exitCode === 4) await delay(1000 * patience(attempt), undefined, { signal: this.signals.gone }).catch(() => undefined); // prettier-ignore
    }
  }

  #isStopped = (): boolean => this.signals.gone.aborted || this.signals.timeUp.aborted;

  /**
   * The worker has stopped after a block. Who was told to go has been cancelled, or is put back by Slurm itself; where
   * only the time was up, the task puts itself back, if it has got anywhere.
   */
  async #goOnLater(record: TaskRecord, steps: number): Promise<number> {
    const interrupted = { ...record, exitCode: exitCodes.interrupted, signal: null };
    if (this.signals.gone.aborted) {
      await this.#end(interrupted);
      return exitCodes.interrupted;
    }
    if (this.signals.timeUp.aborted && steps === 0) {
      const message = 'The time limit is too short for one block: nothing was finished within it. Give more with time: in the slurm section.'; // prettier-ignore
      await this.#end({ ...record, exitCode: exitCodes.resource, signal: null, message });
      return exitCodes.resource;
    }
    await this.#end({ ...interrupted, requeued: true });
    const done = await new Slurm(this.environment).requeue(this.environment.SLURM_JOB_ID ?? this.#id);
    if (!done) await this.#end(interrupted);
    this.#say(done ? 'Stopped after a block; goes on when the queue lets it.' : 'Stopped after a block. Slurm does not take it back: submit the batch again.'); // prettier-ignore
    return exitCodes.interrupted;
  }

  /** What the worker is called with: for shards, what the plan says. */
  async #argv(): Promise<readonly string[]> {
    if (this.spec.stage !== 'worker' && this.spec.stage !== 'merge') return this.spec.argv;
    const path = this.#resultPath(stemOf(this.#job.name, 'plan'));
    const plan = (await readJsonFile(path)) as { workers?: { argv?: string[] }[]; merge?: { argv?: string[] } } | undefined; // prettier-ignore
    const argv = this.#index === undefined ? plan?.merge?.argv : plan?.workers?.[this.#index]?.argv;
    if (argv !== undefined) return [...argv, ...flagsOf(this.#job, machine)];
    throw badInput('The plan of this job says nothing of this shard', { where: path, hint: 'Submit the batch again.' });
  }

  /** CPUs of the allocation, where the job names no number itself. */
  #share(): string[] {
    const cpus = Number(this.environment.SLURM_CPUS_PER_TASK ?? this.environment.SLURM_CPUS_ON_NODE);
    const open = 'device' in this.#job.values && this.#job.values.threads === undefined;
    return open && Number.isInteger(cpus) && cpus > 0 ? [`--threads=${cpus}`] : [];
  }

  async #attempt(argv: readonly string[], lock: FileLock): Promise<{ outcome: Outcome; steps: number; lost: boolean }> {
    let [steps, lost] = [0, false];
    const worker = new Worker({
      program: this.spec.program,
      argv,
      environment: this.environment,
      logPath: join(this.spec.workFolder, 'logs', `${this.#stem}.log`),
      onStep: () => steps++,
      onUsage: () => undefined,
      onWarning: () => undefined,
    });
    const guard = setInterval(() => {
      void lock.isLost().then((is) => {
        if (!is) return;
        lost = true;
        worker.kill();
      });
    }, this.everyMs);
    // Slurm has told the worker too where it told us to go; a second signal would cost it its block.
    const stop = () => worker.stop();
    this.signals.timeUp.addEventListener('abort', stop);
    const kill = () => worker.kill();
    process.once('exit', kill);
    if (this.#isStopped()) worker.stop();
    try {
      const outcome = await worker.ended;
      lost ||= await lock.isLost();
      return { outcome, steps, lost };
    } finally {
      clearInterval(guard);
      process.removeListener('exit', kill);
      this.signals.timeUp.removeEventListener('abort', stop);
    }
  }

  #resultPath = (stem: string): string => join(this.spec.workFolder, 'results', `${stem}.json`);

  async #store(result: unknown): Promise<void> {
    // The last stage speaks for the job.
    const stem = this.spec.stage === 'merge' ? this.#job.name : this.#stem;
    await writeFileAtomic(this.#resultPath(stem), `${JSON.stringify(result)}\n`);
  }

  #end = (record: TaskRecord): Promise<void> => this.#write({ ...record, state: 'ended', ended: new Date().toISOString() }); // prettier-ignore

  #write = (record: TaskRecord): Promise<void> => writeFileAtomic(this.#recordPath, `${JSON.stringify(record, null, 1)}\n`); // prettier-ignore
}

/** The record of a task; undefined when it has never begun. */
export const readTaskRecord = async (workFolder: string, stem: string): Promise<TaskRecord | undefined> =>
  (await readJsonFile(slurmPath(workFolder, stem, 'record.json'))) as TaskRecord | undefined;
