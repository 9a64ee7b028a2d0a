import { createHash } from 'node:crypto';
import { appendFile, readdir, stat } from 'node:fs/promises';
import { join, parse } from 'node:path';
import { badInput } from '../base/errors.js';
import {
  appendNoLink,
  errorCode,
  exists,
  ioError,
  makeFolder,
  readJsonFile,
  refuseLinks,
  writeFileAtomic,
} from '../base/files.js';
import type { Json } from '../base/job.js';
import { FileLock } from '../base/lock.js';
import { flagName } from '../base/options.js';
import type { Job, JobState } from './types.js';

/** What is known of a job, kept over runs. */
export type JobRecord = {
  readonly state: JobState;
  /** Of command, options and inputs: a job that changed is run again. */
  readonly fingerprint: string;
  /** How often a worker was started, over all runs. */
  readonly attempts: number;
  /** Of the last attempt. */
  readonly seconds: number;
  readonly exitCode: number | null;
  readonly signal: NodeJS.Signals | null;
  /** Why it is not done. */
  readonly message: string | null;
  /** Largest resident memory of the worker in bytes. */
  readonly memory: number | null;
  readonly started: string | null;
  readonly ended: string | null;
};

export const newRecord = (fingerprint: string, state: JobState = 'waiting'): JobRecord => ({
  state,
  fingerprint,
  attempts: 0,
  seconds: 0,
  exitCode: null,
  signal: null,
  message: null,
  memory: null,
  started: null,
  ended: null,
});

const version = 1;

/** The folder of a batch: `state.json`, `events.ndjson`, `logs/`, `results/`. One process at a time holds it. */
export class BatchState {
  readonly folder: string;
  readonly #lock: FileLock;
  readonly #records: Map<string, JobRecord>;
  #saving: Promise<void> = Promise.resolve();
  #writing: Promise<void> = Promise.resolve();

  private constructor(folder: string, lock: FileLock, records: Map<string, JobRecord>) {
    this.folder = folder;
    this.#lock = lock;
    this.#records = records;
  }

  /** What earlier runs left; nothing is written and no lock is taken. */
  static async read(folder: string): Promise<Map<string, JobRecord>> {
    const path = join(folder, 'state.json');
    const stored = (await readJsonFile(path)) as { version: number; jobs: Record<string, JobRecord> } | undefined;
    if (stored !== undefined && stored.version !== version) {
      throw badInput('The work folder of the batch was made by another version of this tool', { where: path, got: `version ${stored.version}`, expected: `version ${version}`, hint: `Finish with that version, or remove ${folder}: finished outputs stay.` }); // prettier-ignore
    }
    return new Map(Object.entries(stored?.jobs ?? {}));
  }

  /** Errors: input, while another process holds the folder. */
  static async open(folder: string): Promise<BatchState> {
    try {
      for (const name of ['logs', 'results']) await makeFolder(join(folder, name));
      await refuseLinks(folder);
    } catch (error) {
      throw ioError(error, 'make the work folder', folder);
    }
    const lock = await FileLock.take(join(folder, 'lock'), 'This batch');
    try {
      return new BatchState(folder, lock, await BatchState.read(folder));
    } catch (error) {
      await lock.release();
      throw error;
    }
  }

  get(name: string): JobRecord | undefined {
    return this.#records.get(name);
  }

  /** Durable when the promise is fulfilled. */
  async set(name: string, record: JobRecord): Promise<void> {
    this.#records.set(name, record);
    const text = `${JSON.stringify({ version, jobs: Object.fromEntries(this.#records) }, null, 1)}\n`;
    // One after another: the last word wins.
    this.#saving = this.#saving.then(() => writeFileAtomic(join(this.folder, 'state.json'), text));
    await this.#saving;
  }

  logPath = (name: string): string => join(this.folder, 'logs', `${name}.log`);

  async storeResult(name: string, result: unknown): Promise<void> {
    await writeFileAtomic(join(this.folder, 'results', `${name}.json`), `${JSON.stringify(result)}\n`);
  }

