import { createHash } from 'node:crypto';
import { readFileSync, readdirSync, statSync } from 'node:fs';
import { join } from 'node:path';
import type { JobEnv } from '../../src/backend/env.js';
import type { QuantizeOptions, QuantizeResult } from '../../src/quant/options.js';
import { readPlan } from '../../src/quant/shards/files.js';
import { mergeShards } from '../../src/quant/shards/merge.js';
import { planShards } from '../../src/quant/shards/plan.js';
import { runShard } from '../../src/quant/shards/worker.js';

/** One quantization through plan, all workers (the last shard first) and merge, as their commands call them. */
export async function quantizeInShards(options: QuantizeOptions, shards: number, env: JobEnv): Promise<QuantizeResult> {
  const { folder } = await planShards({ options, shards, given: {} }, env);
  for (let shard = shards - 1; shard >= 0; shard--) {
    await runShard(await readPlan(folder), { shard, of: shards }, options, env);
  }
  return await mergeShards(await readPlan(folder), options, env);
}

/** SHA-256 of every file of an output, the provenance among them. */
export function hashesOf(out: string): Record<string, string> {
  const isFolder = statSync(out).isDirectory();
  const names = isFolder ? readdirSync(out, { recursive: true, encoding: 'utf8' }).sort() : [''];
  const files = names.filter((name) => statSync(join(out, name)).isFile());
  return Object.fromEntries(
    files.map((name) => [
      name,
      createHash('sha256')
        .update(readFileSync(join(out, name)))
        .digest('hex'),
    ]),
  );
}
