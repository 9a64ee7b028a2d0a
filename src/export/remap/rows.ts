import { BpeModel } from '../../tokenizer/bpe.js';
import { byteLetters } from '../../tokenizer/bpe-train.js';
import type { Tokenizer } from '../../tokenizer/tokenizer.js';
import { readVocabulary, textOf, type Meaning, type Vocabulary } from '../../tokenizer/vocabulary.js';

/** From which rows of the old vocabulary each row of the new one is made. */
export interface RowPlan {
  /** Rows of the new embedding, padding included. */
  readonly size: number;
  /** Tokens of the old tokenizer; rows behind them are padding. */
  readonly known: number;
  /** By new id: the old row that it is, or -1. */
  readonly exact: Int32Array;
  /** New tokens: old ids of the pieces that spell them. */
  readonly pieces: ReadonlyMap<number, readonly number[]>;
  readonly counts: RowCounts;
}
/** New rows by where they come from. */
export type RowCounts = {
  /** The same token in both vocabularies: the row itself. */
  readonly shared: number;
  /** BOS, EOS or padding under another name: the row of the old one. */
  readonly renamed: number;
  /** The mean of the rows of its pieces. */
  readonly averaged: number;
  /** The mean of all rows: ids without a token, tokens that cannot be spelled. */
  readonly mean: number;
};

/** Ids of tokens with a role: `bos` -> 0. */
export type Roles = Readonly<Partial<Record<string, number>>>;

/** Decides for each token of the new tokenizer. Errors: input, a tokenizer that is not plain BPE. */
export async function planRows(
  before: { readonly tokenizer: Tokenizer; readonly roles: Roles },
  after: { readonly tokenizer: Tokenizer; readonly roles: Roles },
  multiple: number,
): Promise<RowPlan & { readonly newIds: ReadonlyMap<number, number> }> {
  const [old, next] = [await readVocabulary(before.tokenizer), await readVocabulary(after.tokenizer)];
  const renamed = new Map<number, number>();
  for (const [role, id] of Object.entries(after.roles)) {
    const earlier = before.roles[role];
    if (id !== undefined && earlier !== undefined && !renamed.has(id)) renamed.set(id, earlier);
  }
  const size = Math.ceil(next.size / multiple) * multiple;
  const exact = new Int32Array(size).fill(-1);
  const fresh: { id: number; meaning: Meaning }[] = [];
  const newIds = new Map<number, number>();
  let shared = 0;
  next.meanings.forEach((meaning, id) => {
    if (!meaning) return;
    const same = old.ids.get(meaning.key);
    const row = same ?? renamed.get(id);
    if (row === undefined) return void fresh.push({ id, meaning });
    exact[id] = row;
    if (same !== undefined) shared++;
    if (same !== undefined || !newIds.has(row)) newIds.set(row, id);
  });
  const pieces = await piecesOf(fresh, old, before.tokenizer);
  const made = exact.reduce((n, row) => n + (row >= 0 ? 1 : 0), 0);
  const counts = { shared, renamed: made - shared, averaged: pieces.size, mean: size - made - pieces.size };
  return { size, known: old.size, exact, pieces, counts, newIds };
}

/** The old tokenizer's tokens for each of these; those that it cannot spell are left out. */
async function piecesOf(
  tokens: readonly { id: number; meaning: Meaning }[],
  old: Vocabulary,
  tokenizer: Tokenizer,
): Promise<Map<number, readonly number[]>> {
  const model = new BpeModel(await tokenizer.source(), tokenizer.path);
  const found = new Map<number, readonly number[]>();
  const spell = (id: number, symbols: readonly number[] | undefined) => {
    if (symbols && symbols.length > 0) found.set(id, model.merge(symbols));
  };
  if (old.spelling === 'text') {
    for (const { id, meaning } of tokens) spell(id, letters(meaning, model));
    return found;
  }
  const texts: { id: number; text: string }[] = [];
  for (const { id, meaning } of tokens) {
    const text = textOf(meaning);
    // Parts of characters are no text: they are put together from their bytes.
    if (text === undefined) spell(id, model.symbols(Array.from(meaning.bytes, (byte) => byteLetters[byte]!).join('')));
    else if (text !== '') texts.push({ id, text });
  }
  const encoded = await tokenizer.encodeAll(texts.map(({ text }) => text));
  texts.forEach(({ id }, i) => encoded[i]!.length > 0 && found.set(id, [...encoded[i]!]));
  return found;
}

/** In the spelling of SentencePiece; what has no letter of its own by its bytes. */
function letters({ bytes, ...rest }: Meaning, model: BpeModel): number[] | undefined {
  const text = textOf({ bytes, ...rest });
  const byBytes = (part: Uint8Array) => Array.from(part, (byte) => model.ids.get(`<0x${byte.toString(16).toUpperCase().padStart(2, '0')}>`)); // prettier-ignore
  const ids = text === undefined ? byBytes(bytes) : Array.from(text.replaceAll(' ', '\u2581')).flatMap((letter) => model.ids.get(letter) ?? byBytes(Buffer.from(letter))); // prettier-ignore
  return ids.includes(undefined) ? undefined : (ids as number[]);
}
