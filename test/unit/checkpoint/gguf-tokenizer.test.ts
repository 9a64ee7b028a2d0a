import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { tokenizerFromGguf, tokenizerToGguf } from '../../../src/checkpoint/gguf-tokenizer.js';
import type { GgufValue } from '../../../src/formats/gguf.js';
import { isJsonObject, parseJson, type JsonObject } from '../../../src/formats/json.js';
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
