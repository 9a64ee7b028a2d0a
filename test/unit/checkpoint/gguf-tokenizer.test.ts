import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { sentencePieceToGguf } from '../../../src/checkpoint/gguf-sentencepiece.js';
import { tokenizerFromGguf } from '../../../src/checkpoint/gguf-tokenizer-files.js';
import { tokenizerToGguf } from '../../../src/checkpoint/gguf-tokenizer.js';
import type { GgufValue } from '../../../src/formats/gguf.js';
import { readGguf } from '../../../src/formats/gguf.js';
import { isJsonObject, parseJson, type JsonObject } from '../../../src/formats/json.js';
import { parseSentencePiece, type SentencePieceModel } from '../../../src/formats/sentencepiece.js';
import { OpenFile } from '../../../src/formats/source.js';
import { makeTokenizer } from '../../../src/tokenizer/tokenizer.js';

const fixtures = fileURLToPath(new URL('../../../fixtures/', import.meta.url));
const read = (path: string): string => readFileSync(join(fixtures, path), 'utf8');
/** Ids by the tokenizers library of Python. */
const expected = JSON.parse(read('tokenizer/tokens.json')) as {
  texts: string[];
  models: Record<string, { plain: number[]; special: number[] }[]>;
};

function metadataOf(folder: string): Map<string, GgufValue> {
  const object = (name: string): JsonObject => {
    const value = parseJson(read(join(folder, name)), { where: name, lenient: true });
    if (!isJsonObject(value)) throw new Error(name);
    return value;
  };
  const [tokenizer, config] = [object('tokenizer.json'), object('tokenizer_config.json')];
  const size = Object.keys((tokenizer['model'] as JsonObject)['vocab'] as JsonObject).length;
  return tokenizerToGguf({ text: read(join(folder, 'tokenizer.json')), tokenizer, config }, Math.max(size, 512) + 8);
}

describe.each([
  ['v1.0', 'v1.0', 'gpt2'],
  ['stories260k', 'formats/tokenizers/stories260k', 'llama'],
])('the tokenizer of %s', (name, folder, kind) => {
  it.each(['with tokenizer.json inside', 'from tokens, merges and scores alone, as other tools write it'])(
    'comes back from GGUF metadata: %s',
    async (way) => {
      const metadata = metadataOf(folder);
      expect(metadata.get('tokenizer.ggml.model')!.value).toBe(kind);
      if (way.startsWith('from')) metadata.delete('tokenizer.huggingface.json');
      const { files, notes } = tokenizerFromGguf(metadata);
      expect(notes).toEqual([]);
      if (!way.startsWith('from')) expect(files.get('tokenizer.json')).toBe(read(join(folder, 'tokenizer.json')));
      const tokenizer = await makeTokenizer(files.get('tokenizer.json')!, 'made');
      for (const [i, text] of expected.texts.entries()) {
        const { plain, special } = expected.models[name]![i]!;
        expect([...(await tokenizer.encode(text))], text).toEqual(plain);
        expect([...(await tokenizer.encode(text, { special: true }))], text).toEqual(special);
      }
    },
  );
});

/** Made by fixtures/tokenizer/make_sentencepiece.py. */
const folder = 'formats/tokenizers/unigram';
const unigram = JSON.parse(read(join(folder, 'unigram-ids.json'))) as { texts: string[]; ids: number[][] };
const spModel = (name: string): SentencePieceModel => parseSentencePiece(readFileSync(join(fixtures, folder, name)), name); // prettier-ignore
const fromPython = (): Map<string, GgufValue> => {
  using file = new OpenFile(join(fixtures, folder, 'unigram.gguf'));
  return new Map(readGguf(file).metadata);
};
const own = (metadata: ReadonlyMap<string, GgufValue>): Record<string, GgufValue> =>
  Object.fromEntries([...metadata].filter(([key]) => key.startsWith('tokenizer.ggml.')));
const listOf = (metadata: ReadonlyMap<string, GgufValue>, key: string): readonly unknown[] => {
  const found = metadata.get(`tokenizer.ggml.${key}`);
  return found?.type === 'array' ? found.value : [];
};
async function idsOf(metadata: ReadonlyMap<string, GgufValue>, texts: readonly string[]): Promise<number[][]> {
  const { files, notes } = tokenizerFromGguf(metadata);
  expect(notes).toEqual([]);
  const tokenizer = await makeTokenizer(files.get('tokenizer.json')!, 'made');
  return Promise.all(texts.map(async (text) => [...(await tokenizer.encode(text))]));
}

