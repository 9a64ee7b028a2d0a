import { stat } from 'node:fs/promises';
import { join } from 'node:path';
import { stopIfAborted, type JobEnv } from '../../backend/env.js';
import { openDigests, type Digests } from '../../base/digest.js';
import { badInput } from '../../base/errors.js';
import { ioError } from '../../base/files.js';
import { closeFiles, fileSource } from '../../base/io.js';
import { Job, type Json } from '../../base/job.js';
import { shellQuote } from '../../base/text.js';
import type { TensorSink } from '../../checkpoint/types.js';
import { blockStep } from '../../arch/stream.js';
import { assemble, stage } from '../assemble.js';
import { CoverageGate } from '../coverage.js';
import type { QuantizeOptions, QuantizeResult } from '../options.js';
import type { TargetWriter } from '../visitor.js';
import { blockFile, blockLayouts, type BlockLayout } from './block-files.js';
import { readRecord, shardFolder, type ShardPlan, type ShardRecord } from './files.js';
import { withPlanned, type Planned } from './prepare.js';

/**
 * Puts the shards of a plan together, checks the result as `quantize` does, and gives it its name. Killed at any
 * instant, the same call goes on. Errors: as `quantize`; input, for shards that are missing, of another plan, damaged.
 */
export async function mergeShards(plan: ShardPlan, given: QuantizeOptions, env: JobEnv): Promise<QuantizeResult> {
  const started = performance.now();
  return await withPlanned(plan, given, env, async (planned) => {
    const { options, prepared, fingerprint } = planned;
    const { out, overwrite } = options;
    return await Job.run({ out, overwrite, fingerprint }, async (job) => {
      const { blocks } = prepared.open.model;
      const resumed = blocks.some(({ index }) => job.done(blockStep(stage, index)));
      const records = job.finished ? [] : await completeRecords(plan, planned);
      const gate = new CoverageGate(prepared.open.model, options.maxUncovered);
      for (const [i, { report }] of records.flatMap((record) => record.blocks).entries()) {
        gate.add(report.coverage?.uncovered ?? 0, blocks[i]!.name);
      }
      const run = { options, prepared, set: plan.set, job, env, started };
      const result = await assemble(run, (targets) => copyBlocks(plan, planned, records, targets, job, env));
      return { ...result, resumed };
    });
  });
}

async function completeRecords(plan: ShardPlan, { prepared, ranges }: Planned): Promise<ShardRecord[]> {
  const records: ShardRecord[] = [];
  const missing: number[] = [];
  for (const [shard, { from, to }] of ranges.entries()) {
    const record = await readRecord(plan, shard, prepared.open.model.blocks.slice(from, to).map(({ index }) => index)); // prettier-ignore
    if (record) records.push(record);
    else missing.push(shard);
  }
  if (missing.length === 0) return records;
  const line = (shard: number): string => `deepseek-convert worker ${shellQuote(plan.folder)} --shard ${shard}/${plan.shards}`; // prettier-ignore
  throw badInput(`${missing.length} of ${plan.shards} shards are missing`, {
    where: plan.folder,
    got: `no shard ${missing.slice(0, 20).join(', ')}${missing.length > 20 ? ' ...' : ''}`,
    hint: `${missing.slice(0, 3).map(line).join('\n  ')}${missing.length > 3 ? '\n  ...' : ''}`,
  });
}

async function copyBlocks(
  plan: ShardPlan,
  { options, prepared, ranges }: Planned,
  records: readonly ShardRecord[],
  targets: readonly TargetWriter[],
  job: Job,
  env: JobEnv,
): Promise<void> {
  const { blocks } = prepared.open.model;
  const layouts = prepared.targets.map((target) => blockLayouts(target, prepared.plan));
  const digests = openDigests();
  try {
    for (const [shard, { from, to }] of ranges.entries()) {
      for (const [i, { index, name }] of blocks.slice(from, to).entries()) {
        if (job.done(blockStep(stage, index))) continue;
        stopIfAborted(env, `Go on with: ${options.commandLine}`);
        const { seconds, report, files } = records[shard]!.blocks[i]!;
        for (const [t, { name: format, writer }] of targets.entries()) {
          const layout = layouts[t]!.get(index);
          if (!layout) continue;
          const path = join(shardFolder(plan.folder, shard), blockFile(format, index));
          await copyBlock(path, layout, files[format], writer, digests);
        }
        await job.mark(blockStep(stage, index), { seconds, result: report as Json });
        env.log.progress({ stage: 'merge', done: from + i + 1, total: blocks.length, data: { block: name } });
      }
    }
  } finally {
    await digests.close();
  }
}

async function copyBlock(
  path: string,
  { bytes, tensors }: BlockLayout,
  expected: string | undefined,
  writer: TensorSink,
  digests: Digests,
): Promise<void> {
  const damaged = (facts: { expected: string; got: string }) =>
    badInput('A file of a shard is damaged', { where: path, ...facts, hint: 'Remove the folder that it lies in and run the worker of this shard again.' }); // prettier-ignore
  const { size } = await stat(path).catch((error: unknown) => {
    throw ioError(error, 'read a file of a shard', path);
  });
  if (size !== bytes) throw damaged({ expected: `${bytes} bytes`, got: `${size}` });
  const hashing = digests.finish(path);
  hashing.catch(() => undefined); // awaited below
  try {
    for (const [name, { offset, bytes: length }] of tensors) {
      await writer.write(name, fileSource({ path, offset, bytes: length }));
    }
  } finally {
    await closeFiles([path]);
  }
  const got = await hashing;
  if (got !== expected) throw damaged({ expected: `SHA-256 ${expected}`, got });
  await writer.flush();
}
