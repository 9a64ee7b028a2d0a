import { readlink, realpath } from 'node:fs/promises';
import { basename, dirname, join, resolve, sep } from 'node:path';
import { badUsage, didYouMean, type ConvertError } from '../base/errors.js';
import { errorCode, ioError } from '../base/files.js';
import type { Job } from './types.js';

/**
 * Completes and checks the needs of jobs: names that exist, no circle, and a job that names another's output needs
 * it without being told. Problems are added to `problems`. Gives the jobs in an order that fits.
 */
export function settleNeeds(jobs: readonly Job[], problems: ConvertError[], path: string): Job[] {
  const byName = new Map<string, Job>();
  for (const job of jobs) {
    if (byName.has(job.name)) problems.push(badUsage(`Two jobs are named ${job.name}`, { where: path }));
    byName.set(job.name, job);
  }
  const makers = jobs.flatMap(({ name, writes }) => writes.map((path) => ({ name, path })));
  const settled = new Map<string, Job>();
  for (const job of byName.values()) {
    for (const need of job.needs) {
      if (byName.has(need) && need !== job.name) continue;
      const near = didYouMean(need, [...byName.keys()].filter((name) => name !== job.name)); // prettier-ignore
      const what = need === job.name ? 'needs itself' : `needs "${need}", which is no job`;
      problems.push(badUsage(`${job.name} ${what}`, { where: path, ...(near !== undefined && { hint: `Did you mean ${near}?` }) })); // prettier-ignore
    }
    const written = new Set(job.writes);
    const named = Object.values(job.values).flatMap((value) => (typeof value === 'string' || Array.isArray(value) ? value : [])); // prettier-ignore
    const paths = named.filter((value) => typeof value === 'string').map((value) => resolve(value));
    const implied = makers.filter((maker) => maker.name !== job.name && paths.some((path) => !written.has(path) && within(path, maker.path))); // prettier-ignore
    settled.set(job.name, { ...job, needs: [...new Set([...job.needs, ...implied.map(({ name }) => name)])] });
  }
  return ordered(settled, problems, path);
}

/** In the order of the file, each after what it needs. */
function ordered(jobs: ReadonlyMap<string, Job>, problems: ConvertError[], path: string): Job[] {
  const result = new Set<Job>();
  const visit = (job: Job, above: readonly string[]): void => {
    if (result.has(job)) return;
    if (above.includes(job.name)) {
      const circle = [...above.slice(above.indexOf(job.name)), job.name];
      problems.push(badUsage('Jobs need each other in a circle', { where: path, got: circle.join(' -> ') }));
      return;
    }
    const before = problems.length;
    for (const need of job.needs) {
      const other = jobs.get(need);
      if (other && problems.length === before) visit(other, [...above, job.name]);
    }
    result.add(job);
  };
  for (const job of jobs.values()) visit(job, []);
  return [...result];
}

/** Outputs that lie outside the folder for them, in each other's way, or in the batch's own folder. */
export async function checkOutputs(
  jobs: readonly Job[],
  { outputRoot, workFolder }: { readonly outputRoot: string; readonly workFolder: string },
): Promise<ConvertError[]> {
  const problems: ConvertError[] = [];
  const root = await truePath(resolve(outputRoot));
  const work = await truePath(resolve(workFolder));
  const seen: { name: string; path: string }[] = [];
  for (const job of jobs) {
    for (const written of job.writes) {
      const path = await truePath(written);
      // What stands there while the job runs must not be a link away either.
      const growing = await truePath(`${written}.part`);
      if (!within(path, root) || path === root || !within(growing, root)) {
        problems.push(badUsage(`${job.name} would write outside the folder for outputs`, { where: written, expected: `a path below ${root}`, hint: 'Name another folder with --output-root.' })); // prettier-ignore
      }
      if (within(path, work) || within(work, path)) {
        problems.push(badUsage(`${job.name} would write into the work folder of the batch`, { where: written }));
      }
      const other = seen.find((earlier) => within(path, earlier.path) || within(earlier.path, path));
      // Nor inside each other: an output is complete when it gets its name.
      if (other) {
        const whose = other.name === job.name ? `${job.name} writes twice` : `${other.name} and ${job.name} write`;
        problems.push(badUsage(`${whose} to one place`, { where: written === other.path ? written : `${other.path} and ${written}` })); // prettier-ignore
      }
      seen.push({ name: job.name, path });
    }
  }
  return problems;
}

const within = (path: string, folder: string): boolean =>
  path === folder || path.startsWith(folder.endsWith(sep) ? folder : folder + sep);

/** `path` with its links resolved, also those to what does not exist yet. */
async function truePath(path: string, links = 0): Promise<string> {
  try {
    return await realpath(path);
  } catch (error) {
    if (errorCode(error) !== 'ENOENT' && errorCode(error) !== 'ENOTDIR') throw ioError(error, 'look at', path);
    const target = await readlink(path).catch(() => undefined);
    if (target !== undefined && links < 40) return truePath(resolve(await truePath(dirname(path)), target), links + 1);
    return dirname(path) === path ? path : join(await truePath(dirname(path), links), basename(path));
  }
}
