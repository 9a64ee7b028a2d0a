import { cpus } from 'node:os';
import { exists, freeBytes } from '../base/files.js';
import type { Log } from '../base/log.js';
import { argumentsOf, isDone, wasFinished, type JobRecord } from './state.js';
import type { Job, JobCommands } from './types.js';
import { Worker } from './worker.js';

/** What is known of a job before it runs. Bytes and seconds are null where its inputs are still to be made. */
export interface PlannedJob {
  readonly name: string;
  readonly command: string;
  readonly needs: readonly string[];
  readonly out: string | null;
  readonly done: boolean;
  /** `cpu`, `cuda:1`, `a GPU`; null for commands that do not compute. */
  readonly device: string | null;
  readonly reads: number | null;
  readonly writes: number | null;
  readonly memory: number | null;
  readonly seconds: number | null;
  /** Why it would fail. */
  readonly problem: string | null;
  /** Why nothing is known of its size. */
  readonly note: string | null;
}

export interface BatchPlan {
  readonly jobs: readonly PlannedJob[];
  readonly parallel: number;
  readonly gpus: number;
  /** Bytes that outputs of known size take, and what the disk has. */
  readonly writes: number;
  readonly diskFree: number;
}

export interface PlanOptions {
  readonly jobs: readonly Job[];
  readonly commands: JobCommands;
  readonly records: ReadonlyMap<string, JobRecord>;
  readonly program: string;
  readonly environment: NodeJS.ProcessEnv;
  readonly parallel: number;
  readonly gpus: number;
  /** An existing folder on the disk of the outputs. */
  readonly folder: string;
}

/** Asks each job's own command for its plan (`--dry-run`, which reads headers only). Nothing is written. */
export async function planBatch(options: PlanOptions, log: Log, signal: AbortSignal): Promise<BatchPlan> {
  const { jobs, parallel, gpus, folder } = options;
  const planned: PlannedJob[] = [];
  const done = new Set<string>();
  for (const job of jobs) {
    const record = options.records.get(job.name);
    const settled = job.needs.every((need) => done.has(need));
    if (settled && ((await isDone(job, record)) || (await wasFinished(job, record)))) done.add(job.name);
  }
  const queue = jobs.map((job, i) => async () => {
    if (signal.aborted) return;
    planned[i] = await planJob(job, done, options);
    log.progress({ stage: 'plan', done: planned.filter(Boolean).length, total: jobs.length });
  });
  const next = async (): Promise<void> => {
    for (let task = queue.shift(); task; task = queue.shift()) await task();
  };
  await Promise.all(Array.from({ length: Math.min(4, cpus().length) }, next));
  const complete = planned.filter(Boolean);
  const writes = complete.reduce((sum, job) => sum + (job.done ? 0 : (job.writes ?? 0)), 0);
  return { jobs: complete, parallel, gpus, writes, diskFree: await freeBytes(folder) };
}

async function planJob(job: Job, done: ReadonlySet<string>, options: PlanOptions): Promise<PlannedJob> {
  const { name, command, needs } = job;
  const unknown = { reads: null, writes: null, memory: null, seconds: null, problem: null, note: null };
  const facts = { name, command, needs, out: job.out ?? null, done: done.has(name), device: deviceOf(job, options.gpus), ...unknown }; // prettier-ignore
  if (facts.done) return { ...facts, note: 'done already' };
  if (job.out !== undefined && job.values.overwrite !== true && (await exists(job.out))) {
    return { ...facts, problem: `the output exists already: ${job.out}` };
  }
  const waiting = needs.filter((need) => !done.has(need));
  if (waiting.length > 0) return { ...facts, note: `after ${waiting.join(', ')}` };
  for (const path of job.reads) {
    if (!(await exists(path))) return { ...facts, problem: `no such file or folder: ${path}` };
  }
  if (options.commands[command]!.dryRun !== true) return { ...facts, note: 'no estimate for this command' };
  const worker = new Worker({
    program: options.program,
    argv: [...argumentsOf(job), '--dry-run'],
    environment: options.environment,
    logPath: '/dev/null',
    onStep: () => undefined,
    onUsage: () => undefined,
    onWarning: () => undefined,
  });
  const { exitCode, result, message } = await worker.ended;
  const sizes = sizesOf(result ?? {});
  return { ...facts, ...sizes, problem: exitCode === 0 ? null : (message ?? `exit code ${exitCode}`) };
}

function deviceOf({ values }: Job, gpus: number): string | null {
  if (typeof values.device !== 'string') return null;
  if (values.device !== 'auto') return values.device;
  return gpus === 0 ? 'cpu' : gpus === 1 ? 'cuda:0' : 'a GPU';
}

/** The names that the plans of convert, quantize and moe have for these. */
function sizesOf(result: Readonly<Record<string, unknown>>) {
  const { reads, writes, memory, seconds, bytes } = result as {
    readonly bytes?: Readonly<Record<'input' | 'output' | 'disk' | 'memory', unknown>>;
  } & Readonly<Record<string, unknown>>;
  const number = (value: unknown): number | null => (typeof value === 'number' ? value : null);
  return {
    reads: number(reads ?? bytes?.input),
    writes: number(writes ?? bytes?.disk ?? bytes?.output),
    memory: number(memory ?? bytes?.memory),
    seconds: number(seconds),
  };
}
