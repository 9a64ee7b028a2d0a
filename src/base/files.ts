import { lstat, mkdir, open, readFile, readdir, rename, rm, stat, statfs } from 'node:fs/promises';
import { constants, read as readCallback, write as writeCallback } from 'node:fs';
import type { FileHandle } from 'node:fs/promises';
import { basename, dirname, join } from 'node:path';
import { promisify } from 'node:util';
import { badInput, ConvertError, noResource } from './errors.js';

let ownDigits: string | undefined;
/** In names of files that only this process writes: digits that no other process has, be it on another host. */
export function processId(): string {
  // Of all that starts with the program, only this would load the module.
  ownDigits ??= `${process.pid}${process.getBuiltinModule('node:crypto').randomInt(1e12)}`;
  return ownDigits;
}

const readFd = promisify(readCallback);
const writeFd = promisify(writeCallback);

/** The operating system's error code (`ENOENT` ...), or undefined for other errors. */
export function errorCode(error: unknown): string | undefined {
  const code = (error as { code?: unknown } | undefined)?.code;
  return typeof code === 'string' ? code : undefined;
}

const inputCodes = ['ENOENT', 'EACCES', 'EPERM', 'EISDIR', 'ENOTDIR', 'ELOOP', 'ENAMETOOLONG', 'EROFS', 'EEXIST'];
const inputReasons: Record<string, string> = {
  ENOENT: 'no such file or folder',
  EACCES: 'permission denied',
  EPERM: 'operation not permitted',
  EISDIR: 'a folder, not a file',
  ENOTDIR: 'a file, not a folder',
  EROFS: 'the file system is read-only',
};

/**
 * The ConvertError for a failed system call: a full or broken disk is a resource error that names path and bytes,
 * a missing or forbidden path an input error. A ConvertError passes through unchanged.
 */
export function ioError(cause: unknown, doing: string, path: string, bytes?: number): ConvertError {
  if (cause instanceof ConvertError) return cause;
  const code = errorCode(cause);
  const size = bytes === undefined ? '' : `, ${formatBytes(bytes)}`;
  const where = `${path}${size}`;
  if (code === 'ENOSPC' || code === 'EDQUOT') {
    const got = code === 'ENOSPC' ? 'the disk is full' : 'the quota is used up';
    const hint = 'Free some space and run the same command again: it goes on where it stopped.';
    return noResource(`Cannot ${doing}`, { where, got, hint, cause });
  }
  const message = cause instanceof Error ? cause.message : String(cause);
  if (code === 'EIO') {
    const hint = 'The device reported an input/output error: look at the system log and check the disk.';
    return noResource(`Cannot ${doing}`, { where, got: message, hint, cause });
  }
  if (code !== undefined && inputCodes.includes(code)) {
    return badInput(`Cannot ${doing}`, { where: path, got: inputReasons[code] ?? message, cause });
  }
  return noResource(`Cannot ${doing}`, { where, got: message, cause });
}

/** `1234567` -> `1.23 MB` (powers of ten, as disks are sold and tools print them). */
export function formatBytes(bytes: number): string {
  const units = ['B', 'kB', 'MB', 'GB', 'TB', 'PB'];
  let value = bytes;
  let unit = 0;
  while (value >= 999.5 && unit < units.length - 1) [value, unit] = [value / 1000, unit + 1];
  return unit === 0 ? `${bytes} B` : `${value >= 99.95 ? value.toFixed(0) : value.toPrecision(3)} ${units[unit]}`;
}

/** Forces a file's or a folder's entries to disk. */
export async function fsyncPath(path: string): Promise<void> {
  let handle: FileHandle | undefined;
  try {
    handle = await open(path, 'r');
    await handle.sync();
  } catch (error) {
    throw ioError(error, 'flush to disk', path);
  } finally {
    await handle?.close();
  }
}

/** Renames within one file system and forces both folders' entries to disk. */
export async function renameDurable(from: string, to: string): Promise<void> {
  try {
    await rename(from, to);
  } catch (error) {
    throw ioError(error, `rename ${from} to`, to);
  }
  await fsyncPath(dirname(to));
  if (dirname(from) !== dirname(to)) await fsyncPath(dirname(from));
}

/** Writes a new file and renames it over `path`: after a crash there is the old content or the new, nothing between. */
export async function writeFileAtomic(path: string, data: string | Uint8Array): Promise<void> {
  const bytes = typeof data === 'string' ? Buffer.from(data) : data;
  const temporary = join(dirname(path), `.${basename(path)}.${processId()}.tmp`);
  let handle: FileHandle | undefined;
  try {
    handle = await open(temporary, 'w');
    await handle.writeFile(bytes);
    await handle.sync();
    await handle.close();
    handle = undefined;
  } catch (error) {
    await handle?.close().catch(() => undefined);
    await rm(temporary, { force: true }).catch(() => undefined);
    throw ioError(error, 'write', path, bytes.length);
  }
  await renameDurable(temporary, path);
}