describe('words that are tokens which merges do not make', () => {
  /** Made by fixtures/tokenizer/make_ignore_merges.py: pre-tokenizer of Llama 3. */
  const made = JSON.parse(read('tokenizer/ignore-merges.json')) as { tokenizer: JsonObject; texts: string[]; ids: Record<'true' | 'false', number[][]> }; // prettier-ignore
  const config = { bos_token: '<|begin_of_text|>' };
  const metadataWith = (ignore_merges: boolean, pre_tokenizer = made.tokenizer['pre_tokenizer']!) => {
    const model = { ...(made.tokenizer['model'] as JsonObject), ignore_merges };
    const metadata = tokenizerToGguf({ text: '', tokenizer: { ...made.tokenizer, model, pre_tokenizer }, config }, 270);
    metadata.delete('tokenizer.huggingface.json');
    return metadata;
  };
  const begun = async (metadata: ReadonlyMap<string, GgufValue>): Promise<number[][]> => {
    const tokenizer = await makeTokenizer(tokenizerFromGguf(metadata).files.get('tokenizer.json')!, 'made');
    return Promise.all(made.texts.map(async (text) => [...(await tokenizer.encode(text, { special: true }))]));
  };

  it.each([
    [true, 'llama-bpe'],
    [false, 'smaug-bpe'],
  ])('ignore_merges %s is %s to llama.cpp, and comes back', async (ignore, pre) => {
    const metadata = metadataWith(ignore);
    expect(metadata.get('tokenizer.ggml.pre')!.value).toBe(pre);
    expect(await begun(metadata)).toEqual(made.ids[`${ignore}`]);
  });

  it('texts begin with BOS where an old file of Llama 3 does not say so', async () => {
    const metadata = metadataWith(true);
    metadata.delete('tokenizer.ggml.add_bos_token');
    expect(await begun(metadata)).toEqual(made.ids.true);
  });

  it('are refused where llama.cpp would cut them', () => {
    const bytes = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
    expect(metadataWith(false, bytes).get('tokenizer.ggml.pre')!.value).toBe('gpt-2');
    expect(() => metadataWith(true, bytes)).toThrow('ignore_merges');
  });
});

describe('a Unigram tokenizer', () => {
  const rows = 164;
  const files = (change: (tokenizer: JsonObject) => void = () => undefined) => {
    const text = read(join(folder, 'unigram.json'));
    const tokenizer = parseJson(text, { where: 'unigram.json', lenient: true }) as JsonObject;
    change(tokenizer);
    const config = { eos_token: '</s>', pad_token: '<pad>', add_bos_token: false, add_eos_token: false };
    return { text, tokenizer, config };
  };

  it('becomes the metadata that gguf-py writes from tokenizer.model', () => {
    const { metadata, notes } = sentencePieceToGguf({ model: spModel('unigram.model'), config: {}, added: {} }, rows);
    expect(notes).toEqual([]);
    expect(own(metadata)).toEqual(own(fromPython()));
  });

  it('becomes the same from tokenizer.json, but for the token that was added there', () => {
    const [made, expected] = [tokenizerToGguf(files(), rows), fromPython()];
    const added = 160;
    const replaced = { tokens: '<|user|>', scores: -1000, token_type: 3 };
    for (const [key, value] of Object.entries(replaced)) {
      const found = listOf(made, key);
      // tokenizer.json has doubles, a GGUF file floats.
      const rounded = key === 'scores' ? (found as number[]).map(Math.fround) : found;
      expect(rounded, key).toEqual(listOf(expected, key).with(added, value));
      for (const metadata of [made, expected]) metadata.delete(`tokenizer.ggml.${key}`);
    }
    expect(own(made)).toEqual(own(expected));
  });

  it('gives the same tokens from the metadata of gguf-py', async () => {
    const texts = unigram.texts.filter((text) => !text.includes('<|user|>'));
    expect(await idsOf(fromPython(), texts)).toEqual(unigram.ids.slice(0, texts.length));
  });

  it('gives the same tokens, added ones too, after it was in a GGUF file', async () => {
    const metadata = tokenizerToGguf(files(), rows);
    metadata.delete('tokenizer.huggingface.json');
    expect(await idsOf(metadata, unigram.texts)).toEqual(unigram.ids);
  });

  it('keeps its map of characters', () => {
    const charsmap = Buffer.from([4, 0, 0, 0, 0, 255, 128, 127]);
    const normalizer = { type: 'Precompiled', precompiled_charsmap: charsmap.toString('base64') };
    const metadata = tokenizerToGguf(
      files((tokenizer) => (tokenizer['normalizer'] = normalizer)),
      rows,
    );
    expect(metadata.get('tokenizer.ggml.precompiled_charsmap')).toEqual({ type: 'array', of: 'u8', value: [...charsmap] }); // prettier-ignore
    expect(metadata.get('tokenizer.ggml.remove_extra_whitespaces')!.value).toBe(false);
    metadata.delete('tokenizer.huggingface.json');
    const back = JSON.parse(tokenizerFromGguf(metadata).files.get('tokenizer.json')!) as { normalizer: unknown };
    expect(back.normalizer).toEqual({ type: 'Sequence', normalizers: [normalizer] });
  });

  it('of T5, which cuts at spaces first, merges them and puts one in front', () => {
    const pretokenizers = [
      { type: 'WhitespaceSplit' },
      { type: 'Metaspace', replacement: '▁', add_prefix_space: true },
    ];
    const t5 = files((t) => Object.assign(t, { normalizer: null, pre_tokenizer: { type: 'Sequence', pretokenizers } }));
    const metadata = tokenizerToGguf(t5, rows);
    expect(metadata.get('tokenizer.ggml.remove_extra_whitespaces')!.value).toBe(true);
    expect(metadata.get('tokenizer.ggml.add_space_prefix')!.value).toBe(true);
  });

  it.each([
    ['falls back to bytes', 'falls back to bytes', (t: JsonObject) => ((t['model'] as JsonObject)['byte_fallback'] = true)], // prettier-ignore
    ['lowers case', 'normalizer', (t: JsonObject) => (t['normalizer'] = { type: 'Lowercase' })],
    ['cuts at punctuation', 'pre-tokenizer', (t: JsonObject) => (t['pre_tokenizer'] = { type: 'Punctuation' })],
    ['merges spaces, with none in front', 'space in front', (t: JsonObject) => (t['pre_tokenizer'] = null)],
    ['has no unknown token', 'unknown token', (t: JsonObject) => ((t['model'] as JsonObject)['unk_id'] = null)],
  ])('is refused where llama.cpp would cut text otherwise: it %s', (_, message, change) => {
    expect(() => tokenizerToGguf(files(change), rows)).toThrow(message);
  });
});

