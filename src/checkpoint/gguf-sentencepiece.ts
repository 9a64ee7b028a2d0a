import { badInput } from '../base/errors.js';
import type { GgufValue } from '../formats/gguf.js';
import { isJsonObject } from '../formats/json.js';
import type { JsonObject } from '../formats/json.js';
import { pieceKinds, type SentencePieceModel } from '../formats/sentencepiece.js';
import { addedScore, looksSpecial, paddingScore, TokenizerMetadata } from './gguf-tokenizer.js';

export interface SentencePieceFiles {
  readonly model: SentencePieceModel;
  /** tokenizer_config.json. */
  readonly config: JsonObject;
  /** added_tokens.json: ids by text. */
  readonly added: JsonObject;
  /** chat_template.jinja. */
  readonly chatTemplate?: string | undefined;
}

/**
 * Tokenizer metadata of GGUF from a `tokenizer.model`, as llama.cpp's converter writes it: "llama" for BPE, "t5" for
 * Unigram, with the model's own scores and kinds of tokens, and the tokens that were added beside it.
 * Errors (kind 'input'): tokens without a row in the embedding; a Unigram model that falls back to bytes, or that merges
 * spaces and puts none in front (llama.cpp would).
 */
export function sentencePieceToGguf(
  files: SentencePieceFiles,
  vocabSize: number,
): { metadata: Map<string, GgufValue>; notes: string[] } {
  const { model, config } = files;
  const isUnigram = model.kind === 'unigram';
  if (isUnigram && model.byteFallback) throw fail('llama.cpp has no Unigram tokenizer that falls back to bytes');
  if (isUnigram && model.removeExtraWhitespaces && !model.addDummyPrefix)
    throw fail('llama.cpp would put a space in front of the text');
  const tokens = Array.from({ length: vocabSize }, (_, i) => `[PAD${i}]`);
  const scores = tokens.map(() => paddingScore);
  const types = tokens.map((): number => pieceKinds.unused);
  const put = (id: number, text: string, score: number, kind: number): void => {
    if (!Number.isSafeInteger(id) || id < 0 || id >= vocabSize) {
      throw badInput('A token has no row in the embedding', { where: 'tokenizer.model', got: JSON.stringify({ id, text }), expected: `ids below vocab_size ${vocabSize}` }); // prettier-ignore
    }
    [tokens[id], scores[id], types[id]] = [text, score, kind];
  };
  model.pieces.forEach(({ text, score, kind }, id) => put(id, text, score, kind));
  for (const [text, id] of Object.entries(files.added)) put(Number(id), text, addedScore, pieceKinds.userDefined);
  const decoder = config['added_tokens_decoder'];
  for (const [id, token] of Object.entries(isJsonObject(decoder) ? decoder : {})) {
    if (!isJsonObject(token) || typeof token['content'] !== 'string') continue;
    const { content, special } = token as { content: string; special?: boolean };
    if (Number(id) === model.unknown) continue;
    if (special === true || looksSpecial(content)) put(Number(id), content, addedScore, pieceKinds.control);
    else put(Number(id), content.replaceAll('▁', ' '), addedScore, pieceKinds.userDefined);
  }
  const out = new TokenizerMetadata();
  out.set('ggml.model', 'string', isUnigram ? 't5' : 'llama');
  out.set('ggml.pre', 'string', 'default');
  out.list('tokens', 'string', tokens);
  out.list('scores', 'f32', scores);
  out.list('token_type', 'i32', types);
  const ids = { bos: model.bos, eos: model.eos, unknown: model.unknown, padding: model.padding };
  for (const [key, id] of Object.entries(ids))
    if (id >= 0 && id < vocabSize) out.set(`ggml.${key}_token_id`, 'u32', id);
  // What tokenizer_config.json says goes before; LLaMA's own code puts BOS in front of a text.
  out.special(new Map(tokens.map((token, id) => [token, id])), config, { bos: !isUnigram, eos: false });
  out.set('ggml.add_space_prefix', 'bool', (config['add_prefix_space'] as boolean | undefined) ?? model.addDummyPrefix);
  const notes: string[] = [];
  if (isUnigram) {
    out.set('ggml.remove_extra_whitespaces', 'bool', model.removeExtraWhitespaces);
    if (model.charsmap.length > 0) out.list('precompiled_charsmap', 'u8', [...model.charsmap]);
  } else if (model.charsmap.length > 0 || model.removeExtraWhitespaces) {
    notes.push('tokenizer.model normalizes text before it looks for tokens; llama.cpp does not where the tokenizer is BPE.'); // prettier-ignore
  }
  const template = files.chatTemplate ?? config['chat_template'];
  if (typeof template === 'string') out.set('chat_template', 'string', template);
  return { metadata: out.metadata, notes };
}

const fail = (what: string): Error =>
  badInput(what, {
    where: 'tokenizer.model',
    hint: 'Text would be cut otherwise than in training. Use --format safetensors.',
  });
