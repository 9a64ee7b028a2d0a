import { copyFileSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { loadTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { fixture, trainedModel } from '../../arch/support.js';
import { badInputMessage } from '../../support/refusal.js';

interface Row {
  plain: number[];
  special: number[];
  text: string;
  kept: string;
}
const want = JSON.parse(readFileSync(fixture('tokenizer', 'tokens.json'), 'utf8')) as {
  texts: string[];
  models: Record<string, Row[]>;
};
const folder = mkdtempSync(join(tmpdir(), 'tokenizer-'));
afterAll(() => rmSync(folder, { recursive: true }));

describe.each(Object.keys(want.models))('%s', (name) => {
  const path = trainedModel(name);
  test.skipIf(!path)('ids and texts are those of the library of Python', async () => {
    const tokenizer = await loadTokenizer(path!);
    const rows = want.models[name]!;
    for (const [i, text] of want.texts.entries()) {
      const { plain, special, text: decoded, kept } = rows[i]!;
      expect([...(await tokenizer.encode(text))]).toEqual(plain);
      expect([...(await tokenizer.encode(text, { special: true }))]).toEqual(special);
      expect(await tokenizer.decode(plain)).toBe(decoded);
      expect(await tokenizer.decode(Int32Array.from(plain), { special: true })).toBe(kept);
    }
    const all = await tokenizer.encodeAll(want.texts, { special: true });
    expect(all.map((ids) => [...ids])).toEqual(rows.map((row) => row.special));
  });
});

test('vocabulary, and a hash of the file', async () => {
  const tokenizer = await loadTokenizer(fixture('v1.0', 'tokenizer.json'));
  expect(tokenizer.vocabSize).toBe(8192);
  expect(tokenizer.token(0)).toBe('<|begin_of_sentence|>');
  expect(tokenizer.id('<|begin_of_sentence|>')).toBe(0);
  expect(tokenizer.token(8192)).toBeUndefined();
  expect(tokenizer.id('no such token')).toBeUndefined();
  expect(tokenizer.hash).toMatch(/^[0-9a-f]{64}$/);
});

test('truncation and padding that a file asks for do not cut or stretch texts', async () => {
  const json = JSON.parse(readFileSync(fixture('v1.0', 'tokenizer.json'), 'utf8')) as Record<string, unknown>;
  json.truncation = { direction: 'Right', max_length: 2, strategy: 'LongestFirst', stride: 0 };
  json.padding = {
    strategy: { Fixed: 64 },
    direction: 'Right',
    pad_to_multiple_of: null,
    pad_id: 2,
    pad_type_id: 0,
    pad_token: '<|pad|>',
  };
  writeFileSync(join(folder, 'cut.json'), JSON.stringify(json));
  const tokenizer = await loadTokenizer(join(folder, 'cut.json'));
  expect([...(await tokenizer.encode(want.texts[0]!))]).toEqual(want.models['v1.0']![0]!.plain);
});

test('what is no tokenizer is refused with its path', async () => {
  expect(await badInputMessage(loadTokenizer(join(folder, 'none')))).toMatch(/no tokenizer here.*none/s);
  expect(await badInputMessage(loadTokenizer(folder))).toMatch(/no tokenizer\.json/);
  writeFileSync(join(folder, 'bad.json'), '{"model": 1}');
  expect(await badInputMessage(loadTokenizer(join(folder, 'bad.json')))).toMatch(/cannot be read.*bad\.json/s);
  copyFileSync(join(folder, 'bad.json'), join(folder, 'tokenizer.model'));
  expect(await badInputMessage(loadTokenizer(folder))).toMatch(/tokenizer\.model is an older form/);
});
