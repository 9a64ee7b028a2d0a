import { readFileSync } from 'node:fs';
import { readdir, realpath, rm, rmdir, stat } from 'node:fs/promises';
import { dirname, join, relative, resolve, sep } from 'node:path';
import { badInput } from './errors.js';
import {
  exists,
  fsyncPath,
  ioError,
  makeFolder,
  readJsonFile,
  refuseLinks,
  removeTemporaries,
  writeFileAtomic,
} from './files.js';
import { FileLock, clearLeftLocks } from './lock.js';

export type Json = null | boolean | number | string | readonly Json[] | { readonly [key: string]: Json };

export interface JobOptions {
  /** The output that the job makes; its work folder is `<out>.part`. */
  readonly out: string;
  /** Everything that decides the output's bytes: inputs, recipe, calibration text, tool version. */
  readonly fingerprint: Readonly<Record<string, Json>>;
  /** An existing output may be replaced (at the very end, by rename). */
  readonly overwrite?: boolean | undefined;
  /** Throws away what an earlier run left in the work folder. */
  readonly restart?: boolean | undefined;
  /** What messages call the work folder; default: "The work folder". */
  readonly what?: string | undefined;
}

interface Step {
  readonly index: number;
  readonly data: Json;
}

interface Header {
  readonly version: number;
  readonly fingerprint: Readonly<Record<string, Json>>;
  /** How the program was called, for who finds the work folder later; decides nothing. */
  readonly begun?: { readonly arguments: readonly string[]; readonly folder: string };
}

const restartHint = (folder: string): string =>
  `Run the earlier command again to go on with it, add --restart to begin anew, or remove ${folder}.`;

/**
 * The durable work folder of one output. Steps are marked by rename after fsync, so a job that is killed at any
 * instant knows exactly which steps are done; only one process at a time works in it.
 */
export class Job {
  /** Absolute path of the output. */
  readonly out: string;
  /** `<out>.part`: journal, states and the growing output. */
  readonly folder: string;
  /** Whether an earlier run's steps were found. */
  readonly resumed: boolean;
  /** An earlier run gave the output its name and was killed before it could clean up: only `remove()` is left to do. */
  readonly finished: boolean;
  readonly overwrite: boolean;
  #marking: Promise<void> = Promise.resolve();
  readonly #steps: Map<string, Step>;
  readonly #lock: FileLock;
  readonly #what: string;

