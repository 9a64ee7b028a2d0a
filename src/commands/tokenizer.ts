import { badUsage } from '../base/errors.js';
import { choice, flag, flagName, list, oneOf, text } from '../base/options.js';
import { compare, compareOptions } from './tokenizer-compare.js';
import { remap, remapOptions } from './tokenizer-remap.js';
import { train, trainOptions } from './tokenizer-train.js';
import { defineCommand, type Io } from './types.js';

const actions = ['train', 'compare', 'remap'] as const;
type Action = (typeof actions)[number];

const output = {
  out: text({ short: 'o', value: 'path', aliases: ['output-model'], help: 'Where the result goes: a folder.' }),
  overwrite: flag({ help: 'Replace an output that exists, once the new one is complete and verified.' }),
} as const;
/** Which options an action knows. */
const tables = {
  train: { ...output, ...trainOptions },
  compare: compareOptions,
  remap: { ...output, ...compareOptions, ...remapOptions },
} as const satisfies Record<Action, object>;

export const command = defineCommand({
  name: 'tokenizer',
  description:
    'train <text files...> -o <folder>: learns a byte-level BPE tokenizer.\n' +
    'compare <tokenizer> <tokenizer>: tokens each needs for the same texts, and what their vocabularies share.\n' +
    'remap <model> --tokenizer <new> -o <folder>: the model with the vocabulary of another tokenizer.',
  arguments: {
    action: choice(actions, { required: true, value: 'action', help: `${oneOf(actions)}.` }),
    paths: list({ value: 'path', help: 'train: text files (.txt, .jsonl). compare: two tokenizers. remap: a model.' }),
  },
  options: { ...tables.train, ...tables.remap },
  examples: [
    ['tokenizer train README.md -o out/tokenizer --vocab-size 400', 'A small tokenizer from a small text.'],
    ['tokenizer compare fixtures/v1.0 out/tokenizer --text README.md', 'Tokens that each needs, and what they share.'],
    ['tokenizer remap fixtures/moe-6m --tokenizer out/tokenizer -o out/remapped', 'A model with that vocabulary.'],
  ],
  async run(given, io) {
    refuseOthers(given.action, io);
    switch (given.action) {
      case 'train':
        return train(given, io);
      case 'compare':
        return compare(given, io);
      case 'remap':
        return remap(given, io);
    }
  },
});

/** An option that the action does not know would do nothing. */
function refuseOthers(action: Action, io: Io): void {
  const known = new Set(['action', 'paths', ...Object.keys(tables[action])]);
  const odd = Object.entries(io.settings.from).find(([key, from]) => from === 'command line' && !known.has(key))?.[0];
  if (odd === undefined) return;
  const owners = actions.filter((name) => odd in tables[name]);
  throw badUsage(`tokenizer ${action} has no option --${flagName(odd)}`, { hint: `It belongs to tokenizer ${owners.join(', tokenizer ')}.` }); // prettier-ignore
}
