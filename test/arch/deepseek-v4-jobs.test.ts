import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, test } from 'vitest';
import { generate } from '../../src/arch/generate.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { score } from '../../src/arch/score.js';
import type { JobEnv } from '../../src/backend/env.js';
import { quantize, type QuantizeOptions } from '../../src/quant/run.js';
import { defaultRecipe } from '../../src/quant/scheme.js';
import { runValidate } from '../../src/validate/run.js';
import { refusal } from '../support/refusal.js';
import { hashesOf, quantizeInShards } from '../support/shards.js';
import { archCase, fixture, testEnv } from './support.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'v4-'));
afterAll(() => rmSync(work, { recursive: true }));

/** The tiny model with a tokenizer of one token a character, and a drafting layer. */
function model(): string {
  const drafted = { dtype: 'BF16', shape: [4], data: Uint8Array.of(1, 2, 3, 4, 5, 6, 7, 8) };
  const folder = archCase('deepseek_v4', { tensors: (t) => t.set('mtp.0.enorm.weight', drafted) });
  const characters = [..." etaoinshrdlucmfwypvbgkqjxzETAOINSHRDLUCMFWYPVBGKQJXZ.,;:!?'012345"].slice(0, 64);
  const tokenizer = {
    version: '1.0',
    ...{ truncation: null, padding: null, added_tokens: [], normalizer: null, post_processor: null },
    pre_tokenizer: { type: 'Split', pattern: { Regex: '.' }, behavior: 'Isolated', invert: false },
    decoder: { type: 'Fuse' },
    model: { type: 'WordLevel', vocab: Object.fromEntries(characters.map((c, i) => [c, i])), unk_token: ' ' },
  };
  writeFileSync(join(folder, 'tokenizer.json'), JSON.stringify(tokenizer));
  return folder;
}

const path = model();
const texts = [fixture('samples.jsonl')];
const options = (name: string): QuantizeOptions => ({
  input: path,
  out: join(work, name),
  recipe: { ...defaultRecipe, groupSize: 32 },
  formats: ['compressed-tensors'],
  scope: 'all',
  calibration: { source: texts, samples: 8, seqLen: 40, seed: 1 },
  batchRows: 3,
  tool: { name: 'deepseek-convert', version: 'test' },
  commandLine: 'test',
});
const job = (name: string, on: JobEnv) => quantize(options(name), on);
const hashes = (name: string) =>
  Object.fromEntries(
    readdirSync(join(work, name))
      .filter((file) => file !== 'deepseek-convert.json') // has times in it
      .map((file) => [file, createHash('sha256').update(readFileSync(join(work, name, file))).digest('hex')]),
  ); // prettier-ignore

test('quantizes block by block, goes on after a stop with the same bytes, carries the rest', async () => {
  const whole = await job('whole', env);
  expect(whole.plan.totals).toMatchObject({ quantized: 78, left: 21 });
  for (const { linears } of whole.blocks)
    for (const { error, plainError } of linears) expect(error).toBeLessThan(plainError * 1.001);

  const stop = new AbortController();
  const log = { ...env.log, progress: ({ done }: { done: number }) => done === 2 && stop.abort() };
  expect((await refusal(job('stopped', { ...env, log, signal: stop.signal }))).kind).toBe('interrupted');
  const resumed = await job('stopped', env);
  expect(resumed.resumed).toBe(true);
  expect(hashes('stopped')).toEqual(hashes('whole'));

  const [source, made] = [await openModel(path), await openModel(join(work, 'whole'))];
  const bytes = (open: typeof source, name: string) => {
    const { span } = open.checkpoint.tensors.get(name)!;
    return readFileSync(span.path).subarray(span.offset, span.offset + span.bytes);
  };
  for (const name of ['mtp.0.enorm.weight', 'model.layers.2.ffn.gate.tid2eid', 'model.layers.0.hc_attn_fn', 'model.layers.1.attn.wo_a.weight'])
    expect(bytes(made, name)).toEqual(bytes(source, name)); // prettier-ignore
  expect(made.coverage.carried).toEqual(['mtp.0.enorm.weight']);
  expect(made.coverage.claimed).toHaveLength(source.coverage.claimed.length);
  await source.close();
  await made.close();
});

test('is quantized in shards as by one process', async () => {
  const whole = await quantize({ ...options('independent'), independentBlocks: true }, env);
  const merged = await quantizeInShards(options('sharded'), 3, env);
  expect(hashesOf(merged.out)).toEqual(hashesOf(whole.out));
  expect(hashesOf(merged.out)['model.safetensors']).not.toBe(hashes('whole')['model.safetensors']);
});

test('validates: the quantized model is near its source, which is itself', async () => {
  const options = { reference: path, texts, samples: 4, seqLen: 48, generations: 0, resamples: 100 };
  const same = await runValidate({ ...options, candidate: path }, env);
  expect(same.logits.kl.mean).toBe(0);
  expect(same.layers).toHaveLength(4);
  const near = await runValidate({ ...options, candidate: join(work, 'whole') }, env);
  expect(near.logits.kl.mean).toBeGreaterThan(0);
  expect(near.logits.kl.mean).toBeLessThan(0.2);
  // Experts of the first and third layer are looked up: the same ones, whatever the weights.
  const agreement = near.routing!.layers.map(({ agreement: a }) => a!.freeRunning);
  expect([agreement[0], agreement[2]]).toEqual([1, 1]);
});

test('scores and continues text as one sequence and token by token alike', async () => {
  const open = await openModel(join(work, 'whole'));
  using resident = await ResidentModel.load(open, env, 'f32');
  const prompt = Int32Array.from({ length: 11 }, (_, i) => (i * 7 + 3) % 60);
  const [text] = await generate(resident, env, [prompt], { maxNewTokens: 40, seed: 2, stopIds: [] });
  const all = Int32Array.of(...prompt, ...text!.tokens);
  const { logprobs } = await score(open, env, all);
  text!.logprobs.forEach((logprob, i) => expect(logprob).toBeCloseTo(logprobs[11 + i]!, 4));
  await open.close();
});
