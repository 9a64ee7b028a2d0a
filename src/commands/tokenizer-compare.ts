import { readdirSync } from 'node:fs';
import { join } from 'node:path';
import { badUsage } from '../base/errors.js';
import { list, type Values } from '../base/options.js';
import { columns, count } from '../base/text.js';
import type { Comparison, Fertility, TokenPlace } from '../tokenizer/compare.js';
import type { CommandResult, Io } from './types.js';

export const compareOptions = {
  text: list({
    section: 'compare, remap:',
    value: 'file',
    help: 'Texts to look at (.txt, .jsonl); repeatable. Default: texts of this tool.',
  }),
} as const;

export interface CompareGiven extends Values<typeof compareOptions> {
  readonly paths: readonly string[];
}

export async function compare({ paths, text }: CompareGiven, io: Io): Promise<CommandResult> {
  const [first, second] = paths;
  if (first === undefined || second === undefined || paths.length > 2) {
    throw badUsage('tokenizer compare takes two tokenizers', { got: paths.join(', ') || 'none' });
  }
  const { loadTokenizer } = await import('../tokenizer/tokenizer.js');
  const { compareTokenizers } = await import('../tokenizer/compare.js');
  const tokenizers = [await loadTokenizer(first), await loadTokenizer(second)] as const;
  const found = await compareTokenizers(tokenizers, text.length > 0 ? text : await ownTexts());
  return { data: { tokenizers: paths, ...found }, text: shown(found, [first, second], io) };
}

/** English, Chinese, code and dialogue. */
export async function ownTexts(): Promise<string[]> {
  const { defaultCalibrationFolder: folder } = await import('../arch/calibration.js');
  return readdirSync(folder).filter((name) => name.endsWith('.jsonl')).sort().map((name) => join(folder, name)); // prettier-ignore
}

function shown(found: Comparison, names: readonly [string, string], { paint }: Io): string {
  const { vocabSizes, shared, sameIds, special, moved, files, scripts, words } = found;
  const share = (i: 0 | 1) => `${((100 * shared) / vocabSizes[i]).toFixed(1)}%`;
  const place = ({ token, ids }: TokenPlace) => [`  ${JSON.stringify(token)}`, ...ids.map((id) => (id === undefined ? 'none' : String(id)))]; // prettier-ignore
  const heads = ['', 'tokens A', 'tokens B', 'B / A', 'a character', 'a word', 'bytes a token'];
  const title = (text: string): string => paint.bold(text);
  const table = (rows: readonly Fertility[]) => columns([heads, ...rows.map(fertilityRow)], 'lrrrrrr');
  const examples = words.map(({ word, count: n, tokens: [a, b] }) => [`  ${JSON.stringify(word)}`, `${count(n)} times`, a.join('|'), b.join('|')]); // prettier-ignore
  return [
    `A: ${names[0]}, ${count(vocabSizes[0])} tokens`,
    `B: ${names[1]}, ${count(vocabSizes[1])} tokens`,
    `Both have ${count(shared)} tokens (${share(0)} of A, ${share(1)} of B), ${count(sameIds)} of them under one id.`,
    '',
    ...(special.length > 0 ? [title('Special tokens'), columns(special.map(place), 'lrr'), ''] : []),
    ...(moved.length > 0 ? [title('Tokens under other ids, for example'), columns(moved.map(place), 'lrr'), ''] : []),
    title('By file'),
    table(files),
    '',
    title('By script'),
    table(scripts),
    ...(examples.length > 0
      ? ['', title('Words that differ most'), columns([['', '', 'A', 'B'], ...examples], 'lrll')]
      : []),
  ].join('\n');
}

function fertilityRow({ name, bytes, characters, words, tokens: [a, b] }: Fertility): string[] {
  const both = (per: number) => `${(a / per).toFixed(2)} ${(b / per).toFixed(2)}`;
  const size = `${(bytes / a).toFixed(2)} ${(bytes / b).toFixed(2)}`;
  return [`  ${name.split('/').at(-1)}`, count(a), count(b), (b / a).toFixed(3), both(characters), both(Math.max(1, words)), size]; // prettier-ignore
}
