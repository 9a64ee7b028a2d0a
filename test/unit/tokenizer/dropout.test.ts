import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { dropoutEncoder } from '../../../src/tokenizer/dropout.js';
import { loadTokenizer } from '../../../src/tokenizer/tokenizer.js';
import { fixture, trainedModel } from '../../arch/support.js';

const { cases } = JSON.parse(readFileSync(fixture('tokenizer', 'dropout.json'), 'utf8')) as {
  cases: { word: string; p: number; spellings: [ids: number[], probability: number][] }[];
};
const tokenizer = await loadTokenizer(fixture('v1.0', 'tokenizer.json'));
const mixed =
  'The water, naïve 中文 текст 👩‍👩‍👧 ½ \u0301x\n\n  def f(x): return x  # <|end_of_sentence|> there is nothing';

describe('BPE-dropout', () => {
  it.each(cases)('spells $word as often as theory says at $p', async ({ word, p, spellings }) => {
    const n = 5000;
    const encoder = await dropoutEncoder(tokenizer, p, 11);
    const counts = new Map<string, number>();
    // A word of the text each: every line is one.
    const ids = await encoder.encode(`${word}\n`.repeat(n));
    const newline = tokenizer.id('Ċ')!;
    let spelling: number[] = [];
    for (const id of ids) {
      if (id !== newline) spelling.push(id);
      else {
        counts.set(spelling.join(), (counts.get(spelling.join()) ?? 0) + 1);
        spelling = [];
      }
    }
    let chi = 0;
    let [others, rest] = [n, 1];
    for (const [ids, probability] of spellings) {
      const got = counts.get(ids.join()) ?? 0;
      chi += (got - n * probability) ** 2 / (n * probability);
      [others, rest] = [others - got, rest - probability];
    }
    if (n * rest >= 8) chi += (others - n * rest) ** 2 / (n * rest);
    // Mean and 4.5 deviations of the chi-square distribution.
    expect(chi).toBeLessThan(spellings.length + 4.5 * Math.sqrt(2 * spellings.length));
  });

  it('without chance is the encoding itself, and always spells the same text', async () => {
    for (const name of ['v1.0', 'stories260k']) {
      const path = trainedModel(name);
      if (!path) continue;
      const own = await loadTokenizer(path);
      for (const special of [false, true]) {
        const plain = await own.encode(mixed, { special });
        expect(await (await dropoutEncoder(own, 0, 1)).encode(mixed, { special })).toEqual(plain);
        const dropped = await (await dropoutEncoder(own, 0.3, 1)).encode(mixed, { special });
        // Without a pre-tokenizer the text is one word, in which few chances are missed for good.
        if (name === 'v1.0') expect(dropped.length).toBeGreaterThan(plain.length);
        expect(await own.decode(dropped, { special: true })).toBe(await own.decode(plain, { special: true }));
      }
    }
  });

  it('gives the same tokens for the same seed, others for another', async () => {
    const encode = async (seed: number) => (await dropoutEncoder(tokenizer, 0.1, seed)).encode(mixed.repeat(20));
    expect(await encode(3)).toEqual(await encode(3));
    expect(await encode(3)).not.toEqual(await encode(4));
  });
});
