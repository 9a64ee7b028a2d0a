import { join } from 'node:path';
import type { JobEnv } from '../../backend/env.js';
import { openDigests } from '../../base/digest.js';
import { badInput, badUsage } from '../../base/errors.js';
import { exists, fsyncPath, ioError, makeFolder, removeTemporaries, renameDurable } from '../../base/files.js';
import { Job, type Json } from '../../base/job.js';
import { blockResults } from '../../arch/stream.js';
import { stage, withTargets } from '../assemble.js';
import type { QuantizeOptions } from '../options.js';
import { fromJson, type BlockReport } from '../report.js';
import { solveBlocks } from '../run.js';
import { blockFile, BlockFiles, blockLayouts } from './block-files.js';
import { readRecord, shardFolder, writeRecord, type ShardPlan } from './files.js';
import { statesBefore } from './plan.js';
import { withPlanned, type Planned } from './prepare.js';

export interface ShardResult {
  readonly folder: string;
  /** Blocks by index, first and last. */
  readonly blocks: readonly [number, number];
  readonly reports: readonly BlockReport[];
  /** An earlier run has finished it. */
  readonly before: boolean;
  readonly resumed: boolean;
  readonly seconds: number;
}

/**
 * Solves one shard of a plan, block by block, into the plan's folder. Killed at any instant, the same call goes on; where
 * the shard is done it says so. Errors: as `quantize`; input, while another process solves the same shard.
 */
export async function runShard(
  plan: ShardPlan,
  { shard, of }: { readonly shard: number; readonly of: number },
  given: QuantizeOptions,
  env: JobEnv,
): Promise<ShardResult> {
  if (of !== plan.shards) {
    throw badUsage('The plan has another number of shards', { where: plan.path, expected: `--shard ${shard}/${plan.shards}`, got: `--shard ${shard}/${of}` }); // prettier-ignore
  }
  return await withPlanned(plan, given, env, (planned) => solveShard(plan, shard, planned, env));
}

async function solveShard(plan: ShardPlan, shard: number, planned: Planned, env: JobEnv): Promise<ShardResult> {
  const started = performance.now();
  const { options, prepared, ranges } = planned;
  const { open } = prepared;
  const range = ranges[shard]!;
  const blocks = open.model.blocks.slice(range.from, range.to);
  const indices = blocks.map(({ index }) => index);
  const result = (reports: readonly BlockReport[], before: boolean, resumed: boolean): ShardResult => ({
    folder: shardFolder(plan.folder, shard),
    blocks: [indices[0]!, indices.at(-1)!],
    ...{ reports, before, resumed },
    seconds: (performance.now() - started) / 1000,
  });
  const out = shardFolder(plan.folder, shard);
  const done = await readRecord(plan, shard, indices);
  if (done) return result(done.blocks.map(({ report }) => fromJson(report as Json)), true, true); // prettier-ignore
  const what = `Shard ${shard} of ${plan.shards}`;
  const own = { plan: plan.id, shard, of: plan.shards };
  return await Job.run({ out, fingerprint: own, what }, async (job) => {
    const states = statesBefore(plan.folder, prepared, range);
    if (states !== undefined && plan.set) await requireStates(states, plan.states[shard - 1]!);
    await removeTemporaries(job.outputFolder);
    await makeFolder(job.outputFolder).catch((error: unknown) => {
      throw ioError(error, 'make the folder', job.outputFolder);
    });
    const layouts = prepared.targets.map((target) => blockLayouts(target, prepared.plan));
    const sinks = prepared.targets.map(({ format }, i) => new BlockFiles(job.outputFolder, format, layouts[i]!));
    const run = { options, prepared, set: plan.set, job, env, started };
    try {
      await withTargets(run, sinks, (targets, reader) => solveBlocks(run, targets, reader, { ...range, states }));
    } finally {
      for (const sink of sinks) await sink.close();
    }
    await open.checkpoint.assertUnchanged();
    const results = blockResults(job, stage, { blocks });
    const digests = openDigests();
    try {
      const written = async (block: number): Promise<Record<string, string>> => {
        const formats = prepared.targets.flatMap(({ format }, i) => (layouts[i]!.has(block) ? [format] : []));
        const files = formats.map(async (format) => [format, await digests.finish(join(job.outputFolder, blockFile(format, block)))]); // prettier-ignore
        return Object.fromEntries(await Promise.all(files)) as Record<string, string>;
      };
      const records: Json[] = [];
      for (const [i, { seconds, result: report }] of results.entries()) {
        records.push({ seconds, report, files: await written(indices[i]!) });
      }
      await writeRecord(job.outputFolder, { plan: plan.id, shard, blocks: records });
    } finally {
      await digests.close();
    }
    await job.markFinishing();
    await fsyncPath(job.outputFolder);
    await renameDurable(job.outputFolder, out);
    const { resumed } = job;
    await job.remove();
    return result(results.map(({ result: report }) => fromJson(report)), false, resumed); // prettier-ignore
  });
}

async function requireStates(path: string, expected: string): Promise<void> {
  const hint = 'Make the plan anew: deepseek-convert plan ... --restart.';
  if (!(await exists(path))) throw badInput('The states in front of the shard are missing', { where: path, hint });
  const digests = openDigests();
  try {
    if ((await digests.finish(path)) !== expected) {
      throw badInput('The states in front of the shard are not those of the plan', { where: path, hint });
    }
  } finally {
    await digests.close();
  }
}
