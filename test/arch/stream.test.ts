import { mkdtemp, readFile, readdir, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { States } from '../../src/arch/states.js';
import { streamBlocks, type BlockVisitor } from '../../src/arch/stream.js';
import { WeightReader } from '../../src/arch/weights.js';
import { Job } from '../../src/base/job.js';
import { reduce } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture, testEnv } from './support.js';

const env = testEnv();
let folder = '';
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), 'deepseek-convert-stream-'));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

const [n, seqLen] = [5, 24];
const tokens = Int32Array.from({ length: n * seqLen }, (_, i) => (i * 131 + 7) % 8000);
const set = { tokens, n, seqLen, hash: 'x', description: '', notices: [] };

/** What a visitor sees at each site of each block: the sum of squares of each batch's input. */
async function walk(name: string, budget: number | undefined, stopBefore = Infinity): Promise<[string, number][]> {
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  const job = await Job.open({ out: join(folder, name), fingerprint: { test: 'stream' } });
  const seen: [string, number][] = [];
  const visitor: BlockVisitor = {
    async visit(site) {
      if (site.block.index >= stopBefore) throw new Error('stopped here');
      await site.each(async (call, batch) => {
        using scope = new Scope(env.device);
        const sum = await reduce(scope, 'sumsq', call.x.view(1, -1), 1).float32();
        seen.push([`${site.block.index}.${site.index} batch ${batch}`, sum[0]!]);
      });
    },
    finish: () => Promise.resolve({ data: null }),
  };
  try {
    const reader = new WeightReader(open, env.device, 'f32');
    const streamed = streamBlocks(
      { open, env, reader, set, dtype: 'f32', job, stage: 'test', batchRows: 2, ...(budget !== undefined && { budget }), resumeHint: '' },
      visitor,
    ); // prettier-ignore
    if (stopBefore === Infinity) await streamed;
    else await expect(streamed).rejects.toThrow('stopped here');
    const left = await readdir(join(folder, `${name}.part`, 'state'));
    const kept = left.includes('hidden-1.bin') ? (await readFile(job.statePath('hidden-1.bin'))).length : 0;
    expect(kept).toBe(stopBefore === Infinity ? 0 : n * seqLen * 256 * 4);
  } finally {
    await job.close();
    await open.close();
  }
  return seen;
}

test('blocks see the same whether batches are held, recomputed or read from the work folder, and after a stop', async () => {
  const held = await walk('held', undefined);
  expect(held.length).toBe(4 * 4 * 3); // blocks x sites (q/k/v, o, gate/up, down) x batches
  expect(new Set(held.map(([, sum]) => sum)).size).toBe(held.length);
  expect(await walk('recomputed', 3 * n * seqLen * 256 * 4)).toEqual(held);
  expect(await walk('read', 0)).toEqual(held);
  const first = await walk('stopped', 0, 2);
  expect([...first, ...(await walk('stopped', undefined))]).toEqual(held);
  const early = await walk('stopped-held', undefined, 2);
  expect([...early, ...(await walk('stopped-held', 0))]).toEqual(held);
});

test('cleaning up behind one block leaves alone what the next one writes', async () => {
  const path = (block: number | string): string => join(folder, `hidden-${block}.bin`);
  await using states = new States(env.device, { hidden: 4, dtype: 'f32', rows: [3, 3], resident: true, path });
  let behind: Promise<void> = Promise.resolve();
  for (let block = -1; block < 30; block++) {
    for (let b = 0; b < 2; b++) {
      using scope = new Scope(env.device);
      await states.put(b, scope.from('f32', [3, 4], new Float32Array(12).fill(block * 2 + b)), scope);
    }
    await states.next();
    await behind;
    if (block >= 0) behind = states.commit(block).then(() => states.forget(new Set([block])));
  }
  await behind;
  const values = new Float32Array((await readFile(path(29))).buffer);
  expect([values[0], values[12]]).toEqual([58, 59]);
  expect((await readdir(folder)).filter((name) => name.startsWith('hidden-'))).toEqual(['hidden-29.bin']);
});