/** Removes what killed processes left of `writeFileAtomic` in a folder and below. */
export async function removeTemporaries(folder: string): Promise<void> {
  if (!(await exists(folder))) return;
  for (const name of await readdir(folder, { recursive: true })) {
    if (/^\..+\.\d+\.tmp$/.test(basename(name))) await rm(join(folder, name), { force: true });
  }
}

/** JSON of a small file of ours (journal, provenance ...); undefined when there is no such file. */
export async function readJsonFile(path: string): Promise<unknown> {
  let text: string;
  try {
    text = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return undefined;
    throw ioError(error, 'read', path);
  }
  try {
    return JSON.parse(text) as unknown;
  } catch (cause) {
    throw badInput('Damaged JSON file', { where: path, got: (cause as Error).message, cause });
  }
}

/** Fills `buffer` from `position` on; a file that ends earlier is an input error naming the byte. */
export async function readFully(fd: number, buffer: Uint8Array, position: number, path: string): Promise<void> {
  let done = 0;
  while (done < buffer.length) {
    let bytesRead: number;
    try {
      ({ bytesRead } = await readFd(fd, buffer, done, buffer.length - done, position + done));
    } catch (error) {
      throw ioError(error, `read at byte ${position + done} of`, path, buffer.length);
    }
    if (bytesRead === 0) {
      throw badInput('File ends too early', {
        where: `${path}, byte ${position + done}`,
        expected: `${buffer.length} bytes from byte ${position}`,
        got: `${done} bytes`,
        hint: 'The file is truncated or was changed while it was read: compare its size with the original.',
      });
    }
    done += bytesRead;
  }
}

/** `bytes` bytes from `position` on, in a fresh buffer. */
export async function readAt(fd: number, position: number, bytes: number, path: string): Promise<Buffer> {
  const buffer = Buffer.allocUnsafe(bytes);
  await readFully(fd, buffer, position, path);
  return buffer;
}

/** Writes all of `buffer` at `position`; a full disk is a resource error naming path and bytes. */
export async function writeFully(fd: number, buffer: Uint8Array, position: number, path: string): Promise<void> {
  let done = 0;
  while (done < buffer.length) {
    try {
      const { bytesWritten } = await writeFd(fd, buffer, done, buffer.length - done, position + done);
      done += bytesWritten;
    } catch (error) {
      throw ioError(error, `write at byte ${position + done} of`, path, buffer.length - done);
    }
  }
}

/** Flags to append to a file that must not be a link: what others have put there could lead anywhere. */
export const appendNoLink = constants.O_APPEND | constants.O_CREAT | constants.O_WRONLY | constants.O_NOFOLLOW;

/** Refuses a folder of ours in which, at any depth, somebody has put links: through them we would write elsewhere. */
export async function refuseLinks(folder: string, whole = folder): Promise<void> {
  const entries = await readdir(folder, { withFileTypes: true }).catch((error: unknown) => {
    if (errorCode(error) === 'ENOENT') return []; // another process has ended and removed it
    throw ioError(error, 'read the work folder', folder);
  });
  for (const entry of entries) {
    const path = join(folder, entry.name);
    if (entry.isSymbolicLink()) throw badInput('A work folder must have no links in it', { where: path, hint: `Look where it came from, then remove ${whole}.` }); // prettier-ignore
    if (entry.isDirectory()) await refuseLinks(path, whole);
  }
}

/**
 * Makes a folder and those above it. Node's own way (`recursive`) never ends where a file system says that a parent is
 * missing and can't hold it either, as /proc does: here that is ENOENT.
 */
export async function makeFolder(path: string): Promise<void> {
  const make = () =>
    mkdir(path).catch(async (error: unknown) => {
      if (!(await stat(path).catch(() => undefined))?.isDirectory()) throw error;
    });
  try {
    await make();
  } catch (error) {
    const parent = dirname(path);
    if (errorCode(error) !== 'ENOENT' || parent === path) throw error;
    await makeFolder(parent);
    await make();
  }
}

/** Whether anything, be it a broken link, stands at `path`. */
export async function exists(path: string): Promise<boolean> {
  try {
    await lstat(path);
    return true;
  } catch (error) {
    if (errorCode(error) === 'ENOENT' || errorCode(error) === 'ENOTDIR') return false;
    throw ioError(error, 'look at', path);
  }
}

/** Bytes that an unprivileged process may still write into the file system of `folder`. */
export async function freeBytes(folder: string): Promise<number> {
  try {
    const { bavail, bsize } = await statfs(folder);
    return bavail * bsize;
  } catch (error) {
    throw ioError(error, 'ask for free space of', folder);
  }
}

/** Refuses, before any work, an output that will not fit. `bytes` is what is still to be written. */
export async function requireSpace(folder: string, bytes: number): Promise<void> {
  const free = await freeBytes(folder);
  if (free >= bytes) return;
  throw noResource('Not enough disk space for the output', {
    where: folder,
    expected: `${formatBytes(bytes)} free`,
    got: formatBytes(free),
    hint: 'Free some space, or write to another disk with -o.',
  });
}
