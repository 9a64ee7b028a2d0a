import { badUsage } from '../base/errors.js';
import { addedToken, aroundText, bpeModel, byteLevelDecoder, tokenizerJson } from '../base/tokenizer-json.js';
import type { Bpe } from './bpe-train.js';
import { preTokenizerJson, stagesOf, type DigitCut, type PreTokenizerName } from './splits.js';

/** Which special tokens there are and what each is for. */
export interface SpecialTokens {
  readonly bos: string | undefined;
  readonly eos: string | undefined;
  readonly pad: string | undefined;
  /** All of them, by id. */
  readonly all: readonly string[];
}

/**
 * Order: BOS, EOS, padding, the others; with `padId` the padding token stands there instead.
 * Errors: usage, an id that is no special token's.
 */
export function specialTokens(
  { bos, eos, pad }: Readonly<Record<'bos' | 'eos' | 'pad', string | undefined>>,
  others: readonly string[],
  padId: number | undefined,
): SpecialTokens {
  const all = [...new Set([bos, eos, pad, ...others].filter((token) => token !== undefined))];
  if (padId === undefined) return { bos, eos, pad, all };
  if (padId >= all.length) {
    throw badUsage('--pad-id is no special token', {
      got: String(padId),
      expected: all.length === 0 ? 'a special token to pad with (--pad-token)' : `0 to ${all.length - 1}: ${all.join(' ')}`,
    }); // prettier-ignore
  }
  if (pad === undefined) return { bos, eos, pad: all[padId]!, all };
  const rest = all.filter((token) => token !== pad);
  return { bos, eos, pad, all: rest.toSpliced(padId, 0, pad) };
}

export interface FileOptions {
  readonly preTokenizer: PreTokenizerName;
  readonly digits?: DigitCut | undefined;
  readonly special: SpecialTokens;
  /** Every text begins with BOS, where there is one. */
  readonly addBos: boolean;
}

/** The tokenizer's files by name, as transformers loads them. */
export function tokenizerFiles(bpe: Bpe, options: FileOptions): Map<string, string> {
  const { bos, eos, pad, all } = options.special;
  const named = { ...(bos && { bos_token: bos }), ...(eos && { eos_token: eos }), ...(pad && { pad_token: pad }) };
  const others = all.filter((token) => ![bos, eos, pad].includes(token));
  const extra = others.length > 0 && { additional_special_tokens: others };
  const config = {
    tokenizer_class: 'PreTrainedTokenizerFast',
    ...named,
    ...extra,
    clean_up_tokenization_spaces: false,
  };
  return new Map([
    ['tokenizer.json', line(jsonOf(bpe, options))],
    ['tokenizer_config.json', line(config)],
    ['special_tokens_map.json', line({ ...named, ...extra })],
  ]);
}

const line = (value: unknown): string => `${JSON.stringify(value, null, 2)}\n`;

function jsonOf({ tokens, merges }: Bpe, { preTokenizer, digits, special: { all, bos }, addBos }: FileOptions) {
  return tokenizerJson({
    added: all.map((content, id) => addedToken(id, content)),
    preTokenizer: preTokenizerJson(stagesOf(preTokenizer, digits)),
    postProcessor: addBos && bos !== undefined ? aroundText({ id: all.indexOf(bos), token: bos }, undefined) : null,
    decoder: byteLevelDecoder,
    model: bpeModel({ vocab: Object.fromEntries(tokens.map((token, id) => [token, id])), merges }),
  });
}
