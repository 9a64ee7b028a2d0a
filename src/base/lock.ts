import { link, readFile, readdir, readlink, rename, rm, stat, utimes, writeFile } from 'node:fs/promises';
import { readFileSync } from 'node:fs';
import { hostname } from 'node:os';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { badInput, ConvertError } from './errors.js';
import { errorCode, ioError } from './files.js';

/** Who holds a lock. `processStart` is in clock ticks since boot, so that a recycled pid is not taken for its owner. */
interface Owner {
  pid: number;
  host: string;
  boot: string;
  pidNamespace: string;
  processStart: string;
  since: string;
}

const heartbeatMs = 20_000;
/** A lock of another host (or container) whose owner was silent for so long counts as dead. */
const silentMs = 5 * 60_000;

/** Another process that is alive has the lock. */
export class LockHeld extends ConvertError {}

/** A lock file that names its owner; the locks of dead processes are taken over. */
export class FileLock {
  readonly path: string;
  readonly #text: string;
  readonly #timer: NodeJS.Timeout;

  private constructor(path: string, text: string) {
    this.path = path;
    this.#text = text;
    const beat = (): void => {
      const now = new Date();
      utimes(path, now, now).catch(() => undefined); // a missed beat is no error: the next one follows
    };
    this.#timer = setInterval(beat, heartbeatMs).unref();
  }

  /**
   * Takes the lock at `path`. Refused (LockHeld, kind 'input') while another process that is alive holds it, after
   * DEEPSEEK_CONVERT_LOCK_WAIT seconds where that is set: the lock of a pod that died without a word looks alive for
   * minutes to the pod that takes its place.
   * @param what names the locked thing in the error, e.g. "The work folder".
   */
  static async take(path: string, what: string): Promise<FileLock> {
    const until = Date.now() + 1000 * Number(process.env.DEEPSEEK_CONVERT_LOCK_WAIT ?? 0);
    for (;;) {
      try {
        return await FileLock.#takeNow(path, what);
      } catch (error) {
        if (!(error instanceof LockHeld) || !(Date.now() < until)) throw error;
        await delay(1000);
      }
    }
  }

  static async #takeNow(path: string, what: string): Promise<FileLock> {
    const text = `${JSON.stringify(await self(), null, 1)}\n`;
    const mine = join(dirname(path), `.lock.${process.pid}.${process.hrtime.bigint()}`);
    try {
      await writeFile(mine, text, { flag: 'wx' });
      for (let attempt = 0; attempt < 5; attempt++) {
        try {
          await link(mine, path); // atomic, and the content is complete from the first moment
          return new FileLock(path, text);
        } catch (error) {
          if (errorCode(error) !== 'EEXIST') throw error;
        }
        await clearStale(path, what);
      }
    } catch (error) {
      throw ioError(error, 'lock', path);
    } finally {
      await rm(mine, { force: true }).catch(() => undefined);
    }
    throw badInput(`${what} is being taken by several processes at once`, { where: path });
  }

  /** Whether another process has taken the lock: this one was silent for long, and lives after all. */
  async isLost(): Promise<boolean> {
    try {
      return (await readFile(this.path, 'utf8')) !== this.#text;
    } catch (error) {
      return errorCode(error) === 'ENOENT'; // a file system that does not answer now says nothing
    }
  }

  async release(): Promise<void> {
    clearInterval(this.#timer);
    const now = await readFile(this.path, 'utf8').catch(() => undefined);
    if (now === this.#text) await rm(this.path, { force: true });
  }
}

/** Whether a process that is alive holds the lock at `path`. */
export async function isLocked(path: string): Promise<boolean> {
  try {
    const [text, { mtimeMs }] = [await readFile(path, 'utf8'), await stat(path)];
    const owner = parseOwner(text);
    return owner !== undefined && (await alive(owner, mtimeMs));
  } catch (error) {
    if (errorCode(error) === 'ENOENT' || errorCode(error) === 'ENOTDIR') return false;
    throw ioError(error, 'look at the lock', path);
  }
}

/** Removes from `folder` what processes left that died while they were taking a lock there. */
export async function clearLeftLocks(folder: string): Promise<void> {
  for (const name of (await readdir(folder)).filter((entry) => entry.startsWith('.lock.'))) {
    const path = join(folder, name);
    try {
      const owner = parseOwner(await readFile(path, 'utf8'));
      const beat = (await stat(path)).mtimeMs;
      // Half written: whoever is still at it is done within moments.
      if (owner ? !(await alive(owner, beat)) : Date.now() - beat > 1000) await rm(path, { force: true });
    } catch (error) {
      if (errorCode(error) !== 'ENOENT') throw error; // its owner has removed it
    }
  }
}

async function clearStale(path: string, what: string): Promise<void> {
  let text: string;
  let beat: number;
  try {
    [text, beat] = [await readFile(path, 'utf8'), (await stat(path)).mtimeMs];
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return; // released meanwhile
    throw error;
  }
  const owner = parseOwner(text);
  if (owner && (await alive(owner, beat))) {
    throw new LockHeld('input', `${what} is in use`, {
      where: path,
      got: `process ${owner.pid} on ${owner.host}, for ${age(Date.parse(owner.since))}`,
      expected: 'no other process',
      hint: 'Wait for it to end, stop it, or write to another path with -o.',
    });
  }
  // Move away what was judged dead, and look again: another process may have taken the lock in between.
  const aside = `${path}.dead.${process.pid}`;
  try {
    await rename(path, aside);
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return;
    throw error;
  }
  if ((await readFile(aside, 'utf8')) !== text) await link(aside, path).catch(() => undefined);
  await rm(aside, { force: true });
}

function parseOwner(text: string): Owner | undefined {
  try {
    const value = JSON.parse(text) as Owner;
    return typeof value.pid === 'number' && typeof value.host === 'string' ? value : undefined;
  } catch {
    return undefined;
  }
}

async function self(): Promise<Owner> {
  return {
    pid: process.pid,
    host: hostname(),
    boot: bootId(),
    pidNamespace: await readlink('/proc/self/ns/pid').catch(() => ''),
    processStart: processStart(process.pid) ?? '',
    since: new Date().toISOString(),
  };
}

async function alive(owner: Owner, lastBeat: number): Promise<boolean> {
  const me = await self();
  if (owner.host !== me.host || (owner.boot === me.boot && owner.pidNamespace !== me.pidNamespace)) {
    return Date.now() - lastBeat < silentMs; // its process table is not ours to look at
  }
  return owner.boot === me.boot && processStart(owner.pid) === owner.processStart;
}

const bootId = (): string => readProc('/proc/sys/kernel/random/boot_id')?.trim() ?? '';

/** Field 22 of /proc/<pid>/stat; undefined when there is no such process (a zombie counts as none). */
function processStart(pid: number): string | undefined {
  const line = readProc(`/proc/${pid}/stat`);
  // The second field is the command in parentheses and may hold anything: count from the last ')'.
  const fields = line?.slice(line.lastIndexOf(')') + 2).split(' ');
  return fields === undefined || fields[0] === 'Z' || fields[0] === 'X' ? undefined : fields[19];
}

function readProc(path: string): string | undefined {
  try {
    return readFileSync(path, 'utf8');
  } catch {
    return undefined;
  }
}

function age(since: number): string {
  const seconds = Math.max(0, Math.round((Date.now() - since) / 1000));
  if (seconds < 120) return `${seconds} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}
