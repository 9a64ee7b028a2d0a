import { cpSync, existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openModel, type OpenModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import { vocabularyTensors, withVocabulary } from '../../../src/arch/vocabulary.js';
import { WeightReader } from '../../../src/arch/weights.js';
import { readJsonFile } from '../../../src/base/files.js';
import { planRows } from '../../../src/export/remap/rows.js';
import { remapModel, type RemapOptions } from '../../../src/export/remap/run.js';
import { trainTokenizer } from '../../../src/export/train-tokenizer.js';
import { forwardContext } from '../../../src/arch/context.js';
import { run } from '../../../src/nn/run.js';
import { gather } from '../../../src/tensor/ops.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { loadTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { specialTokens } from '../../../src/tokenizer/tokenizer-files.js';
import { archCase, fixture, relativeError, testEnv, trainedModel } from '../../arch/support.js';

const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'remap-'));
afterAll(() => rmSync(folder, { recursive: true }));
const root = join(import.meta.dirname, '../../..');
const english = join(root, 'calibration/english.jsonl');
const text = 'The old man walked along the river, and nobody knew where he went. 你好，世界！\n'.repeat(3);
const newTokenizer = join(folder, 'tokenizer');

const options = (name: string, input: string, more: Partial<RemapOptions> = {}): RemapOptions => ({
  ...{ input, tokenizer: newTokenizer, out: join(folder, name), overwrite: false, restart: false, multiple: 1 },
  ...{ shardSize: 5e9, texts: [{ name: 'text', text }], maxTokens: 64, recipe: null, resumeHint: '' },
  ...more,
});

beforeAll(async () => {
  // Other ids for the special tokens, one of them under another name, and one that nobody knows.
  const names = { bos: '<|begin_of_sentence|>', eos: '<end>', pad: '<|pad|>' };
  const special = specialTokens(names, ['<tool call>'], 0);
  const settings = { vocabSize: 1500, minFrequency: 2, preTokenizer: 'llama3', addBos: true, bpeDropout: 0.1 } as const;
  await trainTokenizer({ texts: [english], out: newTokenizer, overwrite: false, special, recipe: null, ...settings }, env); // prettier-ignore
});

/** States behind the last block, and the logits of some tokens alone: a product with other columns sums otherwise. */
async function predict(open: OpenModel, tokens: Int32Array, columns: Int32Array) {
  using scope = new Scope(env.device);
  const { model } = open;
  using resident = await ResidentModel.load(open, env, 'f32');
  const outer = await new WeightReader(open, env.device, 'f32').outer(scope, 'head');
  const head = `${model.head.name}.weight`;
  const some = gather(scope, outer.get(head), scope.from('i32', [columns.length], columns));
  const weights = { ...stubs, get: (name: string) => (name === head ? some : outer.get(name)) };
  const states = resident.hidden(scope, tokens, 1);
  const ctx = forwardContext(scope, model, weights, 1, tokens.length);
  const logits = await run(model.logits(states, ctx), ctx).float32();
  return { states: await states.float32(), logits, all: await resident.logits(scope, states).float32() };
}
const never = (): never => {
  throw new Error('not part of a head');
};
const stubs = { has: () => true, stack: never, set: never, table: never };

