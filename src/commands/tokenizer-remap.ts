import { badUsage } from '../base/errors.js';
import { byteSize, flag, integer, text, type Values } from '../base/options.js';
import { count } from '../base/text.js';
import { recordConversion } from './history-file.js';
import { deviceOptions, inputOptions, openEnvironment } from './shared.js';
import type { CommandResult, Io } from './types.js';

const section = 'remap:';

export const remapOptions = {
  tokenizer: text({ section, value: 'new', help: 'The new tokenizer: a folder, or a tokenizer.json.' }),
  config: { ...inputOptions.config, section },
  padToMultiple: integer({ min: 1, default: 1, section, help: 'Pad the new vocabulary to a multiple of this.' }),
  maxTokens: integer({ min: 2, default: 2048, section, help: 'Tokens of each text that the perplexities are told on.' }),
  restart: flag({ section, help: 'Throw away what an interrupted run left, instead of going on with it.' }),
  shardSize: byteSize({ default: 5e9, section, help: 'Largest file of a folder.' }),
  ...deviceOptions,
} as const; // prettier-ignore

export interface RemapGiven extends Values<typeof remapOptions> {
  readonly paths: readonly string[];
  readonly out: string | undefined;
  readonly overwrite: boolean;
  readonly text: readonly string[];
}

export async function remap(given: RemapGiven, io: Io): Promise<CommandResult> {
  const { paths, out, tokenizer, config, overwrite, restart, shardSize, maxTokens, padToMultiple: multiple } = given;
  const [input] = paths;
  if (input === undefined || paths.length > 1) {
    throw badUsage('tokenizer remap takes one model', { got: paths.join(', ') || 'none' });
  }
  if (tokenizer === undefined) throw badUsage('--tokenizer <new> is missing', { hint: 'The tokenizer that the model is to have.' }); // prettier-ignore
  if (out === undefined) throw badUsage('-o (--out <path>) is missing', { hint: 'Where the model goes.' });
  if (out.endsWith('.gguf')) {
    throw badUsage('tokenizer remap writes no GGUF files', { got: out, hint: 'Write a folder, then: deepseek-convert convert.' }); // prettier-ignore
  }
  const { remapModel } = await import('../export/remap/run.js');
  const { defaultTexts, excerpts } = await import('../validate/texts.js');
  const texts = await excerpts(given.text.length > 0 ? given.text : (await defaultTexts()).files);
  using env = await openEnvironment(given, io);
  const report = await remapModel(
    { input, config, tokenizer, out, overwrite, restart, shardSize, multiple, maxTokens, texts, recipe: io.settings, resumeHint: io.commandLine },
    env,
  ); // prettier-ignore
  await recordConversion(out, io);
  const { vocabSize, rows, prediction } = report;
  const { before, after } = prediction;
  const parts = [
    `${count(rows.shared)} rows as they were`,
    ...(rows.renamed > 0 ? [`${count(rows.renamed)} of special tokens under new names`] : []),
    `${count(rows.averaged)} averaged from pieces`,
    ...(rows.mean > 0 ? [`${count(rows.mean)} the mean of all`] : []),
  ];
  return {
    data: { out, ...report },
    text: [
      `${out}: ${count(vocabSize.before)} tokens became ${count(vocabSize.after)}: ${parts.join(', ')}.`,
      `Perplexity ${before.perplexity.toFixed(3)} before, ${after.perplexity.toFixed(3)} now; ${before.bitsPerByte.toFixed(4)} and ${after.bitsPerByte.toFixed(4)} bits a byte of text.`,
    ].join('\n'),
  };
}
