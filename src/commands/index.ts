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
  advise: {
    summary: 'say what fits a GPU: precision, memory, speed, the next command',
    load: () => import('./advise.js'),
  },
  convert: { summary: 'change file format or precision, merge or split shards', load: () => import('./convert.js') },
  quantize: { summary: 'make a model INT4, checked before it gets its name', load: () => import('./quantize.js') },
  plan: {
    summary: 'prepare a quantization in shards, for several processes or hosts',
    load: () => import('./plan.js'),
  },
  worker: { summary: 'solve one shard of a plan', load: () => import('./worker.js') },
  merge: {
    summary: 'put the shards of a plan together, and check the result',
    load: () => import('./merge.js'),
  },
  qat: {
    summary: 'quantization-aware training: INT4 that learns what rounding took',
    load: () => import('./qat.js'),
  },
  distill: {
    summary: 'make a smaller model of a dense one, trained on its predictions',
    load: () => import('./distill.js'),
  },
  moe: { summary: 'divide a dense model into experts', load: () => import('./moe.js') },
  validate: {
    summary: 'compare two models: attention, predictions, diversity; gates',
    load: () => import('./validate.js'),
  },
  compare: {
    summary: 'compare several candidates with one reference, and recommend one',
    load: () => import('./compare.js'),
  },
  history: {
    summary: 'show the conversions of a folder: recipe, metrics, parents',
    load: () => import('./history.js'),
  },
  batch: {
    summary: 'run many jobs from a file: models x recipes, in order, resumable',
    load: async () => ({ command: (await import('./batch.js')).batch(commands) }),
  },
  tokenizer: {
    summary: 'train a tokenizer, compare two, give a model another vocabulary',
    load: () => import('./tokenizer.js'),
  },
  generate: { summary: 'continue a text', load: () => import('./generate.js') },
  score: { summary: 'log-probability of each token of a text, and its perplexity', load: () => import('./score.js') },
  demo: {
    summary: 'make a tiny model and run everything on it once',
    load: async () => ({ command: (await import('./demo.js')).demo(commands) }),
  },
  doctor: { summary: 'say whether this machine is ready', load: () => import('./doctor.js') },
  config: {
    summary: 'show the settings a command would use, and where they come from',
    load: async () => ({ command: (await import('./config.js')).config(Object.keys(commands)) }),
  },
  completion: {
    summary: 'print a completion script for bash, zsh or fish',
    load: async () => ({ command: (await import('./completion.js')).completion(commands) }),
  },
};
