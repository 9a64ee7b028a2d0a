import { describe, expect, it } from 'vitest';
import { parseJson } from '../../../src/formats/json.js';
import { badInputMessage } from '../../support/refusal.js';

const parse = (text: string | Uint8Array, more: object = {}): unknown => parseJson(text, { where: 'file', ...more });

describe('parseJson', () => {
  it('agrees with JSON.parse on valid text', () => {
    const texts = [
      '{"a":[1,-2.5e-3,0,{"b":null}],"":true,"c":"\\u00e9\\n\\"\\\\\\/ 名 \\ud83d\\ude00"}',
      ' [ ] ',
      '"x"',
      '-0',
      '1e5',
      '{"a":{}}\n',
      '9007199254740991',
      '[[[[1]]]]',
    ];
    for (const text of texts) expect(JSON.stringify(parse(text))).toBe(JSON.stringify(JSON.parse(text)));
  });

  it('refuses what JSON.parse refuses', async () => {
    const texts = ['', '{', '[1,]', '{"a":1,}', '{a:1}', '01', '+1', '.5', '1.', '1e', 'nul', '"\n"', '"\\x"', '"abc', '[1 2]',
      '{"a" 1}', '{"a":1}x', "'a'", '\u00a0[]', '[NaN]', 'Infinity', '-', '"\\u12g4"', '\ufeff{}', '[1}']; // prettier-ignore
    for (const text of texts) {
      expect(() => JSON.parse(text) as unknown, text).toThrow();
      expect(await badInputMessage(() => parse(text)), text).toContain('Bad JSON');
    }
  });

  it('refuses duplicate keys and names byte and key', async () => {
    expect(await badInputMessage(() => parse('{"é":1,"é":2}'))).toContain('file, byte 8');
    expect(await badInputMessage(() => parse('{"a":1,"\\u0061":2}'))).toContain('Duplicate key "a"');
  });

  it('refuses integers beyond 2^53 and shapes like [0, 2^64-1]', async () => {
    expect(await badInputMessage(() => parse('9007199254740992'))).toContain('Integer too large');
    expect(await badInputMessage(() => parse('[0,18446744073709551615]'))).toContain('18446744073709551615');
    expect(await badInputMessage(() => parse('1e999'))).toContain('Number too large');
  });

  it('reads what Python writes in configs when told to', () => {
    const text = '{"model_max_length":1000000000000000019884624838656,"limit":[0.0,Infinity,-Infinity,NaN]}';
    expect(parse(text, { lenient: true })).toEqual({ model_max_length: 1e30, limit: [0, Infinity, -Infinity, NaN] });
  });

  it('takes only plain digits in headers', async () => {
    expect(parse('[0,12]', { integersOnly: true })).toEqual([0, 12]);
    for (const text of ['-1', '1.0', '1e3', '-0']) {
      expect(await badInputMessage(() => parse(text, { integersOnly: true }))).toContain('non-negative integer');
    }
  });

  it('refuses 200,000-deep nesting without overflowing the stack', async () => {
    expect(await badInputMessage(() => parse('['.repeat(200_000)))).toContain('Nested deeper');
    expect(await badInputMessage(() => parse('{"a":'.repeat(200_000)))).toContain('Nested deeper');
  });

  it('bounds the number of values', async () => {
    expect(await badInputMessage(() => parse(`[${'0,'.repeat(2000)}0]`, { maxValues: 1000 }))).toContain('More than');
  });

  it('refuses bytes that are not UTF-8 and half surrogate pairs', async () => {
    expect(await badInputMessage(() => parse(Buffer.from([0x22, 0xff, 0x22])))).toContain('UTF-8');
    expect(await badInputMessage(() => parse('"\\ud800"'))).toContain('surrogate');
  });

  it('treats __proto__ and constructor as names', () => {
    const value = parse('{"__proto__":{"polluted":1},"constructor":2}') as Record<string, unknown>;
    expect(Object.keys(value)).toEqual(['__proto__', 'constructor']);
    expect(Object.getPrototypeOf(value)).toBeNull();
    expect(({} as Record<string, unknown>)['polluted']).toBeUndefined();
  });
});
