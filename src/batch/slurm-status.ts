import { join } from 'node:path';
import { readJsonFile, writeFileAtomic } from '../base/files.js';
import type { Json } from '../base/job.js';
import type { ShardStage } from './slurm-options.js';
import { isLive, queueKey, type Queue, type QueueEntry } from './slurm-queue.js';
import { stemOf } from './slurm-script.js';
import { readTaskRecord, type TaskRecord } from './slurm-task.js';
import { newRecord, type JobRecord } from './state.js';
import type { Job, JobState } from './types.js';

/** What was given to Slurm for one job of the file, kept in `slurm/submitted.json`. */
export interface Submission {
  readonly tasks: readonly { readonly stage: ShardStage | null; readonly id: string; readonly count: number | null }[];
  /** Of command and options: while it is in the queue, the job may not change. */
  readonly request: string;
  /** Workers that earlier runs had started for the job. */
  readonly attempts: number;
}

export type Submissions = Readonly<Record<string, Submission>>;

const pathOf = (workFolder: string): string => join(workFolder, 'slurm', 'submitted.json');

export async function readSubmissions(workFolder: string): Promise<Submissions> {
  const stored = (await readJsonFile(pathOf(workFolder))) as { readonly jobs: Submissions } | undefined;
  return stored?.jobs ?? {};
}

export const writeSubmissions = (workFolder: string, jobs: Submissions): Promise<void> =>
  writeFileAtomic(pathOf(workFolder), `${JSON.stringify({ version: 1, jobs: jobs as unknown as Json }, null, 1)}\n`);

/** One process of a submission, as its record and the queue show it. */
export interface TaskView {
  readonly stage: ShardStage | null;
  readonly index: number | undefined;
  readonly state: JobState;
  readonly message: string | null;
  /** Slurm will still do something with it. */
  readonly live: boolean;
  /** Neither Slurm nor its record tells how it ended; on a slow file system the record may still come. */
  readonly lost: boolean;
  readonly record: TaskRecord | undefined;
}

/** Reads what the tasks of a submission say of themselves. The queue is to be asked before: records are newer. */
export async function viewsOf(
  workFolder: string,
  name: string,
  { tasks }: Submission,
  queue: Queue,
): Promise<TaskView[]> {
  const indices = tasks.flatMap(({ stage, id, count }) =>
    Array.from({ length: count ?? 1 }, (_, i) => ({ stage, id, index: count === null ? undefined : i })),
  );
  return Promise.all(
    indices.map(async ({ stage, id, index }) => {
      const found = await readTaskRecord(workFolder, stemOf(name, stage, index));
      const record = found?.id === id ? found : undefined;
      return { stage, index, record, ...stateOf(id, record, queue.get(queueKey(id, index))) };
    }),
  );
}

/** What the end of a task means. */
export const endState = (exitCode: number | null): JobState =>
  exitCode === 0 ? 'done' : exitCode === 3 ? 'gate' : exitCode === 75 ? 'interrupted' : 'failed';

function stateOf(id: string, record: TaskRecord | undefined, entry: QueueEntry | undefined): Omit<TaskView, 'stage' | 'index' | 'record'> {
  const ended = record?.state === 'ended' ? endState(record.exitCode) : undefined;
  const live = isLive(entry);
  const view = (state: JobState, message: string | null, more: { live?: boolean; lost?: boolean } = {}) => ({ state, message, live, lost: false, ...more }); // prettier-ignore
  if (ended === 'done') return view('done', null, { live: false });
  if (live && entry.state === 'PENDING') return view('waiting', `in Slurm’s queue as ${id} (${entry.reason})`);
  if (live && ended === undefined) return view('running', null);
  if (ended !== undefined) return view(ended, record!.message);
  if (entry?.state === 'CANCELLED') return view('interrupted', `cancelled in Slurm (${id})`);
  if (entry !== undefined && entry.state !== 'COMPLETED') return view('failed', `Slurm ended ${id}: ${entry.state}`);
  if (record !== undefined || entry !== undefined) return view('failed', `Slurm’s ${id} has ended and left no result`, { lost: true }); // prettier-ignore
  return view('interrupted', `Slurm knows nothing of ${id}, which never began`, { lost: true });
} // prettier-ignore

/**
 * The record of a job from those of its tasks. `stateOfNeed` tells of the jobs that it needs: what Slurm cancels since
 * a need has failed is skipped.
 */
export function jobRecordOf(
  job: Job,
  { attempts }: Submission,
  views: readonly TaskView[],
  stateOfNeed: (name: string) => JobState,
): JobRecord {
  const begun = views.flatMap(({ record }) => record ?? []);
  const done = views.filter(({ state }) => state === 'done');
  const live = views.some((view) => view.live);
  // The first that went wrong is the cause of what comes after.
  const bad = views.find(({ state }) => state === 'failed' || state === 'gate') ?? views.find(({ state }) => state === 'interrupted'); // prettier-ignore
  const last = bad?.record ?? begun.at(-1);
  const first = begun[0];
  const facts: JobRecord = {
    ...newRecord(first?.fingerprint ?? ''),
    attempts: attempts + begun.reduce((sum, record) => sum + record.attempts, 0),
    seconds: first === undefined ? 0 : (Date.parse(last?.ended ?? new Date().toISOString()) - Date.parse(first.started)) / 1000, // prettier-ignore
    exitCode: last?.exitCode ?? null,
    signal: last?.signal ?? null,
    memory: Math.max(0, ...begun.map(({ memory }) => memory ?? 0)) || null,
    started: first?.started ?? null,
    ended: last?.ended ?? null,
  };
  if (done.length === views.length) return { ...facts, state: 'done', exitCode: 0, signal: null };
  const where = (view: TaskView) => (view.stage === null ? '' : `${stemOf('', view.stage, view.index).slice(1)}: `);
  if (live) {
    const next =
      bad ?? views.find(({ state }) => state === 'running') ?? views.find(({ state }) => state === 'waiting');
    const sum = views.length > 1 ? `${done.length} of ${views.length} stages done` : null;
    const message = [sum, next?.message && `${where(next)}${next.message}`].filter(Boolean).join('; ');
    const state = views.some((view) => view.state !== 'waiting') ? 'running' : 'waiting';
    return { ...facts, state, exitCode: null, signal: null, ended: null, message: message === '' ? null : message };
  }
  const broken = job.needs.find((need) => stateOfNeed(need) !== 'done');
  if (begun.length === 0 && broken !== undefined) return { ...facts, state: 'skipped', message: `needs ${broken}, which is not done` }; // prettier-ignore
  return { ...facts, state: bad?.state ?? 'interrupted', message: bad ? `${where(bad)}${bad.message ?? ''}` : null };
}
