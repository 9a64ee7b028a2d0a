import { expect, describe, it } from 'vitest';
import { unsafeExpression } from '../../../src/tokenizer/expressions.js';
import { makeTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { badInputMessage } from '../../support/refusal.js';

/** Expressions of tokenizers that people use. */
const known = [
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
  "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
  "[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}]*[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}]+(?i:'s|'t|'re)?|[^\\r\\n\\p{L}\\p{N}]?[\\p{Lu}\\p{M}]+[\\p{Ll}\\p{M}]*(?i:'s)?|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n/]*|\\s*[\\r\\n]+",
  '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+',
  ' ?[^(\\s|[.,!?…。，、।۔،])]+',
  '\\d{1,3}(?=(?:\\d{3})*\\b)',
  '[一-龥぀-ゟ゠-ヿ]+',
  ' {2,}',
  '[\\p{Han}]+|[\\p{Lu}\\p{M}&&[^\\p{Han}]]*[\\p{Ll}\\p{M}&&[^\\p{Han}]]+(?i:s|t)?',
  '(?:\\r?\\n){1,3}(?!\\r?\\n)|[^\\r\\n]',
  '\\s?\\p{L}++|\\s+$',
];

describe('regular expressions of a tokenizer', () => {
  it.each(known)('taken: %s', (expression) => {
    expect(unsafeExpression(expression)).toBeUndefined();
  });
  it.each([
    ['(a+)+$', 'a part may vary'],
    ['(a|aa)+$', 'a part may vary'],
    ['(?:a*)*b', 'a part may vary'],
    ['^(([a-z])+.)+[A-Z]', 'a part may vary'],
    ['(?:a?){30}b', 'a part may vary'],
    ['(?=(a+)+b)', 'a part may vary'],
    ['a*a*b', '2 open repetitions'],
    ['[^\\0]*[^\\0]*\\n', '2 open repetitions'],
    ['(?=.*.*x)y', '2 open repetitions'],
    ['x(?:a*|b)a{0,1000}c', '2 open repetitions'],
    ['a{1,2}+b', 'repetition of a repetition'],
    ['(a)\\1', '\\1'],
    ['(?<x>a)\\g<x>', '\\g'],
    ['(?~ab)', '(?~a'],
    ['('.repeat(40), 'nested deeper than 30'],
    ['a)', 'nothing opens'],
    ['[a', 'not closed'],
  ])('refused: %s', (expression, why) => {
    expect(unsafeExpression(expression)).toContain(why);
  });
});

/** The smallest tokenizer, with something in it changed. */
const file = (change: Readonly<Record<string, unknown>>): string =>
  JSON.stringify({
    ...{ version: '1.0', truncation: null, padding: null, added_tokens: [], normalizer: null },
    ...{ pre_tokenizer: null, post_processor: null, decoder: null },
    model: { type: 'BPE', vocab: { a: 0, b: 1, ab: 2 }, merges: [['a', 'b']] },
    ...change,
  });
const trie = (units: readonly number[], texts: string | Buffer): string => {
  const bytes = Buffer.alloc(4 + 4 * units.length);
  [4 * units.length, ...units].forEach((unit, i) => bytes.writeUInt32LE(unit >>> 0, 4 * i));
  return Buffer.concat([bytes, Buffer.from(texts as string)]).toString('base64');
};
/** Node 0 leads with byte 1 to unit 1, a leaf, whose text is where unit 0 says. */
const small = (text: number, texts: string | Buffer): string => {
  const units = Array.from({ length: 256 }, () => 0);
  [units[0], units[1], units[256 - 1]] = [text, 1 | 256 | (1 << 10), 0];
  return trie(units, texts);
};
const precompiled = (map: string) => ({ normalizer: { type: 'Precompiled', precompiled_charsmap: map } });
const template = { type: 'TemplateProcessing', single: [{ SpecialToken: { id: '<s>', type_id: 0 } }], pair: [], special_tokens: {} }; // prettier-ignore

/** With each of these the library ends the process: when it loads it, or with the first text. */
describe('a tokenizer.json is refused', () => {
  const split = { type: 'Split', pattern: { Regex: '(a+)+$' }, behavior: 'Isolated', invert: false };
  it.each([
    ['with an expression that takes forever', { pre_tokenizer: split }, 'can take too long'],
    ['also deep in sequences', { pre_tokenizer: { type: 'Sequence', pretokenizers: [{ type: 'Sequence', pretokenizers: [split] }] } }, 'can take too long'], // prettier-ignore
    ['also where text is replaced', { normalizer: { type: 'Replace', pattern: { Regex: '(a|a)*$' }, content: 'b' } }, 'can take too long'], // prettier-ignore
    ['without a map of characters', precompiled(''), 'map of characters'],
    ['with a trie longer than its map', precompiled(trie([], 'a').replace('AAAA', '////')), 'map of characters'],
    ['with a trie that leads out of itself', precompiled(trie([0, 0xffff_fe01], '')), 'map of characters'],
    ['with a leaf behind the texts', precompiled(small(9, 'abc')), 'byte 9 of 3'],
    ['with a leaf within a character', precompiled(small(1, 'é')), 'byte 1 of 2'],
    ['with texts that are not UTF-8', precompiled(small(0, Buffer.from([0xff]))), 'not UTF-8'],
    ['with pieces of length 0', { pre_tokenizer: { type: 'FixedLength', length: 0 } }, 'pieces of nothing'],
    ['that strips more than there is', { decoder: { type: 'Strip', content: 'a', start: 0, stop: 99 } }, 'strips'],
    ['with a token around texts that is none', { post_processor: template }, 'does not describe'],
    ['with a second text beside the only one', { post_processor: { ...template, single: [{ Sequence: { id: 'B', type_id: 0 } }] } }, 'second text'], // prettier-ignore
    ['with an id of 4294967295', { model: { type: 'BPE', vocab: { a: 4294967295 }, merges: [] } }, 'no vocabulary'],
    ['with an added token of id 2^24', { added_tokens: [{ id: 2 ** 24, content: 'x', special: true }] }, 'no vocabulary'], // prettier-ignore
    ['with a model that is none', { model: null }, 'cannot be read'],
  ])('%s', async (_, change, message) => {
    expect(await badInputMessage(() => makeTokenizer(file(change), 'tokenizer.json'))).toContain(message);
  });
  it('that is no JSON, or not UTF-8', async () => {
    expect(await badInputMessage(() => makeTokenizer('{', 'tokenizer.json'))).toContain('no JSON');
    const bytes = Buffer.from(file({}).replace('"a"', '"\xe9"'), 'latin1');
    expect(await badInputMessage(() => makeTokenizer(bytes, 'tokenizer.json'))).toContain('not UTF-8');
  });
});

it('a sound map of characters is taken, and used', async () => {
  const tokenizer = await makeTokenizer(file(precompiled(small(0, 'ab\0'))), 'tokenizer.json');
  expect([...(await tokenizer.encode('a\x01'))]).toEqual([0, 2]);
});
