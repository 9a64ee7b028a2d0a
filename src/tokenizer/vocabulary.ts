import { badInput } from '../base/errors.js';
import { byteLetters } from './bpe-train.js';
import type { Tokenizer } from './tokenizer.js';

/** How tokens are spelled: GPT-2's letters for bytes, or text with U+2581 for spaces and `<0x0A>` for lone bytes. */
export type Spelling = 'bytes' | 'text';

/** What each token stands for, so that two vocabularies can be compared whatever their spelling. */
export interface Vocabulary {
  readonly spelling: Spelling;
  /** One above the highest id. */
  readonly size: number;
  /** By id: what the token stands for; undefined where the ids have a gap. */
  readonly meanings: readonly (Meaning | undefined)[];
  /** Ids by `key` of the meaning. */
  readonly ids: ReadonlyMap<string, number>;
}

export interface Meaning {
  /** The same for the same meaning. */
  readonly key: string;
  /** Bytes of text; for special tokens their name. */
  readonly bytes: Uint8Array;
  readonly special: boolean;
}

interface Parts {
  readonly added_tokens?: readonly { readonly id: number; readonly content: string; readonly special?: boolean }[];
  readonly pre_tokenizer?: unknown;
  readonly decoder?: unknown;
  readonly model?: { readonly vocab?: Readonly<Record<string, number>> | readonly (readonly [string, number])[] };
}

const byteOf = new Map(byteLetters.map((letter, byte) => [letter, byte]));

/** Errors: input, a tokenizer.json without a vocabulary. */
export async function readVocabulary(tokenizer: Tokenizer): Promise<Vocabulary> {
  const { added_tokens: added = [], pre_tokenizer, decoder, model } = JSON.parse(await tokenizer.source()) as Parts;
  const vocab = model?.vocab;
  if (vocab === undefined) throw badInput('The tokenizer has no vocabulary', { where: tokenizer.path });
  const spelling: Spelling = JSON.stringify([pre_tokenizer, decoder]).includes('"ByteLevel"') ? 'bytes' : 'text';
  const meanings: (Meaning | undefined)[] = [];
  const entries = Array.isArray(vocab)
    ? (vocab as [string][]).map(([token], id) => [token, id] as const)
    : Object.entries(vocab as Record<string, number>);
  for (const [token, id] of entries) meanings[id] = meaning(bytesOf(token, spelling), false);
  for (const { id, content, special = false } of added) meanings[id] = meaning(Buffer.from(content), special);
  const ids = new Map<string, number>();
  meanings.forEach((one, id) => one && !ids.has(one.key) && ids.set(one.key, id));
  return { spelling, size: meanings.length, meanings, ids };
}

const meaning = (bytes: Uint8Array, special: boolean): Meaning => ({
  key: `${special ? 'special' : 'text'} ${Buffer.from(bytes).toString('latin1')}`,
  bytes,
  special,
});

function bytesOf(token: string, spelling: Spelling): Uint8Array {
  if (spelling === 'bytes') {
    const bytes = Array.from(token, (letter) => byteOf.get(letter));
    // What is not spelled in letters for bytes stands for itself.
    return bytes.includes(undefined) ? Buffer.from(token) : Uint8Array.from(bytes as number[]);
  }
  const lone = /^<0x([0-9A-F]{2})>$/.exec(token);
  return lone ? Uint8Array.of(Number.parseInt(lone[1]!, 16)) : Buffer.from(token.replaceAll('\u2581', ' '));
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });
/** The text of a token; undefined where it is a part of a character only. */
export function textOf({ bytes }: Meaning): string | undefined {
  try {
    return utf8.decode(bytes);
  } catch {
    return undefined;
  }
}
