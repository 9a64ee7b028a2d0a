import {
  addedToken,
  aroundText,
  bpeModel,
  byteLevel,
  byteLevelDecoder,
  tokenizerJson,
} from '../base/tokenizer-json.js';
import type { GgufValue } from '../formats/gguf.js';
import { pieceKinds as kinds } from '../formats/sentencepiece.js';

/** One way of llama.cpp to cut text into words. */
interface PreTokenizer {
  /** Values of `tokenizer.ggml.pre`; the first one is written. */
  readonly names: readonly [string, ...string[]];
  /** As tokenizer.json has them; none: ByteLevel with its own expression. */
  readonly patterns: readonly string[];
  /** A word that is a token is that token, whatever the merges make of it (`ignore_merges` of tokenizer.json). */
  readonly ignoreMerges?: boolean;
  /** Texts begin with BOS where the file does not say whether they do. */
  readonly bos?: boolean;
}

const llama3 = ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]; // prettier-ignore

/**
 * Pre-tokenizers that llama.cpp knows, by the regular expressions of tokenizer.json. A wrong one would silently cut
 * text otherwise than in training, so an unknown one is refused.
 */
export const preTokenizers: readonly PreTokenizer[] = [
  { names: ['gpt-2', 'olmo'], patterns: [] },
  { names: ['llama-bpe', 'llama3', 'llama-v3', 'falcon3'], patterns: llama3, ignoreMerges: true, bos: true },
  { names: ['smaug-bpe', 'dbrx', 'glm4', 'chatglm-bpe'], patterns: llama3 },
  { names: ['qwen2', 'deepseek-r1-qwen'], patterns: ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"] },
  { names: ['deepseek-v3'], patterns: [
    '\\p{N}{1,3}',
    '[一-龥\u3040-ゟ゠-ヿ]+',
    '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
  ] },
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
  else if (kind === 'gpt2' && preTokenizerOf(metadata) === undefined) {
    return { files, notes: [`The tokenizer of the GGUF file cuts text in a way that is not known here (${preOf(metadata)}): put the model's tokenizer.json beside it.`] }; // prettier-ignore
  } else if (kind === 'gpt2') tokenizer = JSON.stringify(byteBpe(metadata, tokens, types), null, 1);
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
const preTokenizerOf = (metadata: ReadonlyMap<string, GgufValue>): PreTokenizer | undefined =>
  preTokenizers.find(({ names }) => names.includes(preOf(metadata)));
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
    return [addedToken(id, content, kind !== kinds.userDefined)];
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
  const end = (key: 'bos' | 'eos', isDefault: boolean) => {
    const token = (flag(metadata, `add_${key}_token`) ?? isDefault) ? tokenOf(metadata, tokens, key) : undefined;
    return token === undefined ? undefined : { id: tokens.indexOf(token), token };
  };
  return aroundText(end('bos', defaultBos), end('eos', defaultEos));
}

function byteBpe(
  metadata: ReadonlyMap<string, GgufValue>,
  tokens: readonly string[],
  types: readonly number[],
): object {
  const { patterns, ignoreMerges = false, bos = false } = preTokenizerOf(metadata)!;
  const bytes = byteLevel(patterns.length === 0);
  const splits = patterns.map((Regex) => ({ type: 'Split', pattern: { Regex }, behavior: 'Isolated', invert: false }));
  const merges = (strings(metadata, 'merges') ?? []).map((merge) => merge.split(' '));
  return tokenizerJson({
    added: addedTokens(tokens, types),
    preTokenizer: splits.length === 0 ? bytes : { type: 'Sequence', pretokenizers: [...splits, bytes] },
    postProcessor: template(metadata, tokens, bos),
    decoder: byteLevelDecoder,
    model: bpeModel({ ignoreMerges, vocab: vocabOf(tokens, types), merges }),
  });
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
  return tokenizerJson({
    added: addedTokens(tokens, types),
    normalizer: prefix ? { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: space }, replace] } : replace,
    preTokenizer: null,
    postProcessor: template(metadata, tokens, true),
    decoder: {
      type: 'Sequence',
      decoders: [
        { type: 'Replace', pattern: { String: space }, content: ' ' },
        { type: 'ByteFallback' },
        { type: 'Fuse' },
        ...(prefix ? [{ type: 'Strip', content: ' ', start: 1, stop: 0 }] : []),
      ],
    },
    model: bpeModel({
      unknown: tokens[types.indexOf(kinds.unknown)],
      byteFallback: true,
      vocab: vocabOf(tokens, types),
      merges: mergesOf(tokens, types, scores),
    }),
  });
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
  const spaces = { type: 'Metaspace', replacement: '▁', prepend_scheme, split: false };
  return tokenizerJson({
    added: addedTokens(tokens, types),
    normalizer: normalizers.length > 0 ? { type: 'Sequence', normalizers } : null,
    preTokenizer: spaces,
    postProcessor: template(metadata, tokens, false, true),
    decoder: spaces,
    model: {
      type: 'Unigram',
      unk_id: typeof unknown === 'number' ? unknown : types.indexOf(kinds.unknown),
      vocab,
      byte_fallback: false,
    },
  });
}
