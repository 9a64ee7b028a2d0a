import { join } from 'node:path';
import { badUsage } from '../base/errors.js';
import { shellQuote } from '../base/text.js';
import { requestOf, type ShardStage } from './slurm-options.js';
import { argumentsOf } from './state.js';
import type { Job } from './types.js';

/** What one Slurm job is to do: a job of the file, or a stage of one in shards. */
export interface SlurmTask {
  readonly job: Job;
  readonly stage: ShardStage | undefined;
  /** Tasks of the array; undefined where it is none. */
  readonly count: number | undefined;
}

/** A job as the Slurm jobs that it needs, each waiting for the one before. */
export function tasksOf(job: Job): SlurmTask[] {
  if (job.shards === undefined) return [{ job, stage: undefined, count: undefined }];
  return [
    { job, stage: 'plan', count: undefined },
    { job, stage: 'worker', count: job.shards },
    { job, stage: 'merge', count: undefined },
  ];
}

/** Name of a task's files. No job's name has a plus: `int4+worker-0` is no job. */
export const stemOf = (job: string, stage?: ShardStage | null, index?: number): string =>
  `${job}${stage ? `+${stage}` : ''}${index === undefined ? '' : `-${index}`}`;

/** Where the files of a stem lie in the work folder. */
export const slurmPath = (workFolder: string, stem: string, kind: 'json' | 'sh' | 'record.json' | 'lock'): string =>
  join(workFolder, 'slurm', `${stem}.${kind}`);

/** What a task's process on the node is told (`slurm/<stem>.json`). */
export interface TaskSpec {
  readonly version: 1;
  readonly stage: ShardStage | null;
  /** Our own program. */
  readonly program: string;
  /** Absolute. */
  readonly workFolder: string;
  readonly retries: number;
  readonly job: Omit<Job, 'given'> & { readonly given: readonly (readonly [string, unknown])[] };
  readonly argv: readonly string[];
}

export interface ScriptContext {
  readonly program: string;
  /** What runs a task on a node: src/batch/slurm-main.ts, built. */
  readonly taskProgram: string;
  readonly workFolder: string;
  /** Relative paths of jobs begin here. */
  readonly folder: string;
  readonly retries: number;
}

export function specOf({ job, stage }: SlurmTask, context: ScriptContext): TaskSpec {
  const argv = argumentsOf(job);
  return {
    version: 1,
    stage: stage ?? null,
    program: context.program,
    workFolder: context.workFolder,
    retries: job.retries ?? context.retries,
    job: { ...job, given: [...job.given] },
    argv: stage === 'plan' ? ['plan', ...argv.slice(1), `--shards=${job.shards}`] : argv,
  };
}

const defaultGrace = 120;

/**
 * Options of sbatch, as arguments. They stand in the script as well, for people; as arguments they also win over
 * SBATCH_ variables of the environment.
 */
export function sbatchOptions({ job, stage, count }: SlurmTask, context: ScriptContext): string[] {
  const request = requestOf(job.slurm, stage);
  const log = join(context.workFolder, 'logs', stemOf(job.name, stage)).replaceAll('%', '%%');
  return [
    `--job-name=${stemOf(job.name, stage)}`,
    `--chdir=${speakable(context.folder)}`,
    `--output=${speakable(log)}${count === undefined ? '' : '-%a'}.log`,
    '--open-mode=append',
    '--requeue',
    '--kill-on-invalid-dep=yes',
    `--signal=B:USR2@${request.grace ?? defaultGrace}`,
    '--nodes=1',
    '--ntasks=1',
    ...(count === undefined ? [] : [`--array=0-${count - 1}`]),
    ...Object.entries(request.options).map(([name, value]) => (value === true ? `--${name}` : `--${name}=${value}`)),
  ];
}

/** Paths come from where the user stands, and Slurm reads some characters in them its own way. */
function speakable(path: string): string {
  if (!/["\\\u0000-\u001f\u007f]/.test(path)) return path;
  throw badUsage('Slurm cannot be given this path', { where: JSON.stringify(path), expected: 'no quotes, backslashes or control characters in it' }); // prettier-ignore
}

/** The script that sbatch gets. Nothing in it is looked at by the shell but two quoted paths and the program. */
export function sbatchScript(task: SlurmTask, context: ScriptContext): string {
  const directives = sbatchOptions(task, context).map((option) => {
    const [, name, value] = /^(--[a-z-]+)=([^]*)$/.exec(option) ?? [];
    const plain = value === undefined || /^[\w@%+=:,./|()&[\]*-]+$/.test(value);
    return `#SBATCH ${plain ? option : `${name}="${value}"`}`;
  });
  const spec = slurmPath(context.workFolder, stemOf(task.job.name, task.stage), 'json');
  const command = [process.execPath, context.taskProgram, spec].map(shellQuote).join(' ');
  return ['#!/bin/sh', ...directives, '', `exec ${command}`, ''].join('\n');
}
