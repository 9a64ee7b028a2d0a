import type { Command } from './types.js';

interface Entry {
  readonly summary: string;
  readonly load: () => Promise<{ readonly command: Command }>;
}

/** Every subcommand, in the order of help. A new one is its file and a line here. */
export const commands: Readonly<Record<string, Entry>> = {
  inspect: {
    summary: 'show what a model is: parameters, experts, memory, tensors',
    load: () => import('./inspect.js'),
  },
  convert: { summary: 'change file format or precision, merge or split shards', load: () => import('./convert.js') },
  quantize: { summary: 'make a model INT4, checked before it gets its name', load: () => import('./quantize.js') },
  moe: { summary: 'divide a dense model into experts', load: () => import('./moe.js') },
  validate: {
    summary: 'compare two models: attention, logits, perplexity, diversity; gates',
    load: () => import('./validate.js'),
  },
  generate: { summary: 'continue a text', load: () => import('./generate.js') },
  score: { summary: 'log-probability of each token of a text, and its perplexity', load: () => import('./score.js') },
  doctor: { summary: 'say whether this machine is ready', load: () => import('./doctor.js') },
  completion: {
    summary: 'print a completion script for bash, zsh or fish',
    load: async () => ({ command: (await import('./completion.js')).completion(commands) }),
  },
};