  private constructor(options: JobOptions, lock: FileLock, steps: Map<string, Step>, finished: boolean) {
    this.out = resolve(options.out);
    this.folder = `${this.out}.part`;
    this.overwrite = options.overwrite ?? false;
    [this.#lock, this.#steps, this.finished] = [lock, steps, finished];
    this.#what = options.what ?? theWorkFolder;
    this.resumed = steps.size > 0;
  }

  /**
   * Opens or goes on with the job for `out`.
   * Errors (all kind 'input'): the output exists and may not be overwritten; another live process works on it;
   * the work folder belongs to a job with another fingerprint (with a diff).
   */
  static async open(options: JobOptions): Promise<Job> {
    const out = resolve(options.out);
    const folder = `${out}.part`;
    const named = options.restart !== true && (await outputIsNamed(out, folder));
    if (!named) await requireNoOutput(out, options.overwrite ?? false);
    try {
      await makeFolder(join(folder, 'steps'));
      await makeFolder(join(folder, 'state'));
      await refuseLinks(folder);
    } catch (error) {
      throw ioError(error, 'make the work folder', folder);
    }
    const lock = await FileLock.take(join(folder, 'lock'), options.what ?? theWorkFolder);
    try {
      if (options.restart) await clear(folder);
      const begun = { arguments: process.argv.slice(2), folder: process.cwd() };
      const header: Header = { version: 1, fingerprint: options.fingerprint, begun };
      const path = join(folder, 'job.json');
      const before = (await readJsonFile(path)) as Header | undefined;
      if (before === undefined) {
        await clear(folder); // without a header nothing in here can be trusted
        await writeFileAtomic(path, `${JSON.stringify(header, null, 1)}\n`);
        await fsyncPath(dirname(out));
      } else {
        refuseOther(before, header, path, folder);
      }
      return new Job(options, lock, await readSteps(folder), named);
    } catch (error) {
      await lock.release();
      throw error;
    }
  }

  /** Opens the job for as long as `body` works in it; a failure before the first step leaves nothing behind. */
  static async run<T>(options: JobOptions, body: (job: Job) => Promise<T>): Promise<T> {
    const job = await Job.open(options);
    try {
      return await body(job);
    } catch (error) {
      await job.fail();
      throw error;
    } finally {
      await job.close();
    }
  }

  done(step: string): boolean {
    return this.#steps.has(step);
  }

  /** What `mark` stored with the step; undefined when the step is not done. */
  data(step: string): Json | undefined {
    return this.#steps.get(step)?.data;
  }

  /** Names of the steps done so far, in the order in which they were marked. */
  steps(): string[] {
    return [...this.#steps.keys()];
  }

  /**
   * Records a step durably. What the step wrote must be on disk already (`writer.flush`, `fsyncPath`).
   * Error: input, when another process has taken the work folder over.
   */
  mark(step: string, data: Json = null): Promise<void> {
    const marked = this.#marking.then(() => this.#mark(step, data));
    this.#marking = marked.catch(() => undefined);
    return marked;
  }

  /** One after another: each has a number of its own. */
  async #mark(step: string, data: Json): Promise<void> {
    await this.#requireHeld();
    const known = this.#steps.get(step);
    const index = known?.index ?? this.#steps.size;
    const name = `${String(index).padStart(6, '0')}.json`;
    await writeFileAtomic(join(this.folder, 'steps', name), `${JSON.stringify({ step, data })}\n`);
    this.#steps.set(step, { index, data });
  }

  /** Path of a state file (calibration states ...) inside the work folder. */
  statePath(name: string): string {
    return join(this.folder, 'state', name);
  }

  /** Folder in which the output grows; renamed (or its files moved) to the output's name at the end. */
  get outputFolder(): string {
    return join(this.folder, 'output');
  }

  /** To be called when the output is complete and verified, just before it gets its name. */
  async markFinishing(): Promise<void> {
    await this.#requireHeld();
    await removeTemporaries(this.outputFolder);
    await writeFileAtomic(join(this.folder, finishing), '{}\n');
  }

  /** Two processes must never write one output: the one that was silent for too long gives way. */
  async #requireHeld(): Promise<void> {
    if (!(await this.#lock.isLost())) return;
    throw badInput(`${this.#what} was taken over by another process`, {
      where: this.#lock.path,
      got: 'this process was silent for minutes and was taken for dead',
      hint: 'Nothing is lost: the other process goes on with what is finished.',
    });
  }

  /** Ends this run's hold and keeps the work folder for a later run. */
  async close(): Promise<void> {
    await this.#lock.release();
  }

  /** Ends a failed run: where no step is done there is nothing to go on with, and the work folder goes. */
  async fail(): Promise<void> {
    await (this.#steps.size > 0 ? this.close() : this.remove());
  }

  /** Ends the job: the work folder goes. For a finished output, or one that is given up. */
  async remove(): Promise<void> {
    // First: as long as it is there, so is everything that a later run would tell of the output.
    await rm(join(this.folder, finishing), { force: true });
    await clear(this.folder);
    await clearLeftLocks(this.folder);
    await this.#lock.release();
    // Not recursive: a process that came meanwhile keeps what it has made.
    for (const path of [join(this.folder, 'steps'), join(this.folder, 'state'), this.folder]) {
      await rmdir(path).catch(() => undefined);
    }
  }
}

const finishing = 'finishing.json';
const theWorkFolder = 'The work folder';

/** Whether an earlier run was killed after it gave the output its name, before it removed the work folder. */
async function outputIsNamed(out: string, folder: string): Promise<boolean> {
  const [marker, output, named] = [join(folder, finishing), join(folder, 'output'), out];
  return (await exists(marker)) && !(await exists(output)) && (await exists(named));
}

/** Refuses an output that exists, before any work. An empty folder is no output yet. */
export async function requireNoOutput(out: string, overwrite: boolean): Promise<void> {
  if (!(await exists(out))) return;
  const isFolder = (await stat(out)).isDirectory();
  const entries = isFolder ? await readdir(out) : [];
  if (isFolder && entries.length === 0) return;
  if (!overwrite) {
    throw badInput('The output exists already', {
      where: out,
      hint: 'Add --overwrite to replace it when the new one is complete, or choose another path with -o.',
    });
  }
  // --overwrite with a mistyped path must not remove somebody's home folder.
  const ours = ['config.json', 'deepseek-convert.json'];
  if (isFolder && !ours.some((name) => entries.includes(name))) {
    throw badInput('The output to overwrite is not a model folder', {
      where: out,
      expected: `a folder with ${ours.join(' or ')}`,
      got: entries.slice(0, 4).join(', '),
      hint: 'Choose another path with -o, or remove the folder yourself.',
    });
  }
}

/** Refuses to replace a folder by what is made of files in it: whatever else lies there would go as well. */
export async function requireInputElsewhere(input: string, out: string): Promise<void> {
  if (!(await exists(input)) || !(await exists(out)) || !(await stat(out)).isDirectory()) return;
  const [from, to] = await Promise.all([realpath(input), realpath(out)]);
  const way = relative(to, from);
  if (way === '..' || way.startsWith(`..${sep}`)) return;
  throw badInput('The output would replace the folder that it is made from', {
    where: out,
    got: `the input ${input}`,
    hint: 'Choose another path with -o; remove the input yourself when the output is there.',
  });
}

async function clear(folder: string): Promise<void> {
  for (const entry of await readdir(folder)) {
    if (entry === 'lock' || entry.startsWith('.lock.')) continue;
    await rm(join(folder, entry), { recursive: true, force: true });
  }
  await makeFolder(join(folder, 'steps'));
  await makeFolder(join(folder, 'state'));
}

/** The arguments that the job in a work folder was begun with; undefined where that is no work folder. */
export function begunBy(folder: string): Header['begun'] {
  try {
    return (JSON.parse(readFileSync(join(folder, 'job.json'), 'utf8')) as Header).begun;
  } catch {
    return undefined;
  }
}

async function readSteps(folder: string): Promise<Map<string, Step>> {
  const steps = new Map<string, Step>();
  const names = (await readdir(join(folder, 'steps'))).filter((name) => /^\d+\.json$/.test(name));
  for (const name of names.sort()) {
    const path = join(folder, 'steps', name);
    const { step, data } = (await readJsonFile(path)) as { step: string; data: Json };
    steps.set(step, { index: Number.parseInt(name, 10), data });
  }
  return steps;
}

/** Refuses a work folder that belongs to a job with another fingerprint, or to none, without opening it. */
export async function requireFingerprint(folder: string, fingerprint: Header['fingerprint']): Promise<void> {
  const path = join(folder, 'job.json');
  const before = (await readJsonFile(path)) as Header | undefined;
  if (before === undefined) throw badInput('The work folder has no job', { where: folder, expected: 'job.json in it' });
  refuseOther(before, { version: 1, fingerprint }, path, folder);
}

function refuseOther(before: Header, now: Header, path: string, folder: string): void {
  if (before.version !== now.version) {
    throw badInput('The work folder was made by another version of this tool', {
      where: path,
      got: `version ${before.version}`,
      expected: `version ${now.version}`,
      hint: restartHint(folder),
    });
  }
  const changes = diffJson(before.fingerprint, now.fingerprint);
  if (changes.length === 0) return;
  const shown = changes.slice(0, 20).map((line) => `\n  ${line}`);
  const more = changes.length > 20 ? `\n  and ${changes.length - 20} more` : '';
  throw badInput(
    `The work folder belongs to a different job. Different are (earlier -> now):${shown.join('')}${more}`,
    {
      where: path,
      hint: restartHint(folder),
    },
  );
}

/** One line for each leaf that differs: `recipe.bits: 4 -> 3`. Order of keys does not matter. */
export function diffJson(before: Json | undefined, now: Json | undefined, at = ''): string[] {
  if (isRecord(before) && isRecord(now)) {
    const keys = [...new Set([...Object.keys(before), ...Object.keys(now)])].sort();
    return keys.flatMap((key) => diffJson(before[key], now[key], at === '' ? key : `${at}.${key}`));
  }
  if (Array.isArray(before) && Array.isArray(now) && before.length === now.length) {
    return before.flatMap((item: Json, i) => diffJson(item, (now as Json[])[i], `${at}[${i}]`));
  }
  if (JSON.stringify(before) === JSON.stringify(now)) return [];
  return [`${at}: ${show(before)} -> ${show(now)}`];
}

const isRecord = (value: Json | undefined): value is { readonly [key: string]: Json } =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function show(value: Json | undefined): string {
  if (value === undefined) return '(none)';
  const text = JSON.stringify(value);
  return text.length > 120 ? `${text.slice(0, 100)}... (${text.length} characters)` : text;
}
