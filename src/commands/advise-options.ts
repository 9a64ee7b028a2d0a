import { integer, text, choice, flag, number } from '../base/options.js';
import { inputOptions } from './shared.js';

export const goals = ['latency', 'quality', 'memory'] as const;
export type Goal = (typeof goals)[number];

export const adviseOptions = {
  ...inputOptions,
  gpu: text({ value: 'name', defaultNote: 'all of data/hardware.json', help: 'The GPU to serve on: h100-80g, a100-40g, l4, rtx-4090 ...' }), // prettier-ignore
  gpus: integer({ min: 1, max: 1024, default: 1, help: 'How many of them (tensor parallel).' }),
  goal: choice(goals, {
    default: 'quality',
    help: 'quality: the most bits that fit; latency: the fastest that fits; memory: the smallest.',
  }),
  context: integer({ min: 1, defaultNote: "the model's", help: 'Tokens of a sequence, prompt and answer.' }),
  sequences: integer({ min: 1, max: 65_536, default: 1, help: 'Sequences at once.' }),
  prefill: integer({ min: 1, default: 8192, help: 'Most tokens of a prompt that go through at once.' }),
  utilization: number({ min: 0.1, max: 1, default: 0.9, help: 'Share of the memory that the engine may take (0.9 is what vLLM does).' }), // prettier-ignore
  hardware: text({ value: 'file', help: 'GPUs, prices and efficiencies of your own (YAML or JSON, as data/hardware.json).' }), // prettier-ignore
  price: number({ min: 0, help: 'US dollars a GPU and hour, for the cost of a million tokens.' }),
  explain: flag({ help: 'Every figure with its formula.' }),
} as const;
