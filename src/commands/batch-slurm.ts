import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { badUsage, type ConvertError } from '../base/errors.js';
import { makeFolder } from '../base/files.js';
import { choice, flag, type Values } from '../base/options.js';
import { shellQuote } from '../base/text.js';
import type { BatchReport } from '../batch/run.js';
import type { SlurmBatchOptions } from '../batch/slurm.js';
import type { Io } from './types.js';

const section = 'Cluster:';

/** Options of `batch` that say where jobs run, and ask after those that run elsewhere. */
export const clusterOptions = {
  executor: choice(['local', 'slurm'], { default: 'local', section, help: 'Run jobs on this machine, or give them to Slurm’s queue.' }), // prettier-ignore
  wait: flag({ section, help: 'With slurm: stay until all jobs have ended, and say how.' }),
  status: flag({ section, help: 'Say how the jobs stand, and change nothing.' }),
  cancel: flag({ section, help: 'End what Slurm has of this batch; finished blocks stay.' }),
} as const;

type Given = Values<typeof clusterOptions> & {
  readonly parallel: number | undefined;
  readonly dryRun: boolean;
  readonly metricsFile: string | undefined;
  readonly metricsPort: number | undefined;
};

/** Errors: usage, for options that would do nothing together. */
export function checkCluster(given: Given): void {
  const { executor, wait, status, cancel, dryRun } = given;
  const together = Object.entries({ wait, status, cancel, dryRun }).filter(([, on]) => on);
  if (together.length > 1) throw badUsage(`${together.map(([key]) => flagOf(key)).join(' and ')} do not go together`);
  if (executor === 'local') {
    if (wait) throw badUsage('--wait is for --executor slurm: here the batch always waits');
    return;
  }
  if (given.parallel !== undefined) throw badUsage('--parallel is for jobs on this machine', { hint: 'In Slurm, partitions and qos say how many run at a time.' }); // prettier-ignore
  if (!wait && (given.metricsFile !== undefined || given.metricsPort !== undefined)) {
    throw badUsage('Metrics of a batch in Slurm need --wait: without it nobody is there to keep them');
  }
}

const flagOf = (key: string): string => `--${key.replace(/[A-Z]/g, (letter) => `-${letter.toLowerCase()}`)}`;

type Known = Omit<SlurmBatchOptions, 'taskProgram' | 'wait'>;

/** `--status`, `--cancel`, or a submission: what the report is to be about. */
export async function runCluster(given: Given, known: Known, io: Io): Promise<BatchReport> {
  const { batchStatus, cancelOnSlurm, runOnSlurm } = await import('../batch/slurm.js');
  if (given.cancel) {
    const ended = await cancelOnSlurm(known);
    io.log.info(ended.length === 0 ? 'Slurm has no job of this batch.' : `Cancelled: ${ended.join(', ')}`);
    return await batchStatus(known);
  }
  if (given.status) return await batchStatus(known);
  await makeFolder(join(known.workFolder, 'slurm'));
  const taskProgram = fileURLToPath(new URL('../../dist/batch/slurm-main.js', import.meta.url));
  return await runOnSlurm({ ...known, taskProgram, wait: given.wait }, io.log, io.signal);
}

/** Jobs that are still on their way are no failure, unless the batch was to stay until they end. */
export async function clusterFailure(report: BatchReport, given: Given): Promise<ConvertError | undefined> {
  const { failureOf } = await import('../batch/run.js');
  if (given.cancel) return undefined;
  const failed = report.jobs.some(({ state }) => state === 'failed' || state === 'gate');
  return failed || report.interrupted ? failureOf(report) : undefined;
}

/** What would be submitted, for `--dry-run`. */
export async function submissionsOf(jobs: SlurmBatchOptions['jobs'], workFolder: string) {
  const { sbatchOptions, stemOf, tasksOf } = await import('../batch/slurm-script.js');
  const context = { program: '', taskProgram: '', retries: 0, workFolder, folder: process.cwd() };
  return jobs.flatMap(tasksOf).map((task) => {
    const options = sbatchOptions(task, context);
    return { name: stemOf(task.job.name, task.stage), options, line: ['sbatch', ...options].map(shellQuote).join(' ') };
  });
}
