import { badInput } from '../base/errors.js';
import type { GgufScalar, GgufValue } from '../formats/gguf.js';
import { isJsonObject } from '../formats/json.js';
import type { JsonObject, JsonValue } from '../formats/json.js';
import { pieceKinds as kinds } from '../formats/sentencepiece.js';
import { preTokenizers } from './gguf-tokenizer-files.js';

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
 * Tokenizer metadata of GGUF: byte-level BPE ("gpt2"), SentencePiece-like BPE with byte fallback ("llama"), Unigram ("t5").
 * tokenizer.json itself goes along (`tokenizer.huggingface.json` of the GGUF specification), so that the way back is exact.
 * Errors (kind 'input'): other models (WordPiece), pre-tokenizers and normalizers that llama.cpp does not know.
 */
export function tokenizerToGguf(files: TokenizerFiles, vocabSize: number): Map<string, GgufValue> {
  const { tokenizer, config } = files;
  const model = tokenizer['model'];
  if (!isJsonObject(model)) throw fail('This tokenizer is not written as GGUF', model, 'a model');
  const added = records(tokenizer['added_tokens']).map(({ id, content, special }): AddedToken => {
    if (typeof id === 'number' && typeof content === 'string') return { id, content, special: special === true };
    throw fail('An added token has no id or no text', { id, content });
  });
  const writer = new TokenizerMetadata();
  const vocab =
    model['type'] === 'Unigram'
      ? writeUnigram(writer, tokenizer, model, added, vocabSize)
      : writeBpe(writer, tokenizer, model, added, vocabSize);
  writer.special(
    new Map([...vocab, ...added.map(({ content, id }) => [content, id] as const)]),
    config,
    templateEnds(tokenizer, tokenText(config['bos_token']), tokenText(config['eos_token'])),
  );
  const template = files.chatTemplate ?? config['chat_template'];
  if (typeof template === 'string') writer.set('chat_template', 'string', template);
  writer.set('huggingface.json', 'string', files.text);
  return writer.metadata;
}

/** Metadata under `tokenizer.`. */
export class TokenizerMetadata {
  readonly metadata = new Map<string, GgufValue>();

  set(key: string, type: Exclude<GgufValue['type'], 'array'>, value: GgufScalar): void {
    this.metadata.set(`tokenizer.${key}`, { type, value });
  }

  list(key: string, of: 'string' | 'f32' | 'i32' | 'u8', value: readonly GgufScalar[]): void {
    this.metadata.set(`tokenizer.ggml.${key}`, { type: 'array', of, value });
  }

  /** Ids of the tokens that tokenizer_config.json names, and what is put around a text. */
  special(
    idOf: ReadonlyMap<string, number>,
    config: JsonObject,
    ends: { readonly bos: boolean; readonly eos: boolean },
  ): void {
    for (const [key, name] of [['bos', 'bos_token'], ['eos', 'eos_token'], ['unknown', 'unk_token'], ['padding', 'pad_token']] as const) {
      const id = idOf.get(tokenText(config[name]) ?? '');
      if (id !== undefined) this.set(`ggml.${key}_token_id`, 'u32', id);
    } // prettier-ignore
    const flag = (value: JsonValue | undefined, or: boolean): boolean => (typeof value === 'boolean' ? value : or);
    this.set('ggml.add_bos_token', 'bool', flag(config['add_bos_token'], ends.bos));
    this.set('ggml.add_eos_token', 'bool', flag(config['add_eos_token'], ends.eos));
  }
}

type Vocab = readonly (readonly [token: string, id: number])[];

