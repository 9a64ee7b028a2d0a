import type { GgufValue } from '../formats/gguf.js';
import { pieceKinds as kinds } from '../formats/sentencepiece.js';

/**
 * Pre-tokenizers that llama.cpp knows, by the regular expressions of tokenizer.json. A wrong one would silently cut
 * text otherwise than in training, so an unknown one is refused.
 */
export const preTokenizers: readonly (readonly [pre: string, patterns: readonly string[]])[] = [
  ['gpt-2', []], // ByteLevel with its own expression
  ['llama-bpe', ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]],
  ['qwen2', ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]],
  ['deepseek-v3', [
    '\\p{N}{1,3}',
    '[一-龥\u3040-ゟ゠-ヿ]+',
    '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
  ]],
]; // prettier-ignore

const strings = (metadata: ReadonlyMap<string, GgufValue>, key: string): string[] | undefined => {
  const found = metadata.get(`tokenizer.ggml.${key}`);
  return found?.type === 'array' && found.of === 'string' ? (found.value as string[]) : undefined;
};
const numbers = (metadata: ReadonlyMap<string, GgufValue>, key: string): number[] | undefined => {
  const found = metadata.get(`tokenizer.ggml.${key}`);
  return found?.type === 'array' && found.of !== 'string' ? (found.value as number[]) : undefined;
};

/** tokenizer.json and tokenizer_config.json from GGUF metadata, by file name; none for models that are neither BPE nor Unigram. */
export function tokenizerFromGguf(metadata: ReadonlyMap<string, GgufValue>): {
  files: Map<string, string>;
  notes: string[];
} {
  const files = new Map<string, string>();
  const tokens = strings(metadata, 'tokens');
  const kind = metadata.get('tokenizer.ggml.model')?.value;
  if (tokens === undefined) return { files, notes: ['The GGUF file has no tokenizer.'] };
  const types = numbers(metadata, 'token_type') ?? tokens.map(() => kinds.normal);
  const whole = metadata.get('tokenizer.huggingface.json')?.value;
  let tokenizer: string;
  if (typeof whole === 'string') tokenizer = whole;
  else if (kind === 'gpt2' && !preTokenizers.some(([name]) => name === preOf(metadata))) {
    return { files, notes: [`The tokenizer of the GGUF file cuts text in a way that is not known here (${preOf(metadata)}): put the model's tokenizer.json beside it.`] }; // prettier-ignore
  } else if (kind === 'gpt2') tokenizer = JSON.stringify(byteLevel(metadata, tokens, types), null, 1);
  else if (kind === 'llama') tokenizer = JSON.stringify(sentencePiece(metadata, tokens, types), null, 1);
  else if (kind === 't5') tokenizer = JSON.stringify(unigram(metadata, tokens, types), null, 1);
  else return { files, notes: [`The tokenizer of the GGUF file (${String(kind)}) is of a kind that is not rebuilt.`] };
  files.set('tokenizer.json', tokenizer);
  files.set('tokenizer_config.json', `${JSON.stringify(tokenizerConfig(metadata, tokens), null, 2)}\n`);
  return { files, notes: [] };
}

const preOf = (metadata: ReadonlyMap<string, GgufValue>): string => {
  const pre = metadata.get('tokenizer.ggml.pre')?.value;
  return typeof pre === 'string' ? pre : 'gpt-2';
};
const flag = (metadata: ReadonlyMap<string, GgufValue>, key: string): boolean | undefined => {
  const value = metadata.get(`tokenizer.ggml.${key}`)?.value;
  return typeof value === 'boolean' ? value : undefined;
};
const tokenOf = (
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  key: string,
): string | undefined => {
  const id = metadata.get(`tokenizer.ggml.${key}_token_id`)?.value;
  return typeof id === 'number' ? tokens[id] : undefined;
};

function tokenizerConfig(metadata: ReadonlyMap<string, GgufValue>, tokens: readonly string[]): object {
  const named = { bos_token: 'bos', eos_token: 'eos', unk_token: 'unknown', pad_token: 'padding' };
  const found = Object.entries(named).map(([name, key]) => [name, tokenOf(metadata, tokens, key)] as const);
  const template = metadata.get('tokenizer.chat_template')?.value;
  return {
    tokenizer_class: 'PreTrainedTokenizerFast',
    clean_up_tokenization_spaces: false,
    ...Object.fromEntries(found.filter(([, token]) => token !== undefined)),
    ...(typeof template === 'string' && { chat_template: template }),
  };
}

function addedTokens(tokens: readonly string[], types: readonly number[]): object[] {
  return tokens.flatMap((content, id) => {
    const kind = types[id];
    if (kind !== kinds.control && kind !== kinds.userDefined && kind !== kinds.unknown) return [];
    const special = kind !== kinds.userDefined;
    return [{ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special }];
  });
}

const isPadding = (token: string, kind: number | undefined): boolean =>
  kind === kinds.unused && /^\[PAD\d+\]$/.test(token);

/** Added tokens too: one that the vocabulary lacks would get the next free id instead of its own. */
function vocabOf(tokens: readonly string[], types: readonly number[]): Record<string, number> {
  const vocab = Object.create(null) as Record<string, number>;
  tokens.forEach((token, id) => {
    if (!isPadding(token, types[id])) vocab[token] = id;
  });
  return vocab;
}

