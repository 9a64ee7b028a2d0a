/** Parts of a tokenizer.json in the order of the Hugging Face library; what is left out is null. */
export interface TokenizerParts {
  readonly added: readonly object[];
  readonly normalizer?: object | null;
  readonly preTokenizer: object | null;
  readonly postProcessor?: object | null;
  readonly decoder: object;
  readonly model: object;
}

export const tokenizerJson = ({ added, normalizer, preTokenizer, postProcessor, decoder, model }: TokenizerParts) => ({
  version: '1.0',
  truncation: null,
  padding: null,
  added_tokens: added,
  normalizer: normalizer ?? null,
  pre_tokenizer: preTokenizer,
  post_processor: postProcessor ?? null,
  decoder,
  model,
});

export const addedToken = (id: number, content: string, special = true) => ({
  ...{ id, content },
  ...{ single_word: false, lstrip: false, rstrip: false, normalized: false, special },
});

export interface BpeParts {
  readonly unknown?: string | undefined;
  /** Characters that no token has become tokens of their bytes, `<0x0A>`. */
  readonly byteFallback?: boolean;
  /** A word that is a token is that token, whatever the merges make of it. */
  readonly ignoreMerges?: boolean;
  readonly vocab: Readonly<Record<string, number>>;
  readonly merges: readonly unknown[];
}

/** No dropout: it is for training, and a tokenizer that is used gives one text the same tokens every time. */
export const bpeModel = ({ unknown, byteFallback = false, ignoreMerges = false, vocab, merges }: BpeParts) => ({
  type: 'BPE',
  dropout: null,
  unk_token: unknown ?? null,
  continuing_subword_prefix: null,
  end_of_word_suffix: null,
  fuse_unk: byteFallback,
  byte_fallback: byteFallback,
  ignore_merges: ignoreMerges,
  vocab,
  merges,
});

/** Bytes as GPT-2 spells them. `words`: cut by its expression, too. */
export const byteLevel = (words: boolean) => ({
  ...{ type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: words },
});
export const byteLevelDecoder = { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true };

interface End {
  readonly id: number;
  readonly token: string;
}

/** Puts tokens around every text; null where there are none to put. */
export function aroundText(bos: End | undefined, eos: End | undefined): object | null {
  const ends = [bos, eos].filter((end) => end !== undefined);
  if (ends.length === 0) return null;
  const one = (end: End | undefined, type: number) => (end ? [{ SpecialToken: { id: end.token, type_id: type } }] : []);
  const around = (id: string, type: number) => [...one(bos, type), { Sequence: { id, type_id: type } }, ...one(eos, type)]; // prettier-ignore
  return {
    type: 'TemplateProcessing',
    single: around('A', 0),
    pair: [...around('A', 0), ...around('B', 1)],
    special_tokens: Object.fromEntries(ends.map(({ id, token }) => [token, { id: token, ids: [id], tokens: [token] }])),
  };
}