function writeBpe(
  out: TokenizerMetadata,
  tokenizer: JsonObject,
  model: JsonObject,
  added: readonly AddedToken[],
  vocabSize: number,
): Vocab {
  if (model['type'] !== 'BPE' || !isJsonObject(model['vocab'])) {
    throw fail('This tokenizer is not written as GGUF', model['type'], 'a BPE or a Unigram model');
  }
  const vocab = Object.entries(model['vocab'] as Record<string, number>);
  const merges = (Array.isArray(model['merges']) ? model['merges'] : []).map((merge) => {
    const text = Array.isArray(merge) && merge.every((part) => typeof part === 'string') ? merge.join(' ') : merge;
    if (typeof text === 'string') return text;
    throw fail('A merge is no pair of texts', merge);
  });
  const isBytes = model['byte_fallback'] === true;
  const ignoreMerges = model['ignore_merges'] === true;
  if (isBytes && ignoreMerges) throw fail('llama.cpp does not ignore the merges of tokenizers that fall back to bytes', 'ignore_merges true', 'false', keep); // prettier-ignore
  out.set('ggml.model', 'string', isBytes ? 'llama' : 'gpt2');
  out.set('ggml.pre', 'string', isBytes ? 'default' : findPre(tokenizer, ignoreMerges));
  const { tokens, types } = listTokens(vocab, added, vocabSize, isBytes ? (model['unk_token'] ?? null) : null, isBytes);
  out.list('tokens', 'string', tokens);
  if (isBytes) out.list('scores', 'f32', scoresOf(tokens, merges));
  out.list('token_type', 'i32', types);
  if (!isBytes) out.list('merges', 'string', merges);
  else out.set('ggml.add_space_prefix', 'bool', JSON.stringify(tokenizer['normalizer'] ?? null).includes('"Prepend"'));
  return vocab;
}

/** As llama.cpp's converter writes the tokenizers of T5 and XLM-R; llama.cpp finds the best path over the whole text. */
function writeUnigram(
  out: TokenizerMetadata,
  tokenizer: JsonObject,
  model: JsonObject,
  added: readonly AddedToken[],
  vocabSize: number,
): Vocab {
  const entries = (Array.isArray(model['vocab']) ? model['vocab'] : []).map((entry): readonly [string, number] => {
    const [token, score] = Array.isArray(entry) ? entry : [];
    if (typeof token === 'string' && typeof score === 'number') return [token, score];
    throw fail('A token of a Unigram tokenizer is no text with a score', entry);
  });
  const unknown = model['unk_id'];
  if (typeof unknown !== 'number' || entries[unknown] === undefined) {
    throw fail('This Unigram tokenizer has no unknown token', unknown ?? null, 'unk_id, a token of its vocabulary');
  }
  if (model['byte_fallback'] === true) {
    throw fail('llama.cpp has no Unigram tokenizer that falls back to bytes', 'byte_fallback true', 'false', keep);
  }
  const vocab = entries.map(([token], id) => [token, id] as const);
  const { tokens, types } = listTokens(vocab, added, vocabSize, entries[unknown][0], false);
  const outside = new Set(added.map(({ id }) => id).filter((id) => entries[id] === undefined));
  const { prefix, merge, charsmap } = unigramSpaces(tokenizer);
  out.set('ggml.model', 'string', 't5');
  out.set('ggml.pre', 'string', 'default');
  out.list('tokens', 'string', tokens);
  out.list('scores', 'f32', tokens.map((_, id) => entries[id]?.[1] ?? (outside.has(id) ? addedScore : paddingScore)));
  out.list('token_type', 'i32', types);
  out.set('ggml.unknown_token_id', 'u32', unknown);
  out.set('ggml.add_space_prefix', 'bool', prefix);
  out.set('ggml.remove_extra_whitespaces', 'bool', merge);
  if (charsmap.length > 0) out.list('precompiled_charsmap', 'u8', [...charsmap]);
  return vocab;
} // prettier-ignore

/** Scores of tokens that no model gave one, as llama.cpp's converter sets them. */
export const addedScore = -1000;
export const paddingScore = -10_000;
const keep = 'Text would be cut otherwise than in training. Use --format safetensors.';