const models = [
  ['tied, one PyTorch file', 'v1.0', 'v1.0_checkpoint.bin', { bos: 0, eos: 1, pad: 2 }],
  ['untied, experts', 'moe-6m', '', { bos: 0, eos: 1, pad: 2 }],
  ['in the spelling of SentencePiece', 'stories260k', '', { bos: 1, eos: 2 }],
] as const;
describe.each(models)('remap: %s', (_, name, file, roles) => {
  const path = trainedModel(name, file);
  it.skipIf(!path)('tokens that both know keep their logits exactly; new ones are means of their pieces', async () => {
    const report = await remapModel(options(name, path!, { multiple: 64 }), env);
    const [before, after] = [await openModel(path!), await openModel(join(folder, name))];
    const [old, next] = [await before.tokenizer(), await after.tokenizer()];
    const { counts, exact, pieces, newIds, size } = await planRows({ tokenizer: old, roles }, { tokenizer: next, roles: { bos: 1, eos: 2, pad: 0 } }, 64); // prettier-ignore
    expect(size).toBe(1536);
    expect(after.model.vocab).toBe(1536);
    expect(report.rows).toEqual(counts);
    expect(counts.shared + counts.renamed + counts.averaged + counts.mean).toBe(1536);
    expect(counts.mean).toBeGreaterThanOrEqual(36);
    expect(counts.renamed).toBe(name === 'stories260k' ? 2 : 1);
    expect(counts.shared).toBeGreaterThan(name === 'stories260k' ? 250 : 1000);

    // The old tokenizer's text, as far as the new one knows its tokens.
    const ids = (await old.encode(text)).filter((id) => newIds.has(id)).subarray(0, 40);
    expect(ids.length).toBeGreaterThan(15);
    const known = [Int32Array.from(newIds.keys()), Int32Array.from(newIds.values())] as const;
    const was = await predict(before, ids, known[0]);
    const is = await predict(after, ids.map((id) => newIds.get(id)!), known[1]); // prettier-ignore
    expect(is.states).toEqual(was.states);
    expect(is.logits).toEqual(was.logits);
    // And among all others the same but for the order of the sums.
    const [first, second] = [known[0], known[1]].map((own, i) => Float32Array.from(own, (id) => (i === 0 ? was : is).all[id]!)); // prettier-ignore
    expect(relativeError(second!, first!)).toBeLessThan(1e-5);

    using scope = new Scope(env.device);
    for (const tensor of [before.model.embedding, `${before.model.head.name}.weight`]) {
      const [x, y] = [await rows(before, tensor, scope), await rows(after, tensor, scope)];
      let checked = 0;
      for (const [id, own] of [...pieces].slice(0, 40)) {
        for (let c = 0; c < x.columns; c += 7) {
          const mean = own.reduce((sum, piece) => sum + x.at(piece, c), 0) / own.length;
          // bf16 has 8 bits.
          expect(Math.abs(y.at(id, c) - mean)).toBeLessThanOrEqual(Math.abs(mean) / 256 + 1e-7);
          checked++;
        }
      }
      expect(checked).toBeGreaterThan(100);
    }
    expect(exact[next.id('<|pad|>')!]).toBe(name === 'stories260k' ? -1 : old.id('<|pad|>'));

    expect(after.model.config).toMatchObject({ vocab_size: 1536, bos_token_id: 1, eos_token_id: 2 });
    expect(next.hash).toBe((await loadTokenizer(newTokenizer)).hash);
    const { prediction } = report;
    for (const side of [prediction.before, prediction.after]) expect(Number.isFinite(side.perplexity)).toBe(true);
    expect(prediction.after.bitsPerByte).toBeGreaterThan(prediction.before.bitsPerByte);
    expect(await readJsonFile(join(folder, name, 'deepseek-convert.json'))).toMatchObject({
      remap: { rows: report.rows },
      validation: prediction,
    });
    await before.close();
    await after.close();
  }, 60_000); // prettier-ignore
});

async function rows(open: OpenModel, name: string, scope: Scope) {
  const tensor = await new WeightReader(open, env.device, 'f32').tensor(name, scope);
  const values = await tensor.float32();
  const columns = tensor.dim(1);
  return { columns, at: (row: number, column: number) => values[row * columns + column]! };
}