describe('a tokenizer.model', () => {
  it('of BPE keeps scores and kinds, and gives the tokens of the tokenizers library', async () => {
    const model = spModel('bpe.model');
    const { metadata } = sentencePieceToGguf({ model, config: {}, added: {} }, 512);
    expect(metadata.get('tokenizer.ggml.model')!.value).toBe('llama');
    expect(metadata.get('tokenizer.ggml.add_bos_token')!.value).toBe(true);
    expect(listOf(metadata, 'token_type').slice(0, 5)).toEqual([2, 3, 3, 6, 6]);
    const json = metadataOf('formats/tokenizers/stories260k');
    expect(listOf(metadata, 'token_type')).toEqual(listOf(json, 'token_type').slice(0, 512));
    const ids = await idsOf(metadata, expected.texts);
    expect(ids).toEqual(expected.models['stories260k']!.map(({ plain }) => plain));
  });

  it('gets the tokens that were added beside it', () => {
    const config = { added_tokens_decoder: { '513': { content: '<|im_start|>', special: true }, '0': { content: '<unk>' } }, add_eos_token: true, eos_token: '<|im_start|>' }; // prettier-ignore
    const { metadata } = sentencePieceToGguf({ model: spModel('bpe.model'), config, added: { '▁extra': 512 } }, 515);
    const last = (key: string) => listOf(metadata, key).slice(512);
    expect(last('tokens')).toEqual(['▁extra', '<|im_start|>', '[PAD514]']);
    expect(last('token_type')).toEqual([4, 3, 5]);
    expect(last('scores')).toEqual([-1000, -1000, -10_000]);
    expect(listOf(metadata, 'token_type')[0]).toBe(2);
    expect(metadata.get('tokenizer.ggml.eos_token_id')!.value).toBe(513);
    expect(metadata.get('tokenizer.ggml.add_eos_token')!.value).toBe(true);
  });

  it('needs a row of the embedding for each token', () => {
    expect(() => sentencePieceToGguf({ model: spModel('bpe.model'), config: {}, added: {} }, 511)).toThrow('no row in the embedding'); // prettier-ignore
  });

  it.each([
    ['cut short', Buffer.from(readFileSync(join(fixtures, folder, 'bpe.model')).subarray(0, 4000)), 'Bad protobuf'],
    ['empty', Buffer.alloc(0), 'no pieces'],
    ['of words', Buffer.from([10, 3, 10, 1, 97, 18, 2, 24, 3]), 'its kind'],
    ['with an unknown piece beyond its pieces', Buffer.from([10, 3, 10, 1, 97, 18, 3, 0xc0, 2, 7]), 'unknown piece'],
    ['with a piece of a kind that is none', Buffer.from([10, 5, 10, 1, 97, 24, 9]), 'kind 9'],
    ['with a piece that is there twice', Buffer.from([10, 3, 10, 1, 97, 10, 3, 10, 1, 97]), 'there twice, "a"'],
    ['with a score that is no number', Buffer.from([10, 8, 10, 1, 97, 21, 0, 0, 0xc0, 0x7f]), 'the score NaN'],
    ['with a piece that is not UTF-8', Buffer.from([10, 3, 10, 1, 0xff]), 'UTF-8'],
  ])('is refused: one %s', (_, bytes, message) => {
    expect(() => parseSentencePiece(bytes, 'tokenizer.model')).toThrow(message);
  });
});