/** What a Unigram tokenizer does to a text before it looks for tokens; all else than llama.cpp can do is refused. */
function unigramSpaces(tokenizer: JsonObject): { prefix: boolean; merge: boolean; charsmap: Buffer } {
  const steps = (name: string, list: string): JsonObject[] => {
    const whole = tokenizer[name];
    if (!isJsonObject(whole)) return [];
    return whole['type'] === 'Sequence' ? records(whole[list]) : [whole];
  };
  let [prefix, merge, charsmap] = [false, false, Buffer.alloc(0)];
  for (const step of steps('normalizer', 'normalizers')) {
    const pattern = isJsonObject(step['pattern']) ? step['pattern'] : {};
    const content = step['content'];
    if (step['type'] === 'Precompiled' && typeof step['precompiled_charsmap'] === 'string' && charsmap.length === 0)
      charsmap = Buffer.from(step['precompiled_charsmap'], 'base64');
    else if (step['type'] === 'Replace' && pattern['Regex'] === ' {2,}' && (content === ' ' || content === '▁')) merge = true; // prettier-ignore
    else if (step['type'] === 'Prepend' && step['prepend'] === '▁') prefix = true;
    else if (!(step['type'] === 'Strip' || (step['type'] === 'Replace' && pattern['String'] === ' ' && content === '▁')))
      throw fail('llama.cpp does not know this normalizer of Unigram tokenizers', step, 'Precompiled, Strip, Replace or Prepend of spaces', keep); // prettier-ignore
  }
  for (const step of steps('pre_tokenizer', 'pretokenizers')) {
    if (step['type'] === 'WhitespaceSplit') merge = true;
    else if (step['type'] === 'Metaspace' && (step['replacement'] ?? '▁') === '▁')
      prefix = step['prepend_scheme'] === undefined ? step['add_prefix_space'] !== false : step['prepend_scheme'] !== 'never'; // prettier-ignore
    else throw fail('llama.cpp does not know this pre-tokenizer of Unigram tokenizers', step, 'WhitespaceSplit, Metaspace', keep); // prettier-ignore
  }
  // Where llama.cpp merges spaces it puts one in front of the first word, too.
  if (merge && !prefix) throw fail('llama.cpp would put a space in front of the text', tokenizer['pre_tokenizer'] ?? null, 'a tokenizer that does, or one that keeps spaces as they are', keep); // prettier-ignore
  return { prefix, merge, charsmap };
}

export function tokenText(value: JsonValue | undefined): string | undefined {
  const text = isJsonObject(value) ? value['content'] : value;
  return typeof text === 'string' ? text : undefined;
}

function findPre(tokenizer: JsonObject, ignoreMerges: boolean): string {
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
  const known = preTokenizers.filter(
    (one) => one.patterns.join('\0') === patterns.join('\0') && (one.patterns.length === 0) === own,
  );
  const found = known.find((one) => (one.ignoreMerges ?? false) === ignoreMerges);
  if (found !== undefined) return found.names[0];
  if (known.length > 0)
    throw fail(
      'llama.cpp does not know this pre-tokenizer together with ignore_merges',
      `ignore_merges ${ignoreMerges}`,
      `ignore_merges ${!ignoreMerges}`,
      keep,
    );
  throw fail('llama.cpp may not know the pre-tokenizer of this model', patterns, preTokenizers.map(({ names: [name] }) => name).join(', '), keep); // prettier-ignore
}

function listTokens(
  vocab: Vocab,
  added: readonly AddedToken[],
  vocabSize: number,
  unknown: JsonValue,
  hasBytes: boolean,
): { tokens: string[]; types: number[] } {
  const tokens: string[] = Array.from({ length: vocabSize }, (_, i) => `[PAD${i}]`);
  const types: number[] = Array.from({ length: vocabSize }, () => kinds.unused);
  const put = (id: number, text: string, kind: number): void => {
    if (!Number.isSafeInteger(id) || id < 0 || id >= vocabSize) throw fail('A token has no row in the embedding', { id, text }, `ids below vocab_size ${vocabSize}`); // prettier-ignore
    tokens[id] = text;
    types[id] = kind;
  };
  for (const [text, id] of vocab) {
    const isByte = hasBytes && unknown !== null && /^<0x[0-9A-F]{2}>$/.test(text);
    put(id, text, isByte ? kinds.byte : text === unknown ? kinds.unknown : kinds.normal);
  }
  for (const { id, content, special } of added) {
    if (content === unknown) continue;
    if (special || looksSpecial(content)) put(id, content, kinds.control);
    else put(id, content.replaceAll('▁', ' '), kinds.userDefined);
  }
  return { tokens, types };
}

/** llama.cpp wants control tokens marked; some models forget to call them special. */
export const looksSpecial = (token: string): boolean =>
  /^<\|.*\|>$|^<｜.*｜>$|^<unused.*>$/.test(token) || ['<pad>', '<mask>', '<2mass>', '[@BOS@]'].includes(token);

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
