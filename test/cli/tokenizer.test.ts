import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, json, listing, root, v1, workFolder } from './support.js';

const folder = workFolder();
const english = join(root, 'calibration/english.jsonl');
const trained = join(folder, 'trained');
const remapped = join(folder, 'remapped');

describe('tokenizer', () => {
  it('trains a folder with the tokens that were asked for; dropout stands in the record alone', async () => {
    const args = ['tokenizer', 'train', english, '-o', trained, '--vocab-size', '600', '--pad-id', '0', '--special', '<a>', '--bpe-dropout', '0.1', '--json']; // prettier-ignore
    const result = await cli(args);
    expect(result.code, result.stderr).toBe(0);
    expect(json(result)).toMatchObject({
      ...{ ok: true, vocabSize: 600, merges: 340, padId: 0, bpeDropout: 0.1 },
      specialTokens: { '<|pad|>': 0, '<|begin_of_sentence|>': 1, '<|end_of_sentence|>': 2, '<a>': 3 },
    });
    expect(listing(trained)).toEqual(['deepseek-convert.json', 'special_tokens_map.json', 'tokenizer.json', 'tokenizer_config.json']); // prettier-ignore
    const read = (name: string) => JSON.parse(readFileSync(join(trained, name), 'utf8')) as Record<string, unknown>;
    expect(read('tokenizer.json')).toMatchObject({ model: { dropout: null }, padding: null });
    expect(read('deepseek-convert.json')).toMatchObject({ training: { bpeDropout: 0.1, preTokenizer: 'llama3' } });
    expect(read('tokenizer_config.json')).toMatchObject({ pad_token: '<|pad|>', additional_special_tokens: ['<a>'] });
    expect((await cli(args)).stdout).toMatch(/output exists already/);
    const again = await cli([...args, '--overwrite']);
    expect(again.code, again.stdout).toBe(0);
  });

  it('compares two: what texts take, what vocabularies share', async () => {
    const text = join(folder, 'mixed.txt');
    writeFileSync(text, 'The cat sat on the mat.\n我爱北京\n12345\n');
    const result = await cli(['tokenizer', 'compare', fixture('v1.0'), trained, '--text', text, '--json']);
    expect(result.code, result.stderr).toBe(0);
    const found = json<{ shared: number; special: object[]; scripts: { name: string; words: number; characters: number; tokens: number[] }[]; files: { bytes: number }[] }>(result); // prettier-ignore
    expect(found).toMatchObject({ vocabSizes: [8192, 600] });
    expect(found.shared).toBeGreaterThan(256 + 200);
    expect(found.special).toContainEqual({ token: '<|pad|>', ids: [2, 0] });
    expect(found.files).toMatchObject([{ bytes: 43, words: 8, characters: 35 }]);
    expect(found.scripts.map(({ name }) => name)).toEqual(['Latin', 'Han', 'no letters']);
    // Its alphabet is bytes: three a character, which nothing in English text merges.
    expect(found.scripts[1]).toMatchObject({ words: 1, characters: 5, tokens: [expect.any(Number), 13] });
    const shown = await cli(['tokenizer', 'compare', fixture('v1.0'), trained]);
    expect(shown.code, shown.stderr).toBe(0);
    expect(shown.stdout).toMatch(/Both have .* tokens[^]*By file[^]*chinese\.jsonl[^]*By script[^]*Han/);
  });

  it('gives a model the vocabulary, tells its perplexity, and the result is a model', async () => {
    const result = await cli(['tokenizer', 'remap', v1, '--tokenizer', trained, '-o', remapped, '--device', 'cpu', '--max-tokens', '200', '--json']); // prettier-ignore
    expect(result.code, result.stderr).toBe(0);
    const { rows, prediction } = json<{ rows: Record<string, number>; prediction: { after: { perplexity: number } } }>(result); // prettier-ignore
    expect(rows.shared! + rows.averaged! + rows.renamed! + rows.mean!).toBe(600);
    expect(prediction.after.perplexity).toBeGreaterThan(1);
    const next = await cli(['score', remapped, '--text', join(root, 'README.md'), '--max-tokens', '32', '--device', 'cpu']); // prettier-ignore
    expect(next.code, next.stderr).toBe(0);
  });

  it.each([
    ['train without text', ['train', '-o', 'x'], 2, /No text to learn from/],
    ['train without -o', ['train', english], 2, /-o .* is missing/],
    ['too small a vocabulary', ['train', english, '-o', 'x', '--vocab-size', '258'], 2, /no room.*expected 259/],
    ['an unknown pre-tokenizer', ['train', english, '-o', 'x', '--pre-tokenizer', 'llama'], 2, /Did you mean llama3/],
    ['a padding id that is none', ['train', english, '-o', 'x', '--pad-id', '9'], 2, /--pad-id is no special token/],
    ['a text that is not there', ['train', 'none.txt', '-o', 'x'], 1, /none\.txt/],
    ['one tokenizer', ['compare', 'a'], 2, /takes two tokenizers/],
    ['no tokenizer', ['remap', v1, '-o', 'x'], 2, /--tokenizer <new> is missing/],
    ["another action's option", ['compare', 'a', 'b', '--pad-id', '1'], 2, /compare has no option --pad-id.*tokenizer train/s],
    ['an unknown action', ['trian', 'a'], 2, /Did you mean train/],
  ] as const)('refuses %s', async (_, args, code, message) => {
    const result = await cli(['tokenizer', ...args], { cwd: folder });
    expect(result.stderr).toMatch(message);
    expect(result.code).toBe(code);
    expect(existsSync(join(folder, 'x'))).toBe(false);
    expect(existsSync(join(folder, 'x.part'))).toBe(false);
  });
}); // prettier-ignore
