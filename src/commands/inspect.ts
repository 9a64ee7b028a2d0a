import { flag } from '../base/options.js';
import { lookOptions } from './inspect-look.js';
import { input, inputOptions } from './shared.js';
import { defineCommand } from './types.js';

export const command = defineCommand({
  name: 'inspect',
  description:
    'Reads headers only, whatever the size of the model; --stats alone reads the weights. Models of unknown architectures are shown as tensors.',
  arguments: { input: { ...input, value: 'model' } },
  options: {
    ...inputOptions,
    tensors: flag({ help: 'List every tensor: name, type, shape, bytes.' }),
    ...lookOptions,
    security: flag({
      help: 'Look for what could run code when others load the model: pickled objects, Python files, auto_map. Exit code 1 if there is.',
    }),
  },
  examples: [
    ['inspect fixtures/v1.0/v1.0_checkpoint.bin', 'What is in a PyTorch file.'],
    ['inspect fixtures/moe-6m --tensors', 'Parameters, experts, and each tensor of a folder.'],
    ['inspect fixtures/moe-6m --tree --diagram', 'What is where and how large; the architecture as a picture.'],
    [
      'inspect fixtures/moe-6m --stats --html model.html',
      'Statistics of the weights, outlier channels; all of it as a page.',
    ],
    ['inspect fixtures/v1.0/v1.0_checkpoint.bin --security', 'Is it safe to load elsewhere?'],
  ],
  async run(given, io) {
    if (given.security) return (await import('./security.js')).inspectSecurity(given.input, io);
    return (await import('./inspect-report.js')).inspect(given, io);
  },
});
