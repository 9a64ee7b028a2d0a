import { readdir } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import type { JobEnv } from '../../backend/env.js';
import { openDigests } from '../../base/digest.js';
import { dtypeSize } from '../../base/dtype.js';
import { badInput } from '../../base/errors.js';
import { exists, requireSpace } from '../../base/files.js';
import { diffJson, Job, type Json } from '../../base/job.js';
import { isLocked } from '../../base/lock.js';
import type { CalibrationSet } from '../../arch/calibration.js';
import { statesFile, streamBlocks } from '../../arch/stream.js';
import { WeightReader } from '../../arch/weights.js';
import { chooseBits } from '../choose.js';
import type { QuantizeOptions } from '../options.js';
import { calibrate, planAll, prepare, statesOf, type Prepared } from '../prepare.js';
import { requireNoOutputYet } from '../run.js';
import { findPlan, shardFolder, writePlan } from './files.js';
import { asShards, shardsFingerprint } from './prepare.js';
import { shardRanges, type Range } from './ranges.js';

export interface PlanShardsOptions {
  readonly options: QuantizeOptions;
  readonly shards: number;
  /** The options as their table has them, for workers and merge to read them again; paths are absolute. */
  readonly given: Readonly<Record<string, Json>>;
}

export interface PlannedShards {
  /** `<out>.part` */
  readonly folder: string;
  readonly out: string;
  /** Blocks of each shard by index, first and last, and whether it is done. */
  readonly shards: readonly {
    readonly shard: number;
    readonly blocks: readonly [number, number];
    readonly done: boolean;
  }[];
  readonly calibration: string | undefined;
  readonly notices: readonly string[];
  readonly seconds: number;
}

/**
 * Prepares a quantization for shards: options, tokens and bits are fixed, and the states of the full-precision model in
 * front of each shard are stored. Killed at any instant, the same call goes on; when all is there it says so again.
 * Errors: as `quantize`; usage, for more shards than blocks.
 */
export async function planShards(
  { options: asked, shards, given }: PlanShardsOptions,
  env: JobEnv,
): Promise<PlannedShards> {
  const started = performance.now();
  const options = asShards(asked);
  const { out, overwrite, restart, commandLine } = options;
  const folder = `${resolve(out)}.part`;
  const prepared = await prepare(options);
  try {
    const { model } = prepared.open;
    const ranges = shardRanges(model, shards);
    for (const notice of prepared.notices) env.log.info(notice);
    if (restart) await requireIdle(folder);
    else await requireNoOutputYet(options);
    const before = restart ? undefined : await findPlan(folder);
    // Tokens that the same options have given are not sought again: the model itself may have had to write them.
    const same = before && diffJson(before.options, given).length === 0;
    const set = same ? before.set : await calibrate(options, prepared, env);
    const fingerprint = shardsFingerprint(options, prepared, set, env, shards);
    await Job.run({ out, overwrite, restart, fingerprint }, async (job) => {
      if (job.finished || job.done(planned)) return;
      const states = statesOf(options, prepared, env);
      const chosen = set && (await chooseBits({ ...prepared, set, job, env, states, commandLine }));
      const final = chosen ? await planAll(options, prepared, chosen) : prepared;
      const hashes = set ? await capture(options, final, set, ranges, job, env) : [];
      await writePlan(folder, { shards, options: given, device: env.device.kind, set, chosen, states: hashes });
      await job.mark(planned);
    });
    return {
      ...{ folder, out: resolve(out) },
      shards: await Promise.all(
        ranges.map(async ({ from, to }, shard) => ({
          shard,
          blocks: [model.blocks[from]!.index, model.blocks[to - 1]!.index] as const,
          done: await exists(shardFolder(folder, shard)),
        })),
      ),
      calibration: set?.description,
      notices: [...prepared.notices, ...(set?.notices ?? [])],
      seconds: (performance.now() - started) / 1000,
    };
  } finally {
    await prepared.open.close();
  }
}

const planned = 'planned';

/** Nothing is thrown away under a worker's hands. */
async function requireIdle(folder: string): Promise<void> {
  const shards = join(folder, 'shards');
  const names = (await exists(shards)) ? await readdir(shards) : [];
  for (const name of names.filter((entry) => entry.endsWith('.part'))) {
    const lock = join(shards, name, 'lock');
    if (await isLocked(lock)) throw badInput('A worker still solves a shard', { where: lock, hint: 'Wait for it to end, or stop it.' }); // prettier-ignore
  }
}

/** File of the states in front of a shard; undefined for the first, which begins with the embedding. */
export const statesBefore = (folder: string, { model }: Prepared, { from }: Range): string | undefined =>
  from === 0 ? undefined : join(folder, 'state', statesFile(model.blocks[from - 1]!.index));

/** Runs the full-precision model up to the last shard; SHA-256 of the states in front of each but the first. */
async function capture(
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet,
  ranges: readonly Range[],
  job: Job,
  env: JobEnv,
): Promise<string[]> {
  const { open } = prepared;
  const dtype = statesOf(options, prepared, env);
  const last = ranges.at(-1)!;
  if (last.from > 0) {
    const bytes = set.n * set.seqLen * open.model.stateWidth * dtypeSize(dtype);
    await requireSpace(job.folder, bytes * (ranges.length + 1));
    await streamBlocks({
      ...{ open, env, set, dtype, job },
      reader: new WeightReader(open, env.device, dtype),
      stage: 'capture',
      range: { from: 0, to: last.from, states: undefined },
      keep: new Set(ranges.slice(1).map(({ from }) => open.model.blocks[from - 1]!.index)),
      resumeHint: `Go on with: ${options.commandLine}`,
      ...(options.batchRows !== undefined && { batchRows: options.batchRows }),
      ...(options.budget !== undefined && { budget: options.budget }),
    });
  }
  const digests = openDigests();
  try {
    const paths = ranges.flatMap((range) => statesBefore(job.folder, prepared, range) ?? []);
    return await Promise.all(paths.map((path) => digests.finish(path)));
  } finally {
    await digests.close();
  }
}