describe('remap', () => {
  it('to the same tokenizer gives the same weights', async () => {
    const input = fixture('moe-6m');
    const { rows: counts } = await remapModel(options('same', input, { tokenizer: input }), env);
    expect(counts).toEqual({ shared: 8192, renamed: 0, averaged: 0, mean: 0 });
    expect(readFileSync(join(folder, 'same/model.safetensors')).equals(readFileSync(join(input, 'model.safetensors')))).toBe(true); // prettier-ignore
  });

  it('interrupted, the same call goes on and ends with the same bytes', async () => {
    const input = fixture('v1.0', 'v1.0_checkpoint.bin');
    const file = (name: string) => join(folder, name, 'model.safetensors');
    const stop = new AbortController();
    const progress = ({ stage, done }: { stage: string; done: number }) => {
      if (stage === 'remap' && done === 7) stop.abort();
    };
    const stopped = { ...env, log: { ...env.log, progress }, signal: stop.signal };
    await expect(remapModel(options('later', input), stopped)).rejects.toMatchObject({ kind: 'interrupted' });
    expect(existsSync(file('later'))).toBe(false);
    let seen = 0;
    const counting = { ...env.log, progress: ({ stage }: { stage: string }) => void (stage === 'score' && seen++) };
    const { prediction } = await remapModel(options('later', input), { ...env, log: counting });
    await remapModel(options('at-once', input), env);
    expect(readFileSync(file('later')).equals(readFileSync(file('at-once')))).toBe(true);
    // What the input makes of the text was known; of the output it is measured.
    const out = await openModel(join(folder, 'later'));
    expect(seen).toBe(out.model.blocks.length + 1);
    await out.close();
    expect(prediction.before.perplexity).toBeGreaterThan(1);
    expect(readdirSync(folder).filter((name) => name.endsWith('.part'))).toEqual([]);
  });

  it('writes a PyTorch file with a tied head, and one file of safetensors, from a lone tokenizer.json', async () => {
    const input = fixture('v1.0', 'v1.0_checkpoint.bin');
    const tokenizer = join(folder, 'mine.json');
    cpSync(join(newTokenizer, 'tokenizer.json'), tokenizer);
    for (const name of ['one.bin', 'one.safetensors']) {
      const out = join(folder, name.replace('.', '-'), name);
      mkdirSync(dirname(out));
      await remapModel(options('', input, { tokenizer, out }), env);
      const open = await openModel(out);
      expect(open.model).toMatchObject({ vocab: 1500, tied: true });
      expect((await open.tokenizer()).vocabSize).toBe(1500);
      await open.close();
    }
  });

  it('refuses a tokenizer that the embedding has no rows for, and leaves nothing behind', async () => {
    const copy = join(folder, 'mismatched');
    cpSync(fixture('moe-6m'), copy, { recursive: true });
    const json = JSON.parse(readFileSync(join(copy, 'tokenizer.json'), 'utf8')) as { added_tokens: object[] };
    json.added_tokens.push({ ...json.added_tokens[0], id: 8192, content: '<more>' });
    writeFileSync(join(copy, 'tokenizer.json'), JSON.stringify(json));
    await expect(remapModel(options('none', copy), env)).rejects.toThrow(/more tokens than its embedding has rows.*expected at most 8192.*got 8193/s); // prettier-ignore
    expect(readdirSync(folder).filter((name) => name.startsWith('none'))).toEqual([]);
  });
});

describe('tensors with a row for each token', () => {
  const cases = readdirSync(fixture('arch'), { withFileTypes: true }).filter((entry) => entry.isDirectory());
  it.each(cases.map(({ name }) => name))('%s', async (name) => {
    const open = await openModel(archCase(name));
    const { model, tensors } = open;
    if (model.blocks.some((block) => block.tensors.some(({ below }) => below !== undefined))) {
      expect(() => vocabularyTensors(open)).toThrow(/table with an entry for each token/);
    } else {
      const found = vocabularyTensors(open).map((tensor) => tensor.name);
      expect(found).toContain(model.embedding);
      expect(found).toContain(`${model.head.name}.weight`);
      const others = [...tensors.values()].filter((tensor) => !found.includes(tensor.name) && /embed_tokens|lm_head|shared_head\.head/.test(tensor.name)); // prettier-ignore
      expect(others.map((tensor) => tensor.name)).toEqual([]);
    }
    await open.close();
  });

  it('config: sizes, ids by role, ids of sections; an id that is needed', () => {
    const config = { vocab_size: 10, eos_token_id: [1, 2, 1], pad_token_id: 9, bos_token_id: null, text_config: { vocab_size: 10, eos_token_id: 2 } }; // prettier-ignore
    const idOf = (_: string, id: number, alone: boolean) => (id === 9 ? undefined : alone ? id + 100 : id + 50);
    expect(withVocabulary(config, { from: 10, to: 20 }, idOf)).toEqual({
      ...{ vocab_size: 20, eos_token_id: [51, 52], pad_token_id: null, bos_token_id: null },
      text_config: { vocab_size: 20, eos_token_id: 102 },
    });
    expect(() => withVocabulary({ image_token_id: 9 }, { from: 10, to: 20 }, idOf)).toThrow(/lacks a token.*image_token_id: 9/); // prettier-ignore
  });
});
