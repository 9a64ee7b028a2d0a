import { createHash } from 'node:crypto';
import { existsSync, readdirSync, statSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import type { Tokenizer as NativeTokenizer } from '@anush008/tokenizers';
import { badInput } from '../base/errors.js';
import { requireSound } from './check.js';

export interface EncodeOptions {
  /** With what the tokenizer puts around every text (BOS, EOS); default false. */
  special?: boolean;
}
export interface DecodeOptions {
  /** Keep special tokens in the text; default false. */
  special?: boolean;
}

/** A tokenizer.json, as Hugging Face's own Rust library reads it. Work happens off the event loop. */
export class Tokenizer {
  readonly path: string;
  /** SHA-256 (hex) of the file. */
  readonly hash: string;
  /** With added tokens. */
  readonly vocabSize: number;
  readonly #native: NativeTokenizer;
  readonly #source: () => Promise<string>;

  constructor(native: NativeTokenizer, path: string, hash: string, source: () => Promise<string>) {
    [this.#native, this.#source] = [native, source];
    this.path = path;
    this.hash = hash;
    this.vocabSize = native.getVocabSize(true);
  }

  async encode(text: string, { special = false }: EncodeOptions = {}): Promise<Int32Array> {
    const encoding = await this.#native.encode(text, null, { addSpecialTokens: special });
    return Int32Array.from(encoding.getIds());
  }
  /** Several texts at once, on all cores. */
  async encodeAll(texts: readonly string[], { special = false }: EncodeOptions = {}): Promise<Int32Array[]> {
    const encodings = await this.#native.encodeBatch([...texts], { addSpecialTokens: special });
    return encodings.map((encoding) => Int32Array.from(encoding.getIds()));
  }
  /** Tokens, and of each the number of the word that it belongs to; undefined for those that are put around the text. */
  async encodeWords(
    text: string,
    { special = false }: EncodeOptions = {},
  ): Promise<{ ids: Int32Array; words: readonly (number | undefined)[] }> {
    const encoding = await this.#native.encode(text, null, { addSpecialTokens: special });
    return { ids: Int32Array.from(encoding.getIds()), words: encoding.getWordIds().map((word) => word ?? undefined) };
  }
  async decode(ids: Iterable<number>, { special = false }: DecodeOptions = {}): Promise<string> {
    return this.#native.decode([...ids], !special);
  }
  /** The token as the vocabulary spells it (`Ġworld`), or undefined. */
  token(id: number): string | undefined {
    return this.#native.idToToken(id) ?? undefined;
  }
  /** The text of its tokenizer.json. */
  source(): Promise<string> {
    return this.#source();
  }
  id(token: string): number | undefined {
    return this.#native.tokenToId(token) ?? undefined;
  }
}

/**
 * Loads tokenizer.json, given itself or its folder. The native library is loaded on first use only.
 * Errors: no tokenizer.json, not one that the library understands.
 */
export async function loadTokenizer(folderOrFile: string): Promise<Tokenizer> {
  const path = tokenizerFile(folderOrFile);
  return makeTokenizer(await readFile(path), path, () => readFile(path, 'utf8'));
}

/** The same from the text of a tokenizer.json that lies in no file of its own; `where` names it in errors. */
export async function makeTokenizer(
  content: Buffer | string,
  where: string,
  source: () => Promise<string> = () => Promise.resolve(content.toString()),
): Promise<Tokenizer> {
  const [bytes, path] = [Buffer.from(content as string), where];
  const text = decodeText(bytes, path);
  requireSound(text, path);
  const { Tokenizer: Native } = await import('@anush008/tokenizers').then((m) => m.default ?? m);
  let native: NativeTokenizer;
  try {
    native = Native.fromString(text);
  } catch (cause) {
    throw badInput('The tokenizer cannot be read', {
      where: path,
      got: cause instanceof Error ? cause.message : String(cause),
      expected: 'a tokenizer.json of the Hugging Face tokenizers library',
      cause,
    });
  }
  // Both would change what a text's tokens are; they are meant for training batches.
  native.disableTruncation();
  native.disablePadding();
  return new Tokenizer(native, path, createHash('sha256').update(bytes).digest('hex'), source);
}

function decodeText(bytes: Buffer, where: string): string {
  try {
    return new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  } catch (cause) {
    throw badInput('The tokenizer is not UTF-8 text', { where, cause });
  }
}

/** tokenizer.json in the folder, or the file itself. */
function tokenizerFile(path: string): string {
  if (!existsSync(path)) throw badInput('There is no tokenizer here', { where: path });
  if (!statSync(path).isDirectory()) return path;
  const file = join(path, 'tokenizer.json');
  if (existsSync(file)) return file;
  const slow = readdirSync(path).find((name) => ['tokenizer.model', 'vocab.json', 'spiece.model'].includes(name));
  throw badInput('The model has no tokenizer.json', {
    where: path,
    hint: slow
      ? `${slow} is an older form: load it with AutoTokenizer in Python once and save_pretrained() it to this folder.`
      : 'Put the tokenizer.json of the model beside its weights.',
  });
}
