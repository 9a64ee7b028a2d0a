import { badInput } from '../base/errors.js';
import type { GgufScalar, GgufValue } from '../formats/gguf.js';
import { isJsonObject } from '../formats/json.js';
import type { JsonObject, JsonValue } from '../formats/json.js';

/** llama.cpp's kinds of tokens. */
const kinds = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

/**
 * Pre-tokenizers that llama.cpp knows, by the regular expressions of tokenizer.json. A wrong one would silently cut
 * text otherwise than in training, so an unknown one is refused.
 */
const preTokenizers: readonly (readonly [pre: string, patterns: readonly string[]])[] = [
  ['gpt-2', []], // ByteLevel with its own expression
  ['llama-bpe', ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]],
  ['qwen2', ["(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"]],
  ['deepseek-v3', [
    '\\p{N}{1,3}',
    '[一-龥\u3040-ゟ゠-ヿ]+',
    '[!"#$%&\'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+',
  ]],
]; // prettier-ignore

export interface TokenizerFiles {
  /** tokenizer.json as text, and parsed. */
  readonly text: string;
  readonly tokenizer: JsonObject;
  /** tokenizer_config.json. */
  readonly config: JsonObject;
  /** chat_template.jinja, where the template is not in tokenizer_config.json. */
  readonly chatTemplate?: string | undefined;
}

interface AddedToken {
  readonly id: number;
  readonly content: string;
  readonly special: boolean;
}

const fail = (what: string, got?: unknown, expected?: string, hint?: string): Error =>
  badInput(what, {
    where: 'tokenizer.json',
    ...(got !== undefined && { got: JSON.stringify(got).slice(0, 200) }),
    ...(expected !== undefined && { expected }),
    ...(hint !== undefined && { hint }),
  });

const records = (value: JsonValue | undefined): JsonObject[] =>
  Array.isArray(value) ? value.filter(isJsonObject) : [];

/**
 * Tokenizer metadata of GGUF: byte-level BPE ("gpt2") and SentencePiece-like BPE with byte fallback ("llama").
 * tokenizer.json itself goes along (`tokenizer.huggingface.json` of the GGUF specification), so that the way back is exact.
 * Errors (kind 'input'): other models (Unigram, WordPiece), pre-tokenizers that llama.cpp does not know.
 */
export function tokenizerToGguf(files: TokenizerFiles, vocabSize: number): Map<string, GgufValue> {
  const { tokenizer, config } = files;
  const model = tokenizer['model'];
  if (!isJsonObject(model) || model['type'] !== 'BPE' || !isJsonObject(model['vocab'])) {
    throw fail('This tokenizer is not written as GGUF', isJsonObject(model) ? model['type'] : model, 'a BPE model');
  }
  const vocab = model['vocab'] as Record<string, number>;
  const merges = (Array.isArray(model['merges']) ? model['merges'] : []).map((merge) =>
    Array.isArray(merge) ? (merge as string[]).join(' ') : (merge as string),
  );
  const added = records(tokenizer['added_tokens']).map(
    (token): AddedToken => ({ id: token['id'] as number, content: token['content'] as string, special: token['special'] === true }), // prettier-ignore
  );
  const isBytes = model['byte_fallback'] === true;
  const out = new Map<string, GgufValue>();
  const set = (key: string, type: Exclude<GgufValue['type'], 'array'>, value: GgufScalar): void => {
    out.set(`tokenizer.${key}`, { type, value });
  };
  const list = (key: string, of: 'string' | 'f32' | 'i32', value: GgufScalar[]): void => {
    out.set(`tokenizer.ggml.${key}`, { type: 'array', of, value });
  };
  set('ggml.model', 'string', isBytes ? 'llama' : 'gpt2');
  set('ggml.pre', 'string', isBytes ? 'default' : findPre(tokenizer));
  const { tokens, types } = listTokens(vocab, added, vocabSize, isBytes ? (model['unk_token'] ?? null) : null);
  list('tokens', 'string', tokens);
  if (isBytes) list('scores', 'f32', scoresOf(tokens, merges));
  list('token_type', 'i32', types);
  if (!isBytes) list('merges', 'string', merges);
  const idOf = new Map<string, number>([
    ...Object.entries(vocab),
    ...added.map(({ content, id }) => [content, id] as const),
  ]);
  for (const [key, name] of [['bos', 'bos_token'], ['eos', 'eos_token'], ['unknown', 'unk_token'], ['padding', 'pad_token']] as const) {
    const id = idOf.get(tokenText(config[name]) ?? '');
    if (id !== undefined) set(`ggml.${key}_token_id`, 'u32', id);
  } // prettier-ignore
  const ends = templateEnds(tokenizer, tokenText(config['bos_token']), tokenText(config['eos_token']));
  set('ggml.add_bos_token', 'bool', (config['add_bos_token'] as boolean | undefined) ?? ends.bos);
  set('ggml.add_eos_token', 'bool', (config['add_eos_token'] as boolean | undefined) ?? ends.eos);
  if (isBytes)
    set('ggml.add_space_prefix', 'bool', JSON.stringify(tokenizer['normalizer'] ?? null).includes('"Prepend"'));
  const template = files.chatTemplate ?? config['chat_template'];
  if (typeof template === 'string') set('chat_template', 'string', template);
  set('huggingface.json', 'string', files.text);
  return out;
}

