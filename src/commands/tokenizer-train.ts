import { badUsage } from '../base/errors.js';
import { formatBytes } from '../base/files.js';
import { choice, flag, integer, list, number, text, type Values } from '../base/options.js';
import { count, duration } from '../base/text.js';
import { digitCuts, preTokenizerNames, type DigitCut } from '../tokenizer/splits.js';
import type { CommandResult, Io } from './types.js';

const section = 'train:';
/** A special token, or `none`. */
const token = (what: string, named: string) => text({ section, value: 'token|none', default: named, help: what });

export const trainOptions = {
  vocabSize: integer({ min: 256, default: 32_000, section, help: 'Tokens in all, the 256 bytes and special ones included.' }),
  preTokenizer: choice(preTokenizerNames, {
    default: 'llama3',
    section,
    help: 'How text is cut into words that no token reaches over.',
  }),
  digits: choice(Object.keys(digitCuts) as DigitCut[], {
    section,
    defaultNote: 'as the pre-tokenizer has it',
    help: 'Cut numbers first: one digit each, or three.',
  }),
  minFrequency: integer({ min: 0, default: 2, section, help: 'Pairs that occur less often are not merged.' }),
  bosToken: token('What every text begins with.', '<|begin_of_sentence|>'),
  eosToken: token('What ends a text.', '<|end_of_sentence|>'),
  padToken: token('What fills short rows of a batch.', '<|pad|>'),
  padId: integer({ min: 0, section, defaultNote: 'behind BOS and EOS', help: 'The id of the padding token, among those of the special tokens.' }),
  special: list({ section, value: 'token', help: 'One more special token; repeatable. They get the first ids.' }),
  addBos: flag({ default: true, section, help: 'Put the BOS token before every text.', off: 'No BOS token before every text.' }),
  bpeDropout: number({ min: 0, max: 0.99, default: 0, section, help: 'The --bpe-dropout that a model is to be trained with: stands in deepseek-convert.json, not in tokenizer.json.' }),
} as const; // prettier-ignore

export interface TrainGiven extends Values<typeof trainOptions> {
  readonly paths: readonly string[];
  readonly out: string | undefined;
  readonly overwrite: boolean;
}

export async function train(given: TrainGiven, io: Io): Promise<CommandResult> {
  const { paths, out, bosToken, eosToken, padToken, padId } = given;
  if (out === undefined) throw badUsage('-o (--out <path>) is missing', { hint: 'The folder for the tokenizer.' });
  const { trainTokenizer } = await import('../export/train-tokenizer.js');
  const { specialTokens } = await import('../tokenizer/tokenizer-files.js');
  const named = (name: string) => (name === 'none' ? undefined : name);
  const tokens = { bos: named(bosToken), eos: named(eosToken), pad: named(padToken) };
  const special = specialTokens(tokens, given.special, padId);
  const { vocabSize, preTokenizer, digits, minFrequency, addBos, bpeDropout, overwrite } = given;
  const started = performance.now();
  const report = await trainTokenizer(
    { texts: paths, out, overwrite, vocabSize, preTokenizer, digits, minFrequency, addBos, bpeDropout, special, recipe: io.settings },
    io,
  ); // prettier-ignore
  const seconds = (performance.now() - started) / 1000;
  if (report.vocabSize < vocabSize) {
    io.log.warn(`The text has no more pairs that occur ${Math.max(1, minFrequency)} times: ${count(report.vocabSize)} tokens instead of ${count(vocabSize)}.`); // prettier-ignore
  }
  const ids = Object.fromEntries(special.all.map((name, id) => [name, id]));
  const padded = special.pad === undefined ? null : special.all.indexOf(special.pad);
  return {
    data: { out, ...report, specialTokens: ids, padId: padded, bpeDropout, seconds },
    text: `${out}: ${count(report.vocabSize)} tokens, ${count(report.merges)} merges from ${formatBytes(report.bytes)} of text in ${duration(seconds)}; ${report.bytesPerToken.toFixed(2)} bytes a token.`,
  };
}
