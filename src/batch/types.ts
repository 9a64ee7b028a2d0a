import type { Given, OptionTable } from '../base/options.js';
import type { KubernetesOptions } from './kubernetes-options.js';
import type { SlurmOptions } from './slurm-options.js';

/** A command that jobs may run, as its option table says. The floor of commands hands these down. */
export interface JobCommand {
  readonly arguments: OptionTable;
  readonly options: OptionTable;
  /** Keys of the options whose values are paths that the command writes. */
  readonly writes: readonly string[];
  /** Whether it has `--dry-run`, which the batch gives itself. */
  readonly dryRun: boolean;
  /** Whether `plan`, `worker` and `merge` can do it in shards. */
  readonly inShards: boolean;
}
export type JobCommands = Readonly<Record<string, JobCommand>>;

/** One job of the file: defaults, matrix and placeholders are worked in, and every value is checked. */
export interface Job {
  readonly name: string;
  readonly command: string;
  /** Jobs that must be done before: those of `needs`, and those whose outputs this one names. */
  readonly needs: readonly string[];
  readonly retries: number | undefined;
  /** Into how many shards it is divided; undefined: one process does it. */
  readonly shards: number | undefined;
  /** What the file gives, and the environment where the file says nothing, by option key. */
  readonly given: ReadonlyMap<string, Given>;
  /** All options after defaults. */
  readonly values: Readonly<Record<string, unknown>>;
  /** Absolute paths that the job will write, the output first. */
  readonly writes: readonly string[];
  /** Absolute path of the model that the job makes; undefined for jobs that only look. */
  readonly out: string | undefined;
  /** Paths of the models that it reads. */
  readonly reads: readonly string[];
  /** What it asks of Slurm, where that runs it. */
  readonly slurm: SlurmOptions;
  /** What its pods get, where Kubernetes runs it. */
  readonly kubernetes: KubernetesOptions;
}

/**
 * `waiting` has not begun; `skipped` needs a job that failed; `failed` and `gate` have ended; `interrupted` goes on
 * with the next run.
 */
export type JobState = 'waiting' | 'running' | 'done' | 'failed' | 'gate' | 'skipped' | 'interrupted';
export const jobStates: readonly JobState[] = ['waiting', 'running', 'done', 'failed', 'gate', 'skipped', 'interrupted']; // prettier-ignore
