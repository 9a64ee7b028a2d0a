import { badUsage } from '../base/errors.js';
import { choice, flag, integer, list } from '../base/options.js';
import { columns, count, duration } from '../base/text.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { deviceOptions, input, inputOptions, openEnvironment } from './shared.js';
import { readText } from './read-text.js';
import { defineCommand } from './types.js';

export const command = defineCommand({
  name: 'score',
  description:
    "Up to the model's context a text is one sequence; a longer one is cut into windows that know nothing of each other,\n" +
    'so that the first token of each has no log-probability. One block of weights is in memory at a time.',
  arguments: { input: { ...input, value: 'model' } },
  options: {
    text: list({
      value: 'file',
      help: 'The text, UTF-8; several are scored each on its own, in one pass over the weights.',
    }),
    window: integer({ min: 2, defaultNote: "the model's context", help: 'Tokens of one sequence.' }),
    maxTokens: integer({ min: 2, help: 'Only the beginning of each text.' }),
    special: flag({
      default: true,
      help: 'Put the tokens around a text that the tokenizer asks for (BOS).',
      off: 'Leave out what the tokenizer puts around a text (BOS).',
    }),
    dtype: choice(['f32', 'bf16'], {
      default: 'f32',
      aliases: ['compute-dtype'],
      help: 'Precision of weights and states while computing.',
    }),
    ...inputOptions,
    ...deviceOptions,
  },
  examples: [
    ['score fixtures/v1.0/v1.0_checkpoint.bin --text README.md', 'The perplexity of a text.'],
    ['score fixtures/moe-6m --text README.md --max-tokens 256 --json', 'The log-probability of each token.'],
  ],
  async run(given, io) {
    if (given.text.length === 0) throw badUsage('--text <file> is missing');
    const { openModel } = await import('../arch/open.js');
    const { scoreAll } = await import('../arch/score.js');
    const texts = await Promise.all(given.text.map((path) => readText(path, 'the text')));
    const open = await openModel(given.input, { config: given.config });
    try {
      for (const note of open.notes) io.log.info(note);
      const tokenizer = await open.tokenizer();
      using env = await openEnvironment(given, io);
      const ids = await Promise.all(
        texts.map(async (text) =>
          (await tokenizer.encode(text, { special: given.special })).subarray(0, given.maxTokens),
        ),
      );
      const started = performance.now();
      const options = { dtype: given.dtype, ...(given.window !== undefined && { window: given.window }) };
      const scores = await scoreAll(open, env, ids, options);
      const tokens = ids.reduce((n, { length }) => n + length, 0);
      io.log.info(`${count(tokens)} tokens in ${duration((performance.now() - started) / 1000)}`);
      const results = [];
      let [sum, scored] = [0, 0];
      for (const [i, { logprobs, ...numbers }] of scores.entries()) {
        sum += numbers.meanLogprob * numbers.scored;
        scored += numbers.scored;
        results.push({ file: given.text[i]!, ...numbers, tokens: await spelled(tokenizer, ids[i]!, logprobs) });
      }
      const perplexity = Math.exp(-sum / scored);
      const rows = results.map((r) => [r.file, `${count(r.tokens.length)} tokens`, `perplexity ${r.perplexity.toFixed(4)}`, `${r.meanLogprob.toFixed(5)} nats a token`]); // prettier-ignore
      if (results.length > 1) rows.push(['together', `${count(scored)} scored`, `perplexity ${perplexity.toFixed(4)}`, `${(sum / scored).toFixed(5)} nats a token`]); // prettier-ignore
      return {
        data: {
          model: given.input,
          perplexity,
          meanLogprob: sum / scored,
          scored,
          tokens,
          logprobs: results.flatMap(({ tokens }) => tokens.map(({ logprob }) => logprob)),
          texts: results,
        },
        text: columns(rows, 'lrrr'),
      };
    } finally {
      await open.close();
    }
  },
});

/** Each token with its text and log-probability; null for the first of a window. */
async function spelled(tokenizer: Tokenizer, ids: Int32Array, logprobs: Float64Array) {
  const texts = new Map<number, string>();
  for (const id of new Set(ids)) texts.set(id, await tokenizer.decode([id], { special: true }));
  return Array.from(ids, (id, t) => ({ id, text: texts.get(id)!, logprob: Number.isNaN(logprobs[t]!) ? null : logprobs[t]! })); // prettier-ignore
}