const tokenText = (value: JsonValue | undefined): string | undefined =>
  typeof value === 'string' ? value : isJsonObject(value) ? (value['content'] as string) : undefined;

function findPre(tokenizer: JsonObject): string {
  const pre = tokenizer['pre_tokenizer'];
  const steps =
    isJsonObject(pre) && pre['type'] === 'Sequence' ? records(pre['pretokenizers']) : isJsonObject(pre) ? [pre] : [];
  const bytes = steps.at(-1);
  if (bytes?.['type'] !== 'ByteLevel')
    throw fail('This pre-tokenizer is not written as GGUF', pre, 'one that ends in ByteLevel');
  const patterns = steps.slice(0, -1).map((step) => {
    const pattern = step['pattern'];
    if (step['type'] === 'Split' && isJsonObject(pattern) && step['behavior'] === 'Isolated')
      return pattern['Regex'] as string;
    throw fail('This pre-tokenizer is not written as GGUF', step, 'Split by a regular expression');
  });
  const own = bytes['use_regex'] !== false;
  const found = preTokenizers.find(
    ([, known]) => known.join('\0') === patterns.join('\0') && (known.length === 0) === own,
  );
  if (found !== undefined) return found[0];
  throw fail('llama.cpp may not know the pre-tokenizer of this model', patterns, preTokenizers.map(([name]) => name).join(', '),
    'Text would be cut otherwise than in training. Use --format safetensors.'); // prettier-ignore
}

function listTokens(
  vocab: Readonly<Record<string, number>>,
  added: readonly AddedToken[],
  vocabSize: number,
  unknown: JsonValue,
): { tokens: string[]; types: number[] } {
  const tokens: string[] = Array.from({ length: vocabSize }, (_, i) => `[PAD${i}]`);
  const types: number[] = Array.from({ length: vocabSize }, () => kinds.unused);
  const put = (id: number, text: string, kind: number): void => {
    if (!Number.isSafeInteger(id) || id < 0 || id >= vocabSize) throw fail('A token has no row in the embedding', { id, text }, `ids below vocab_size ${vocabSize}`); // prettier-ignore
    tokens[id] = text;
    types[id] = kind;
  };
  for (const text in vocab) {
    const isByte = unknown !== null && /^<0x[0-9A-F]{2}>$/.test(text);
    put(vocab[text]!, text, isByte ? kinds.byte : text === unknown ? kinds.unknown : kinds.normal);
  }
  for (const { id, content, special } of added) {
    if (content === unknown) continue;
    // llama.cpp wants control tokens marked; some models forget to call them special.
    const looksSpecial =
      /^<\|.*\|>$|^<｜.*｜>$|^<unused.*>$/.test(content) || ['<pad>', '<mask>', '<2mass>', '[@BOS@]'].includes(content);
    if (special || looksSpecial) put(id, content, kinds.control);
    else put(id, content.replaceAll('▁', ' '), kinds.userDefined);
  }
  return { tokens, types };
}

/** SentencePiece merges the pair whose result has the highest score: minus the rank of the merge that makes it. */
function scoresOf(tokens: readonly string[], merges: readonly string[]): number[] {
  const ranks = new Map<string, number>();
  merges.forEach((merge, rank) => {
    const text = merge.replace(' ', '');
    if (!ranks.has(text)) ranks.set(text, rank);
  });
  return tokens.map((token) => (ranks.has(token) ? -ranks.get(token)! : [...token].length > 1 ? -1e9 : 0));
}

function templateEnds(
  tokenizer: JsonObject,
  bos: string | undefined,
  eos: string | undefined,
): { bos: boolean; eos: boolean } {
  const processor = tokenizer['post_processor'];
  const all = isJsonObject(processor) && processor['type'] === 'Sequence' ? records(processor['processors']) : isJsonObject(processor) ? [processor] : []; // prettier-ignore
  const single = records(all.find((one) => one['type'] === 'TemplateProcessing')?.['single']);
  const text = (item: JsonObject | undefined): JsonValue | undefined => {
    const special = item?.['SpecialToken'];
    return isJsonObject(special) ? special['id'] : undefined;
  };
  return { bos: bos !== undefined && text(single[0]) === bos, eos: eos !== undefined && text(single.at(-1)) === eos };
}

const strings = (metadata: ReadonlyMap<string, GgufValue>, key: string): string[] | undefined => {
  const found = metadata.get(`tokenizer.ggml.${key}`);
  return found?.type === 'array' && found.of === 'string' ? (found.value as string[]) : undefined;
};
const numbers = (metadata: ReadonlyMap<string, GgufValue>, key: string): number[] | undefined => {
  const found = metadata.get(`tokenizer.ggml.${key}`);
  return found?.type === 'array' && found.of !== 'string' ? (found.value as number[]) : undefined;
};

/** tokenizer.json and tokenizer_config.json from GGUF metadata, by file name; none for models that are neither BPE form. */
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
): object | null {
  const bos = (flag(metadata, 'add_bos_token') ?? defaultBos) ? tokenOf(metadata, tokens, 'bos') : undefined;
  const eos = flag(metadata, 'add_eos_token') === true ? tokenOf(metadata, tokens, 'eos') : undefined;
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
