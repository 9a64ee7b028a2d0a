import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { loadNative } from '../../../src/backend/native.js';
import { silentLog } from '../../../src/base/log.js';
import { trainBpe, type BpeOptions } from '../../../src/tokenizer/bpe-train.js';
import { makeTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { specialTokens, tokenizerFiles } from '../../../src/tokenizer/tokenizer-files.js';
import { textLines } from '../../../src/tokenizer/train-text.js';
import { fixture } from '../../arch/support.js';

interface Case extends BpeOptions {
  readonly texts: 'odd' | 'calibration';
  readonly merges: number;
  readonly firstMerges: string[];
  readonly mergesSha256: string;
  readonly vocabSha256: string;
  readonly tokens: number;
  readonly idsSha256: string;
}
const { cases } = JSON.parse(readFileSync(fixture('tokenizer', 'bpe.json'), 'utf8')) as { cases: Case[] };
const root = join(import.meta.dirname, '../../..');
const texts = {
  odd: readFileSync(fixture('tokenizer', 'odd.txt'), 'utf8'),
  calibration: ['english', 'chinese', 'code', 'dialogue'].map((name) => readFileSync(join(root, 'calibration', `${name}.jsonl`), 'utf8')).join(''),
}; // prettier-ignore
const folder = mkdtempSync(join(tmpdir(), 'bpe-'));
afterAll(() => rmSync(folder, { recursive: true }));
const sha = (lines: readonly unknown[]) => createHash('sha256').update(lines.join('\n')).digest('hex');
const env = { log: silentLog, signal: new AbortController().signal };

async function* parts(...given: (string | Uint8Array)[]) {
  for (const part of given) yield { bytes: Buffer.from(part as string), path: 'text', offset: 0 };
}
const learn = (text: AsyncIterable<{ bytes: Uint8Array; path: string; offset: number }>, options: Partial<BpeOptions>) =>
  trainBpe(loadNative().BpeTrainer, text, { vocabSize: 400, minFrequency: 0, special: [], preTokenizer: 'llama3', ...options }, env); // prettier-ignore
const named = (one: Case) =>
  [`${one.texts}, ${one.preTokenizer} ${one.digits ?? ''}, ${one.vocabSize} tokens, at least ${one.minFrequency}`, one] as const; // prettier-ignore

describe('byte-level BPE: what the Hugging Face tokenizers library trains on the same text', () => {
  it.each(cases.map(named))('%s', async (_, one) => {
    const text = texts[one.texts];
    const bpe = await learn(parts(text), one);
    const merges = bpe.merges.map((merge) => merge.join(' '));
    expect(merges.slice(0, 8)).toEqual(one.firstMerges);
    expect(merges.length).toBe(one.merges);
    expect(sha(merges)).toBe(one.mergesSha256);
    expect(sha(bpe.tokens)).toBe(one.vocabSha256);
    const special = specialTokens({ bos: undefined, eos: undefined, pad: undefined }, one.special, undefined);
    const files = tokenizerFiles(bpe, { ...one, special, addBos: false });
    const json = JSON.parse(files.get('tokenizer.json')!) as { added_tokens: unknown };
    // The library's own trained tokenizer has them as added tokens; in odd.txt they are words too.
    const tokenizer = await makeTokenizer(JSON.stringify(json), 'trained');
    const ids = await tokenizer.encode(text);
    expect(sha([...ids])).toBe(one.idsSha256);
    expect(await tokenizer.decode(ids, { special: true })).toBe(text);
  });

  it('does not depend on how the text comes in: all at once (on several threads), or in parts', async () => {
    const whole = texts.calibration.repeat(6);
    const lines = whole.split(/(?<=\n)/);
    const cut = [0, 7, 200, lines.length].map((to, i, all) => lines.slice(all[i - 1] ?? 0, to).join(''));
    const small = lines.map((_, i) => (i % 20 === 0 ? lines.slice(i, i + 20).join('') : ''));
    const options = { vocabSize: 2000, preTokenizer: 'deepseek-v3' } as const;
    const want = await learn(parts(...small), options);
    expect(Buffer.byteLength(whole)).toBeGreaterThan(2 ** 18);
    expect(await learn(parts(whole), options)).toEqual(want);
    expect(await learn(parts(...cut), options)).toEqual(want);
  });
});

describe('text files', () => {
  const file = (name: string, content: string | Uint8Array): string => {
    writeFileSync(join(folder, name), content);
    return join(folder, name);
  };
  it('gives .txt as it stands and of .jsonl the texts', async () => {
    const plain = file('a.txt', 'one\ntwo\nthree');
    const documents = file('a.jsonl', '{"text":"one\\ntwo\\n"}\n\n{"text":"three","kind":"x"}');
    const read = async (path: string) => {
      const found: string[] = [];
      for await (const { bytes } of textLines([path])) found.push(Buffer.from(bytes).toString());
      return found.join('');
    };
    expect(await read(plain)).toBe('one\ntwo\nthree');
    expect(await read(documents)).toBe('one\ntwo\nthree');
  });
  it.each([
    ['stray.txt', Buffer.from([0x61, 0x0a, 0x62, 0xff, 0x63]), /not UTF-8.*stray\.txt, byte 3/s],
    ['cut.txt', Buffer.from('ab\n中').subarray(0, 5), /not UTF-8.*cut\.txt, byte 3/s],
    ['long.txt', Buffer.from([0x61, 0xc0, 0x80]), /not UTF-8.*byte 1/s],
    ['surrogate.txt', Buffer.from([0xed, 0xa0, 0x80]), /not UTF-8.*byte 0/s],
    ['empty.txt', Buffer.alloc(0), /no text to learn from/],
    ['bad.jsonl', Buffer.from('{"text":"a"}\n{"text":'), /no JSON.*bad\.jsonl, the line at byte 13/s],
    ['odd.jsonl', Buffer.from('{"body":"a"}'), /has no text.*odd\.jsonl/s],
  ])('refuses %s', async (name, content, message) => {
    await expect(learn(textLines([file(name, content)]), {})).rejects.toThrow(message);
  });
  it('refuses a vocabulary without room for bytes and special tokens', async () => {
    await expect(learn(parts('a'), { vocabSize: 256, special: ['<s>'] })).rejects.toThrow(/--vocab-size has no room.*expected 257/); // prettier-ignore
  });
  it('ends when it is told to', async () => {
    const stop = new AbortController();
    const options = { vocabSize: 4000, minFrequency: 0, special: [], preTokenizer: 'gpt2' } as const;
    const run = trainBpe(loadNative().BpeTrainer, parts(texts.calibration), options, { ...env, signal: stop.signal });
    stop.abort();
    await expect(run).rejects.toMatchObject({ kind: 'interrupted' });
  });
});

describe('special tokens', () => {
  const three = { bos: '<b>', eos: '<e>', pad: '<p>' };
  it('stand in order, the padding token where it is wanted', () => {
    expect(specialTokens(three, ['<x>'], undefined).all).toEqual(['<b>', '<e>', '<p>', '<x>']);
    expect(specialTokens(three, ['<x>'], 0).all).toEqual(['<p>', '<b>', '<e>', '<x>']);
    expect(specialTokens({ ...three, pad: undefined }, [], 1)).toMatchObject({ pad: '<e>', all: ['<b>', '<e>'] });
    expect(() => specialTokens(three, [], 3)).toThrow(/--pad-id is no special token.*0 to 2/);
  });
});
