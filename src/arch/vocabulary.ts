import { badInput } from '../base/errors.js';
import type { OpenModel } from './open.js';

/** A tensor with one row for each token. */
export interface VocabularyTensor {
  readonly name: string;
  /** [V, C], or [V] for a bias. */
  readonly shape: readonly number[];
  /** The same values as this one, which is the embedding: a tied head that the checkpoint holds all the same. */
  readonly tiedTo?: string;
}

/**
 * Every tensor whose rows are the vocabulary's: embedding, head and its bias, and their copies in what is carried along
 * (multi-token prediction).
 * Errors: input, a quantized one, a table that says something for each token.
 */
export function vocabularyTensors(open: OpenModel): VocabularyTensor[] {
  const { model, tensors } = open;
  const found: VocabularyTensor[] = [];
  const outer = new Set([...model.outer.map(({ name }) => name), `${model.head.name}.bias`]);
  for (const { name, shape, linear, files } of tensors.values()) {
    const carried = model.carried.some((prefix) => name.startsWith(prefix));
    const perToken = shape[0] === model.vocab && (shape.length === 1 || (shape.length === 2 && shape[1] === model.hidden)); // prettier-ignore
    if (!perToken || !(outer.has(name) || carried)) continue;
    if (linear) {
      throw badInput('The embedding or head is quantized: averages of its rows would be rounded again', {
        where: `${files[0] ?? open.checkpoint.path}, tensor ${name}`,
        hint: 'Give the full-precision model the new vocabulary, then quantize it.',
      });
    }
    const tied = model.tied && name !== model.embedding && !carried && shape.length === 2;
    found.push({ name, shape, ...(tied && { tiedTo: model.embedding }) });
  }
  const table = model.blocks.flatMap((block) => block.tensors).find(({ below, shape }) => below !== undefined && shape[0] === model.vocab); // prettier-ignore
  if (table) {
    throw badInput('The model has a table with an entry for each token, which cannot be made for new ones', {
      where: `${open.checkpoint.path}, tensor ${table.name}`,
    });
  }
  return found;
}

/** The new id for an old one that stands under `key` (`eos_token_id`), alone or in a list; undefined: no such token. */
export type IdOf = (key: string, id: number, alone: boolean) => number | undefined;

/**
 * The config for another vocabulary: sizes and token ids.
 * Errors: input, an id that is needed (of an image, say) and has no token.
 */
export function withVocabulary(
  config: Readonly<Record<string, unknown>>,
  sizes: { readonly from: number; readonly to: number },
  idOf: IdOf,
): Record<string, unknown> {
  const one = (key: string, id: unknown, alone = true): number | undefined => {
    if (typeof id !== 'number' || id < 0) return undefined;
    const mapped = idOf(key, id, alone);
    if (mapped !== undefined || optionalIds.test(key)) return mapped;
    throw badInput('The new vocabulary lacks a token that the config names', { got: `${key}: ${id}`, hint: 'Add it to the new tokenizer.' }); // prettier-ignore
  };
  const out: Record<string, unknown> = { ...config };
  for (const [key, value] of Object.entries(config)) {
    if (key === 'vocab_size' && value === sizes.from) out[key] = sizes.to;
    else if (/_token_ids?$/.test(key) && Array.isArray(value))
      out[key] = [...new Set(value.map((id) => one(key, id, false)))].filter((id) => id !== undefined); // prettier-ignore
    else if (/_token_ids?$/.test(key) && typeof value === 'number') out[key] = one(key, value) ?? null;
    else if (isSection(value) && 'vocab_size' in value) out[key] = withVocabulary(value, sizes, idOf);
  }
  return out;
}

/** Models do without them. */
const optionalIds = /^(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_ids?$/;
const isSection = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);