function template(
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  defaultBos: boolean,
  defaultEos = false,
): object | null {
  const bos = (flag(metadata, 'add_bos_token') ?? defaultBos) ? tokenOf(metadata, tokens, 'bos') : undefined;
  const eos = (flag(metadata, 'add_eos_token') ?? defaultEos) ? tokenOf(metadata, tokens, 'eos') : undefined;
  const ends = [bos, eos].filter((token) => token !== undefined);
  if (ends.length === 0) return null;
  const one = (id: string, type: number): object => ({ SpecialToken: { id, type_id: type } });
  const sequence = (id: string, type: number): object[] => [
    ...(bos === undefined ? [] : [one(bos, type)]),
    { Sequence: { id, type_id: type } },
    ...(eos === undefined ? [] : [one(eos, type)]),
  ];
  const special = ends.map((id) => [id, { id, ids: [tokens.indexOf(id)], tokens: [id] }] as const);
  return {
    type: 'TemplateProcessing',
    single: sequence('A', 0),
    pair: [...sequence('A', 0), ...sequence('B', 1)],
    special_tokens: Object.fromEntries(special),
  };
}

function byteLevel(
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  types: readonly number[],
): object {
  const pre = preOf(metadata);
  const known = preTokenizers.find(([name]) => name === pre)!;
  const [, patterns] = known;
  const bytes = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: patterns.length === 0 };
  const splits = patterns.map((Regex) => ({ type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false }));
  const merges = (strings(metadata, 'merges') ?? []).map((merge) => merge.split(' '));
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: addedTokens(tokens, types),
    normalizer: null,
    pre_tokenizer: splits.length === 0 ? bytes : { type: 'Sequence', pretokenizers: [...splits, bytes] },
    post_processor: template(metadata, tokens, false),
    decoder: { type: 'ByteLevel', add_prefix_space: true, trim_offsets: true, use_regex: true },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: false,
      byte_fallback: false,
      ignore_merges: pre === 'llama-bpe',
      vocab: vocabOf(tokens, types),
      merges,
    },
  };
}

function sentencePiece(
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  types: readonly number[],
): object {
  const scores = numbers(metadata, 'scores') ?? tokens.map((_, id) => -id);
  const space = '▁';
  const prefix = flag(metadata, 'add_space_prefix') ?? true;
  const replace = { type: 'Replace', pattern: { String: ' ' }, content: space };
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: addedTokens(tokens, types),
    normalizer: prefix ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: space }, replace] } : replace,
    pre_tokenizer: null,
    post_processor: template(metadata, tokens, true),
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: space }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
    model: {
      type: 'BPE',
      dropout: null,
      unk_token: tokens[types.indexOf(kinds.unknown)] ?? null,
      continuing_subword_prefix: null,
      end_of_word_suffix: null,
      fuse_unk: true,
      byte_fallback: true,
      vocab: vocabOf(tokens, types),
      merges: mergesOf(tokens, types, scores),
    },
  };
}

/** All pairs of pieces that make a piece, best piece first: SentencePiece knows scores of pieces, BPE ranks of merges. */
function mergesOf(tokens: readonly string[], types: readonly number[], scores: readonly number[]): [string, string][] {
  const ids = new Map(tokens.map((token, id) => [token, id]));
  const found: { pair: [string, string]; score: number; left: number; right: number }[] = [];
  tokens.forEach((token, id) => {
    if (types[id] !== kinds.normal) return;
    // Cutting takes the square of the length; the longest pieces of real vocabularies have 128 characters.
    if (token.length > 512) return;
    const points = [...token];
    for (let cut = 1; cut < points.length; cut++) {
      const pair: [string, string] = [points.slice(0, cut).join(''), points.slice(cut).join('')];
      const [left, right] = [ids.get(pair[0]), ids.get(pair[1])];
      if (left !== undefined && right !== undefined) found.push({ pair, score: scores[id]!, left, right });
    }
  });
  return found.sort((a, b) => b.score - a.score || a.left - b.left || a.right - b.right).map(({ pair }) => pair);
}

/**
 * Unigram as llama.cpp understands "t5": the best path over the whole text, spaces as parts of it, unknown characters at
 * a price below the least score of a normal token.
 */
function unigram(
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  types: readonly number[],
): object {
  const scores = numbers(metadata, 'scores') ?? tokens.map(() => 0);
  const space = '▁';
  const prepend_scheme = (flag(metadata, 'add_space_prefix') ?? true) ? 'always' : 'never';
  const charsmap = Buffer.from((numbers(metadata, 'precompiled_charsmap') ?? []).map((byte) => byte & 255));
  const normalizers = [
    ...(charsmap.length > 0 ? [{ type: 'Precompiled', precompiled_charsmap: charsmap.toString('base64') }] : []),
    ...(flag(metadata, 'remove_extra_whitespaces') === true
      ? [
          { type: 'Strip', strip_left: true, strip_right: true },
          { type: 'Replace', pattern: { Regex: ' {2,}' }, content: ' ' },
        ]
      : []),
  ];
  // The price of the unknown follows from the least score: rows without a token must not set it.
  const least = tokens.reduce((least, _, id) => (types[id] === kinds.normal ? Math.min(least, scores[id]!) : least), 0);
  const end = tokens.findLastIndex((token, id) => !isPadding(token, types[id])) + 1;
  const vocab = tokens.slice(0, end).map((token, id) => [token, isPadding(token, types[id]) ? least : scores[id]!]);
  const unknown = metadata.get('tokenizer.ggml.unknown_token_id')?.value;
  return {
    version: '1.0',
    truncation: null,
    padding: null,
    added_tokens: addedTokens(tokens, types),
    normalizer: normalizers.length > 0 ? { type: 'Sequence', normalizers } : null,
    pre_tokenizer: { type: 'Metaspace', replacement: space, prepend_scheme, split: false },
    post_processor: template(metadata, tokens, false, true),
    decoder: { type: 'Metaspace', replacement: space, prepend_scheme, split: false },
    model: {
      type: 'Unigram',
      unk_id: typeof unknown === 'number' ? unknown : types.indexOf(kinds.unknown),
      vocab,
      byte_fallback: false,
    },
  };
}
