import { execFile } from 'node:child_process';
import { userInfo } from 'node:os';
import { badInput, noResource } from '../base/errors.js';
import { errorCode } from '../base/files.js';

/** What Slurm says of one of its jobs, or of one task of an array. */
export interface QueueEntry {
  /** PENDING, RUNNING, COMPLETED, NODE_FAIL ... */
  readonly state: string;
  /** Why it waits or ended. */
  readonly reason: string;
}

/** By `12`, or `12_3` for a task of an array. */
export type Queue = ReadonlyMap<string, QueueEntry>;

const endStates = ['BOOT_FAIL', 'CANCELLED', 'COMPLETED', 'DEADLINE', 'FAILED', 'NODE_FAIL', 'OUT_OF_MEMORY', 'PREEMPTED', 'TIMEOUT']; // prettier-ignore

/** Whether Slurm will still do something with it. */
export const isLive = (entry: QueueEntry | undefined): entry is QueueEntry =>
  entry !== undefined && !endStates.includes(entry.state);

export const queueKey = (id: string, index?: number): string => (index === undefined ? id : `${id}_${index}`);

/** Slurm's own programs, as any user has them on PATH. */
export class Slurm {
  constructor(private readonly environment: NodeJS.ProcessEnv) {}

  /** Gives the id. Errors: input, with what sbatch says, where Slurm refuses the job. */
  async submit(options: readonly string[], script: string, name: string): Promise<string> {
    const { code, stdout, stderr } = await this.#call('sbatch', ['--parsable', ...options, script]);
    // `12`, or `12;cluster` on a federation.
    const id = /^(\d+)(;\S*)?\s*$/m.exec(stdout)?.[1];
    if (code === 0 && id !== undefined) return id;
    throw badInput('Slurm does not take the job', { where: name, got: lastLine(stderr) || `exit code ${code} of sbatch` }); // prettier-ignore
  }

  /** Everything of this user that Slurm still knows, ended jobs for some minutes. Errors: resource, when it does not answer. */
  async queue(): Promise<Queue> {
    const { code, stdout, stderr } = await this.#call('squeue', [
      '--noheader',
      '--array',
      '--states=all',
      `--user=${userInfo().uid}`,
      '--format=%F|%K|%T|%r',
    ]);
    if (code !== 0) throw noResource('Slurm does not say what is in its queue', { got: lastLine(stderr) || `exit code ${code} of squeue`, hint: 'The jobs are not touched; ask again later.' }); // prettier-ignore
    return parseQueue(stdout);
  }

  /** What the accounts say of jobs that the queue has forgotten; nothing on clusters that keep none. */
  async accounts(ids: readonly string[]): Promise<Queue> {
    if (ids.length === 0) return new Map();
    const args = ['--noheader', '--parsable2', '--allocations', `--jobs=${ids.join(',')}`, '--format=JobID,State'];
    const { code, stdout } = await this.#call('sacct', args).catch(() => ({ code: 1, stdout: '' }));
    return code === 0 ? parseAccounts(stdout) : new Map<string, QueueEntry>();
  }

  /** Asks Slurm to end jobs; those that have ended already are no error. */
  async cancel(ids: readonly string[]): Promise<void> {
    if (ids.length === 0) return;
    const { code, stderr } = await this.#call('scancel', ['--quiet', ...ids]);
    if (code !== 0) throw noResource('Slurm does not cancel the jobs', { where: ids.join(', '), got: lastLine(stderr) || `exit code ${code} of scancel` }); // prettier-ignore
  }

  /** Puts a running job back into the queue. False where Slurm does not do that for us. */
  async requeue(id: string): Promise<boolean> {
    const { code } = await this.#call('scontrol', ['requeue', id]).catch(() => ({ code: 1 }));
    return code === 0;
  }

  #call(program: string, args: readonly string[]): Promise<{ code: number; stdout: string; stderr: string }> {
    return new Promise((resolve, reject) => {
      const options = { env: withoutOthers(this.environment), maxBuffer: 256e6, timeout: 120_000 };
      execFile(program, args, options, (error, stdout, stderr) => {
        if (error && errorCode(error) === 'ENOENT') {
          reject(noResource('Slurm is not on this machine', { where: program, expected: 'Slurm’s programs on PATH', hint: 'Run this on a login node of the cluster.' })); // prettier-ignore
        } else {
          const code = error === null ? 0 : typeof error.code === 'number' ? error.code : 1;
          resolve({ code, stdout, stderr: error?.killed === true ? `${program} did not answer in 120 s` : stderr });
        }
      });
    });
  }
}

/**
 * Without the variables with which people shape what Slurm's programs show (they would hide jobs from us) or turn jobs
 * into arrays, and without those of an allocation in which the batch itself may run: they would pass for the job's own.
 */
const withoutOthers = (environment: NodeJS.ProcessEnv): NodeJS.ProcessEnv =>
  Object.fromEntries(
    Object.entries(environment).filter(([name]) => !/^(SQUEUE|SCANCEL|SACCT|SCONTROL)_|^SBATCH_(ARRAY_INX|WAIT|NO_REQUEUE|DEPENDENCY)$|^SLURM_(ARRAY|JOB|STEP|TASK|CPUS|MEM|TRES|GPUS)_|^SLURM_(JOBID|NTASKS|NPROCS|RESTART_COUNT)/.test(name)),
  ); // prettier-ignore

/** Lines `array|index|state|reason` of squeue. */
export function parseQueue(text: string): Queue {
  const lines = text.split('\n').map((line) => line.trim().split('|'));
  return new Map(
    lines.flatMap(([id, index, state, reason = '']): [string, QueueEntry][] =>
      id === undefined || !/^\d+$/.test(id) || state === undefined
        ? []
        : [[/^\d+$/.test(index!) ? queueKey(id, Number(index)) : id, { state, reason }]],
    ),
  );
}

/** Lines `12_3|CANCELLED by 0` of sacct. */
export function parseAccounts(text: string): Queue {
  const lines = text.split('\n').map((line) => line.trim().split('|'));
  return new Map(
    lines.flatMap(([id, state]): [string, QueueEntry][] =>
      id !== undefined && /^\d+(_\d+)?$/.test(id) && state !== undefined ? [[id, { state: state.split(' ')[0]!, reason: '' }]] : [],
    ),
  ); // prettier-ignore
}

const lastLine = (text: string): string =>
  text
    .trim()
    .split('\n')
    .at(-1)!
    .replace(/^\w+: (error: )?/, '');