  /** One line of `events.ndjson`, in the order of the calls. */
  async event(event: string, facts: Readonly<Record<string, unknown>>): Promise<void> {
    const path = join(this.folder, 'events.ndjson');
    const line = JSON.stringify({ time: new Date().toISOString(), event, ...facts });
    const written = this.#writing.then(() => appendFile(path, `${line}\n`, { flag: appendNoLink }));
    this.#writing = written.catch(() => undefined); // who asked for the line has the error
    await written.catch((error: unknown) => {
      throw ioError(error, 'write', path);
    });
  }

  async close(): Promise<void> {
    await this.#writing;
    await this.#saving.catch(() => undefined); // who called set has the error
    await this.#lock.release();
  }
}

/** Changes with the command, what the file gives, shards, and the files of the models that are read (names, sizes, times). */
export async function fingerprintOf(job: Job): Promise<string> {
  const given = [...job.given].map(([key, { raw }]) => [key, raw] as const).sort(([a], [b]) => (a < b ? -1 : 1));
  const inputs = await Promise.all(job.reads.map(stamp));
  return createHash('sha256')
    .update(JSON.stringify([job.command, given, inputs, ...(job.shards === undefined ? [] : [job.shards])]))
    .digest('hex')
    .slice(0, 32);
}

/** Names, sizes and times of a model's files; what is not there yet has none. */
async function stamp(path: string): Promise<Json> {
  try {
    const facts = await stat(path);
    if (!facts.isDirectory()) return [path, facts.size, facts.mtimeMs];
    const names = (await readdir(path)).filter((name) => !name.startsWith('.')).sort();
    const files = await Promise.all(names.map(async (name) => [name, await stat(join(path, name))] as const));
    return [path, ...files.flatMap(([name, { size, mtimeMs }]) => [name, size, mtimeMs])];
  } catch (error) {
    if (errorCode(error) === 'ENOENT' || errorCode(error) === 'ENOTDIR') return [path];
    throw ioError(error, 'look at', path);
  }
}

/** Whether an earlier run did just this, and what it made is still there. */
export async function isDone(job: Job, record: JobRecord | undefined): Promise<boolean> {
  if (record?.state !== 'done' || record.fingerprint !== (await fingerprintOf(job))) return false;
  for (const path of job.writes) if (!(await exists(path))) return false;
  return true;
}

/**
 * Whether the output of a job whose end was not seen (the batch was killed) is complete: outputs have their names only
 * then. What tells how it was made lies there since the job began; an output that it was to replace is older.
 */
export async function wasFinished(job: Job, record: JobRecord | undefined): Promise<boolean> {
  if (record?.state !== 'running' || record.started === null || job.out === undefined) return false;
  if (!(await exists(job.out)) || record.fingerprint !== (await fingerprintOf(job))) return false;
  const isFolder = (await stat(job.out)).isDirectory();
  const { dir, name } = parse(job.out);
  const path = isFolder ? join(job.out, 'deepseek-convert.json') : join(dir, `${name}.deepseek-convert.json`);
  return (await exists(path)) && (await stat(path)).mtimeMs >= Date.parse(record.started);
}

/** The job as arguments of our own program. */
export const argumentsOf = (job: Job): string[] => [job.command, ...flagsOf(job, job.given.keys())];

/** What a job gives of these options. */
export function flagsOf(job: Job, keys: Iterable<string>): string[] {
  return [...keys].flatMap((key): string[] => {
    const raw = job.given.get(key)?.raw;
    if (raw === undefined) return [];
    if (typeof raw === 'object') return raw.map((item) => `--${flagName(key)}=${item}`);
    const on = raw === true || (typeof raw === 'string' && job.values[key] === true && /^(true|yes|on|1)$/i.test(raw));
    if (typeof job.values[key] === 'boolean') return [on ? `--${flagName(key)}` : `--no-${flagName(key)}`];
    return [`--${flagName(key)}=${String(raw)}`];
  });
}
