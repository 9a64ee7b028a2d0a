import {
  appendFileSync,
  cpSync,
  existsSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it, test } from 'vitest';
import type { JobEnv } from '../../../src/backend/env.js';
import { ConvertError } from '../../../src/base/errors.js';
import { FileLock } from '../../../src/base/lock.js';
import { quantize, type QuantizeOptions } from '../../../src/quant/run.js';
import { defaultRecipe } from '../../../src/quant/scheme.js';
import { readPlan } from '../../../src/quant/shards/files.js';
import { mergeShards } from '../../../src/quant/shards/merge.js';
import { planShards } from '../../../src/quant/shards/plan.js';
import { balanced } from '../../../src/quant/shards/ranges.js';
import { runShard } from '../../../src/quant/shards/worker.js';
import { fixture, testEnv } from '../../arch/support.js';
import { refusal } from '../../support/refusal.js';
import { hashesOf, quantizeInShards } from '../../support/shards.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'deepseek-convert-shards-'));
afterAll(() => rmSync(work, { recursive: true }));

/** Quick: what is looked for is not quality. */
const recipe = { ...defaultRecipe, search: { ...defaultRecipe.search, points: 3 }, refine: { rounds: 0, passes: 0 } };
const job = (name: string, more: Partial<QuantizeOptions> = {}): QuantizeOptions => ({
  input: fixture('v1.0/v1.0_checkpoint.bin'),
  out: join(work, name),
  recipe,
  formats: ['compressed-tensors'],
  calibration: { source: [fixture('samples.jsonl')], samples: 4, seqLen: 64, seed: 0 },
  batchRows: 3,
  independentBlocks: true,
  tool: { name: 'deepseek-convert', version: '0.0.0' },
  commandLine: 'deepseek-convert quantize',
  ...more,
});
const dense: Partial<QuantizeOptions> = {};
const moe: Partial<QuantizeOptions> = { input: fixture('moe-6m'), maxUncovered: 1 };

test('shards are runs of blocks whose heaviest is as light as can be', () => {
  const lightest = (weights: readonly number[], n: number): number => {
    const sum = weights.reduce((a, b) => a + b, 0);
    if (n === 1) return sum;
    const heads = weights.slice(0, weights.length - n + 1).map((_, i) => weights.slice(0, i + 1));
    return Math.min(...heads.map((head) => Math.max(head.reduce((a, b) => a + b, 0), lightest(weights.slice(head.length), n - 1)))); // prettier-ignore
  };
  for (const weights of [[1, 1, 1, 1], [9, 1, 1, 1, 1], [1, 1, 50, 50, 50, 50], [3, 0, 0, 2, 7, 1, 4]]) {
    for (let n = 1; n <= weights.length; n++) {
      const ranges = balanced(weights, n);
      expect(ranges.flatMap(({ from, to }) => weights.slice(from, to))).toEqual(weights);
      expect(ranges.every(({ from, to }) => to > from)).toBe(true);
      const heaviest = Math.max(...ranges.map(({ from, to }) => weights.slice(from, to).reduce((a, b) => a + b, 0)));
      expect(heaviest, `${weights.join()} in ${n}`).toBe(lightest(weights, n));
    }
  } // prettier-ignore
});

describe('plan, worker, merge make the bytes of one process', () => {
  it.each<[string, number, Partial<QuantizeOptions>]>([
    ['dense', 4, dense],
    ['every format', 3, { formats: ['compressed-tensors', 'gptq', 'awq', 'onnx', 'gguf', 'safetensors', 'imatrix'], recipe: { ...recipe, blocks: 'q4_0' } }],
    ['chosen bits, folded norms', 2, { recipe: { ...recipe, method: 'awq-gptq', targetBpw: 4.5 }, states: 'f32', calibration: { source: [fixture('samples.jsonl')], samples: 2, seqLen: 32, seed: 0 } }],
    ['rounding without text', 4, { recipe: { ...recipe, method: 'rtn' } }],
    ['experts', 4, moe],
    ['experts.gguf', 2, { ...moe, formats: ['gguf'], recipe: { ...recipe, blocks: 'q4_k' }, calibrateAllExperts: true }],
  ])('%s, %d shards', async (name, shards, more) => {
    const without = name.startsWith('rounding') ? ({ calibration: _, ...rest }: QuantizeOptions) => rest : (all: QuantizeOptions) => all;
    const whole = await quantize(without(job(`whole ${name}`, more)), env);
    const merged = await quantizeInShards(without(job(`shards ${name}`, more)), shards, env);
    expect(hashesOf(merged.out)).toEqual(hashesOf(whole.out));
    expect(merged.verified).toBe(whole.verified);
    expect(existsSync(`${merged.out}.part`)).toBe(false);
  }); // prettier-ignore

  it('which are other ones than those of blocks that feel each other', async () => {
    const { independentBlocks: _, ...options } = job('propagated');
    const made = hashesOf((await quantize(options, env)).out);
    expect(made['model.safetensors']).not.toBe(hashesOf(join(work, 'whole dense'))['model.safetensors']);
  });
});

