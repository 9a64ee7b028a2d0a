import { badUsage } from '../base/errors.js';
import { choice, flag, integer, list, number, text } from '../base/options.js';
import { duration } from '../base/text.js';
import { deviceOptions, input, inputOptions, openEnvironment, seedOption } from './shared.js';
import { readText } from './read-text.js';
import { defineCommand } from './types.js';

export const command = defineCommand({
  name: 'generate',
  description:
    'Draws from the whole distribution unless told otherwise, so that what is seen is what the model is. The same seed\n' +
    'gives the same text. --json gives each token with its log-probability (natural, before temperature). INT4 linears\n' +
    'stay packed in memory for up to 4 prompts on the CPU and 8 in bf16 on a GPU; experts never do.',
  arguments: { input: { ...input, value: 'model' } },
  options: {
    prompt: list({ value: 'text', help: 'What to continue; several run together.' }),
    promptFile: text({ value: 'path', help: 'A text file to continue, as one prompt.' }),
    maxNewTokens: integer({ default: 64, min: 1, help: 'Longest continuation.' }),
    greedy: flag({ help: 'Always the most probable token.' }),
    temperature: number({ default: 1, min: 0.01, max: 100, help: 'Above 1 more varied, below 1 less.' }),
    topP: number({ default: 1, min: 0, max: 1, help: 'Only the most probable tokens that reach this share.' }),
    topK: integer({ default: 0, min: 0, help: 'Only that many of the most probable tokens; 0: all.' }),
    minP: number({
      default: 0,
      min: 0,
      max: 1,
      help: "Only tokens with at least this share of the most probable one's probability.",
    }),
    ...seedOption,
    ignoreEos: flag({ help: 'Go on behind the token that ends a text.' }),
    dtype: choice(['f32', 'bf16'], {
      default: 'f32',
      aliases: ['compute-dtype'],
      help: 'Precision of weights and states while computing.',
    }),
    ...inputOptions,
    ...deviceOptions,
  },
  examples: [
    ['generate fixtures/v1.0/v1.0_checkpoint.bin --prompt "The sea" --max-new-tokens 20', 'A sampled continuation.'],
    ['generate fixtures/v1.0/v1.0_checkpoint.bin --prompt "The sea" --greedy --json', 'Tokens and log-probabilities.'],
  ],
  async run(given, io) {
    if (given.greedy && (given.temperature !== 1 || given.topP !== 1 || given.topK !== 0 || given.minP !== 0)) {
      throw badUsage('--greedy leaves nothing to draw', { got: 'it and --temperature, --top-p, --top-k or --min-p' });
    }
    const prompts = [
      ...given.prompt,
      ...(given.promptFile === undefined ? [] : [await readText(given.promptFile, 'the prompt')]),
    ];
    if (prompts.length === 0) throw badUsage('--prompt <text> is missing', { hint: 'Or name a file: --prompt-file.' });
    const { openModel } = await import('../arch/open.js');
    const { ResidentModel } = await import('../arch/resident.js');
    const { generate } = await import('../arch/generate.js');
    const open = await openModel(given.input, { config: given.config });
    try {
      for (const note of open.notes) io.log.info(note);
      const tokenizer = await open.tokenizer();
      const ids = await Promise.all(prompts.map((prompt) => tokenizer.encode(prompt, { special: true })));
      using env = await openEnvironment(given, io);
      using model = await ResidentModel.load(open, env, given.dtype, prompts.length);
      const started = performance.now();
      const { greedy, temperature, topP, topK, minP, seed, maxNewTokens, ignoreEos } = given;
      const drawn = await generate(model, env, ids, {
        ...{ greedy, temperature, topP, topK, minP, seed, maxNewTokens },
        ...(ignoreEos && { stopIds: [] }),
      });
      const seconds = (performance.now() - started) / 1000;
      const generations = await Promise.all(
        drawn.map(async ({ tokens, logprobs, stopped }, i) => ({
          prompt: prompts[i]!,
          promptTokens: [...ids[i]!],
          text: await tokenizer.decode(tokens),
          tokens: await Promise.all(
            [...tokens].map(async (id, t) => ({ id, text: await tokenizer.decode([id], { special: true }), logprob: logprobs[t]! })),
          ),
          stopped,
        })),
      ); // prettier-ignore
      const count = generations.reduce((n, { tokens }) => n + tokens.length, 0);
      io.log.info(`${count} tokens in ${duration(seconds)}, ${(count / seconds).toFixed(1)} a second`);
      return {
        data: { model: given.input, seed, greedy, generations, tokensPerSecond: count / seconds },
        text: generations.map(({ prompt, text }) => `${io.paint.dim(prompt)}${text}`).join('\n\n'),
      };
    } finally {
      await open.close();
    }
  },
});