describe('a plan', () => {
  const of = 3;
  const options = job('planned');
  const folder = `${options.out}.part`;
  const path = (...names: string[]): string => join(folder, ...names);
  const plan = (on: JobEnv = env, more: Partial<QuantizeOptions> = {}, shards = of) => planShards({ options: { ...options, ...more }, shards, given: { samples: 8 } }, on); // prettier-ignore
  const worker = async (shard: number, on = env) => runShard(await readPlan(folder), { shard, of }, options, on);
  const merge = async () => mergeShards(await readPlan(folder), options, env);
  /** Fails when the first block is done. */
  const failing = (): JobEnv => {
    const progress = () => {
      throw new ConvertError('resource', 'failed here');
    };
    return { ...env, log: { ...env.log, progress } };
  };
  /** With a file as it should not be; it is as before afterwards. */
  const spoiled = async <T>(file: string, change: (text: string) => string, then: () => Promise<T>): Promise<T> => {
    const before = readFileSync(file);
    writeFileSync(file, change(before.toString('latin1')), 'latin1');
    try {
      return await then();
    } finally {
      writeFileSync(file, before);
    }
  };

  beforeAll(async () => {
    expect((await refusal(plan(env, {}, 5))).message).toMatch(/expected at most 4, got 5/);
    // Stopped in the middle of the capture, it goes on.
    expect((await refusal(plan(failing()))).message).toBe('failed here');
    expect(existsSync(path('shards'))).toBe(false);
    const { shards } = await plan();
    expect(shards.map(({ blocks, done }) => [...blocks, done])).toEqual([[0, 0, false], [1, 1, false], [2, 3, false]]); // prettier-ignore
    expect(readdirSync(path('state')).sort()).toEqual(['hidden-0.bin', 'hidden-1.bin']);
  });

  it('is said once more by the same command, and refused to another', async () => {
    const before = readFileSync(path('shards/plan.json'));
    await plan();
    expect(readFileSync(path('shards/plan.json'))).toEqual(before);
    expect((await refusal(plan(env, {}, 2))).message).toContain('shards: 3 -> 2');
    expect((await refusal(plan(env, { maxUncovered: 1, recipe: { ...recipe, damp: 0.1 } }))).message).toContain('recipe.damp: 0.01 -> 0.1'); // prettier-ignore
    const { independentBlocks: _, ...alone } = options;
    expect((await refusal(quantize(alone, env))).message).toContain('shards: 3 -> (none)');
  });

  it('refuses workers with another count, with other options, on changed files', async () => {
    const plan = await readPlan(folder);
    expect((await refusal(runShard(plan, { shard: 0, of: 4 }, options, env))).message).toContain(
      'expected --shard 0/3',
    );
    const other = { ...options, recipe: { ...recipe, groupSize: 64 } };
    expect((await refusal(runShard(plan, { shard: 0, of }, other, env))).message).toMatch(/groupSize: 128 -> 64/);
    expect((await refusal(spoiled(path('shards/plan.json'), (text) => text.replace('"samples": 8', '"samples": 9'), () => worker(0)))).message).toContain('checksum'); // prettier-ignore
    expect((await refusal(spoiled(path('shards/plan.json'), (text) => text.replace('"version": 1', '"version": 2'), () => worker(0)))).message).toContain('another version'); // prettier-ignore
    expect((await refusal(spoiled(path('shards/tokens.bin'), (text) => `${text.slice(0, -1)}!`, () => worker(0)))).message).toContain('not those of the plan'); // prettier-ignore
    expect((await refusal(spoiled(path('state/hidden-0.bin'), (text) => `${text.slice(0, -1)}!`, () => worker(1)))).message).toContain('not those of the plan'); // prettier-ignore
    expect((await refusal(readPlan(join(work, 'nothing.part')))).message).toContain('no plan');
    expect((await refusal(readPlan(work))).message).toContain('<out>.part');
    const link = path('shards/0');
    symlinkSync(work, link);
    expect((await refusal(worker(0))).message).toContain('must have no links in it');
    rmSync(link);
    expect(existsSync(path('shards/0.part'))).toBe(false);
  });

  it('refuses a twin of a worker, and lets go one that was taken over', async () => {
    expect((await refusal(worker(2, failing()))).message).toBe('failed here');
    const lock = await FileLock.take(path('shards/2.part/lock'), 'It');
    const twin = await refusal(worker(2));
    expect(twin.message).toMatch(/Shard 2 of 3 is in use \(.*2\.part\/lock\).*process \d+ on .*, for \d+ s/);
    await expect(refusal(plan(env, { restart: true }))).resolves.toMatchObject({ message: expect.stringContaining('still solves a shard') as string }); // prettier-ignore
    await lock.release();
    // Somebody else's lock from now on: the block under way is not marked.
    const log = { ...env.log, progress: () => writeFileSync(path('shards/2.part/lock'), '{}') };
    const before = readdirSync(path('shards/2.part/steps'));
    const taken = await refusal(worker(2, { ...env, log }));
    expect(taken.message).toContain('taken over by another process');
    expect(readdirSync(path('shards/2.part/steps')).length - before.length).toBeLessThanOrEqual(1);
    expect(existsSync(path('shards/2'))).toBe(false);
    rmSync(path('shards/2.part/lock'));
  });

  it('merges when all shards are there, whole and its own', async () => {
    await worker(1);
    expect((await worker(1)).before).toBe(true);
    const error = await refusal(merge());
    expect(error.message).toMatch(/2 of 3 shards are missing.*no shard 0, 2/);
    expect(error.facts.hint).toContain('--shard 2/3');
    await worker(0);
    // Left by a worker that was killed while it wrote a block.
    appendFileSync(path('shards/2.part/output/.compressed-tensors-3.bin.17.tmp'), 'half');
    expect((await worker(2)).resumed).toBe(true);
    expect(readdirSync(path('shards/2'))).toEqual([
      'compressed-tensors-2.bin',
      'compressed-tensors-3.bin',
      'shard.json',
    ]);
    const block = path('shards/2/compressed-tensors-3.bin');
    expect((await refusal(spoiled(block, (text) => text.slice(1), merge))).message).toMatch(
      /damaged.*expected \d+ bytes/,
    );
    expect((await refusal(spoiled(block, (text) => `${text.slice(0, -1)}!`, merge))).message).toMatch(
      /damaged.*SHA-256/,
    );
    expect((await refusal(spoiled(path('shards/2/shard.json'), (text) => text.replace('"tokens": 256', '"tokens": 257'), merge))).message).toContain('checksum'); // prettier-ignore
    // A shard of another plan of the same model.
    const foreign = job('foreign', { commandLine: 'other', calibration: { ...options.calibration!, seed: 1 } });
    await planShards({ options: foreign, shards: of, given: {} }, env);
    await runShard(await readPlan(`${foreign.out}.part`), { shard: 0, of }, foreign, env);
    const own = path('shards/0');
    cpSync(own, join(work, 'aside'), { recursive: true });
    rmSync(own, { recursive: true });
    cpSync(join(`${foreign.out}.part`, 'shards/0'), own, { recursive: true });
    expect((await refusal(merge())).message).toContain('belongs to another plan');
    rmSync(own, { recursive: true });
    cpSync(join(work, 'aside'), own, { recursive: true });
    expect((await merge()).resumed).toBe(true);
    expect(hashesOf(options.out)).toEqual(hashesOf(join(work, 'whole dense')));
    expect(existsSync(folder)).toBe(false);
  });

  it('counts experts without tokens over all shards', async () => {
    const few = job('starved', {
      ...moe,
      calibration: { source: [fixture('samples.jsonl')], samples: 1, seqLen: 2, seed: 0 },
    });
    const alone = await quantize({ ...few, out: join(work, 'starved alone') }, env);
    const share = (uncovered: number) =>
      uncovered / alone.blocks.reduce((sum, { coverage }) => sum + (coverage?.experts ?? 0), 0);
    const byBlock = alone.blocks.map(({ coverage }) => share(coverage?.uncovered ?? 0));
    const [most, all] = [Math.max(...byBlock), byBlock.reduce((a, b) => a + b, 0)];
    expect(all).toBeGreaterThan(most);
    const bounded = { ...few, maxUncovered: (most + all) / 2 };
    const error = await refusal(quantizeInShards(bounded, 4, env));
    expect([error.kind, error.message]).toEqual(['gate', expect.stringContaining('saw no calibration token')]);
    expect((await refusal(quantize({ ...bounded, out: join(work, 'refused') }, env))).message).toBe(error.message);
  });
});
