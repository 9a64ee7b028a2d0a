import { readFileSync } from 'node:fs';
import {
  Expected,
  byteSize,
  choice,
  custom,
  flag,
  flagName,
  integer,
  list,
  number,
  type Values,
} from '../base/options.js';
import { badUsage } from '../base/errors.js';
import { leastBalance, type JobOptions, type MoeOptions } from '../moe/options.js';
import type { LayerRange } from '../moe/plan.js';
import { pruneMeasures } from '../moe/surgery/options.js';
import { acceptanceOptions } from './acceptance.js';
import { distillOptions } from './moe-distill.js';
import { asks, deviceOptions, inputOptions, outputOptions, seedOption } from './shared.js';
import type { Io } from './types.js';

const calibrationSection = 'Calibration:';
const fineSection = 'Fine tuning:';
const surgerySection = 'Mixtures into smaller ones:';
const thenSection = 'Quantization behind it:';
export const options = {
  ...inputOptions,
  ...outputOptions,
  experts: integer({
    min: 2,
    max: 4096,
    default: 8,
    aliases: ['expert-num'],
    help: 'Routed experts a layer.',
  }),
  active: integer({ min: 1, default: 2, help: 'How many of them a token takes.' }),
  shared: custom(
    {
      defaultNote: '1; qwen3_moe and mixtral have none',
      help: "Experts' worth of neurons that every token takes beside them. auto: as many parts in all, and as many of them on, as with the default; how many of those are shared is decided by the held-out error of a few layers.",
    },
    'auto|n',
    (given): 'auto' | number => {
      if (given === 'auto') return given;
      if (!/^\d{1,5}$/.test(given)) throw new Expected('auto, or a number such as 1');
      return Number(given);
    },
  ),
  groups: integer({
    min: 2,
    max: 2048,
    help: 'Limit routing: experts form so many groups, those that fire together in one, and a token takes its experts from the best of them. glm4_moe only; with --top-groups.',
  }),
  topGroups: integer({
    min: 1,
    max: 2048,
    help: 'How many of the groups that is, by the sums of their two best scores.',
  }),
  method: choice(['split', 'upcycle', 'drop'], {
    default: 'split',
    help: 'split: experts are parts of the dense network. upcycle: each is a copy of it, for continued training. drop: a copy with some neurons drawn anew.',
  }),
  dropRatio: number({
    min: 0,
    max: 1,
    default: 0.5,
    help: "Share of each expert's neurons that --method drop draws anew, with mean and deviation of the old ones.",
  }),
  container: choice(['glm4_moe', 'qwen2_moe', 'qwen3_moe', 'mixtral'], {
    default: 'glm4_moe',
    help: 'The model class that the output is loaded as. qwen3_moe takes models with norms on q and k.',
  }),
  refit: flag({
    help: 'Refit down_proj to the experts that are on; the output then differs from the dense model with all experts on. On by itself where --active is given, --no-refit leaves it out.',
  }),
  denseLayers: integer({ min: 0, default: 0, help: 'Layers from the first on that stay dense.' }),
  layers: custom(
    { help: 'Instead: the layers that become mixtures, counted from 0, such as 4-27 or 0-3,8; the others stay dense. glm4_moe can have dense layers only before all mixtures, qwen2_moe and qwen3_moe anywhere, mixtral nowhere.', defaultNote: 'all' },
    'ranges',
    (given): readonly LayerRange[] =>
      given.split(',').map((range) => {
        const [, from, to = from] = /^(\d+)(?:-(\d+))?$/.exec(range.trim()) ?? [];
        if (from === undefined) throw new Expected('ranges of layers such as 4-27 or 0-3,8');
        return [Number(from), Number(to)];
      }),
  ), // prettier-ignore
  pad: custom(
    { default: 'auto', help: 'Widths of experts: multiples of n with zero neurons for the rest; auto: of up to 128 for at most an eighth more; none refuses.' },
    'auto|none|n',
    (given): 'auto' | 'none' | number => {
      if (given === 'auto' || given === 'none') return given;
      const multiple = Number(given);
      if (!/^\d+$/.test(given) || multiple < 1 || multiple > 65536) throw new Expected('auto, none, or a number such as 128'); // prettier-ignore
      return multiple;
    },
  ), // prettier-ignore
  pruneExperts: integer({
    min: 1,
    max: 4096,
    section: surgerySection,
    help: 'The input is a mixture already: keep so many experts of each layer. Which ones, calibration text tells.',
  }),
  mergeExperts: integer({
    min: 1,
    max: 4096,
    section: surgerySection,
    help: 'Instead: make so many experts of each layer by merging those with like outputs.',
  }),
  pruneBy: choice(pruneMeasures, {
    default: 'error',
    section: surgerySection,
    help: "error: try what each layer misses least. reap, activation: mean output norm on an expert's tokens, with and without the router's weight; energy: its square, summed; frequency: tokens that choose it; random: to compare with.",
  }),
  then: choice(['quantize'], {
    section: thenSection,
    help: 'Quantize the mixture in the same job: error feedback, the experts calibrated on the tokens that their routers send them. The output is compared with the dense model, and lies as compressed-tensors.',
  }),
  bits: choice(['4', '8'], { default: '4', section: thenSection, help: 'Bits a weight of --then quantize.' }),
  groupSize: integer({
    min: -1,
    default: 128,
    section: thenSection,
    help: 'Columns that share a scale, 32 to 1024; experts are padded, or their groups made smaller, until groups divide.',
  }),
  ...distillOptions,
  calibration: list({
    value: 'file|self|continue',
    section: calibrationSection,
    help: 'Text to decide on: .txt or .jsonl files, self for text that the model writes; beside files self, or continue (it goes on from pieces of them), for what they do not hold. Default: a small set that comes with the tool.',
  }),
  samples: integer({ min: 1, default: 64, section: calibrationSection, help: 'Windows of text.' }),
  seqLen: integer({
    min: 1,
    section: calibrationSection,
    defaultNote: '2048, or the context of the model',
    help: 'Tokens a window.',
  }),
  ...seedOption,
  rounds: integer({
    min: 0,
    max: 1000,
    default: 10,
    section: fineSection,
    help: 'How often neurons move to the experts that the router turns on for them.',
  }),
  routerSteps: integer({
    min: 0,
    max: 100_000,
    default: 30,
    section: fineSection,
    help: 'Training steps of the router a round, 5 times as many at the end; 0: ridge regression alone.',
  }),
  split: choice(['fitted', 'static', 'random', 'cmoe'], {
    default: 'fitted',
    section: fineSection,
    help: 'fitted: the method of this tool. The others are baselines to measure it against: the same experts on for every token (static), neurons dealt out at random, and clusters after CMoE.',
  }),
  balance: number({
    min: leastBalance,
    max: 100,
    section: fineSection,
    help: 'Even out the load: selection biases are lowered until, on calibration text, no expert of a layer gets more than 1 + x times the mean (MaxVio at most x). What that costs is reported. glm4_moe only.',
  }),
  ridge: number({
    min: 1e-8,
    max: 10,
    default: 1e-3,
    section: fineSection,
    help: 'Penalty of the routers’ ridge regression, in parts of the mean diagonal.',
  }),
  states: choice(['f32', 'bf16'], {
    section: calibrationSection,
    defaultNote: 'f32 on the CPU, bf16 on a GPU',
    help: 'Precision of hidden states and forward pass while calibrating.',
  }),
  shardSize: byteSize({ default: 5e9, help: 'Largest size of a file of an output folder.' }),
  ...acceptanceOptions,
  ...deviceOptions,
} as const;

export type Given = Values<typeof options> & { readonly input: string };

export function commonOptions(given: Given, io: Io): JobOptions {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const { calibration } = given;
  const source = calibration.length > 0 ? calibration : 'default';
  return {
    input: given.input,
    out: given.out,
    overwrite: given.overwrite,
    restart: given.restart,
    ...(given.config !== undefined && { config: given.config }),
    calibration: {
      source,
      samples: given.samples,
      seed: given.seed,
      ...(given.seqLen !== undefined && { seqLen: given.seqLen }),
    },
    seed: given.seed,
    ...(given.states !== undefined && { states: given.states }),
    shardSize: given.shardSize,
    tool: { name: 'deepseek-convert', version },
    commandLine: io.commandLine,
  };
}

export function jobOptions(given: Given, io: Io): MoeOptions {
  const { groups, topGroups, balance } = given;
  const { from } = io.settings;
  return {
    ...commonOptions(given, io),
    method: given.method,
    container: given.container,
    experts: given.experts,
    active: given.active,
    ...(given.shared !== undefined && { shared: given.shared }),
    ...(groups !== undefined && topGroups !== undefined && { limit: { groups, topGroups } }),
    dense: given.denseLayers,
    ...(given.layers !== undefined && { layers: given.layers }),
    pad: given.pad,
    dropRatio: given.dropRatio,
    // Who says how many experts are to be on wants the best model at that number; who does not gets the exact split.
    refit: 'refit' in from ? given.refit : 'active' in from,
    rounds: given.rounds,
    steps: given.routerSteps,
    lambda: given.ridge,
    ...(balance !== undefined && { balance }),
    split: given.split,
  };
}

export function requireGroups({ groups, topGroups }: Given): void {
  if ((groups === undefined) === (topGroups === undefined)) return;
  throw badUsage('Groups of experts, and how many of them a token takes experts from, go together', {
    got: groups === undefined ? `--top-groups ${topGroups}` : `--groups ${groups}`,
    expected: 'both of --groups and --top-groups',
  });
}

export function requireDrop({ method }: Given, io: Io): void {
  if (method === 'drop' || !asks(io, 'dropRatio')) return;
  throw badUsage('Only --method drop draws neurons anew', { got: `--drop-ratio with --method ${method}` });
}

/** Options that say how a dense model is divided. */
const divides = ['experts', 'active', 'shared', 'groups', 'topGroups', 'method', 'dropRatio', 'container', 'refit', 'denseLayers', 'layers', 'pad', 'then', ...(Object.keys(distillOptions) as (keyof typeof distillOptions)[]), 'balance', 'rounds', 'routerSteps', 'split', 'ridge'] as const; // prettier-ignore

/** What is to become of a mixture; undefined where a dense model is to become one. */
export function surgeryOf({ pruneExperts, mergeExperts }: Given, io: Io) {
  const measured = asks(io, 'pruneBy');
  if (pruneExperts === undefined && mergeExperts === undefined) {
    if (measured) throw badUsage('A measure to prune by means nothing without --prune-experts', { got: '--prune-by' });
    return undefined;
  }
  if (pruneExperts !== undefined && mergeExperts !== undefined) {
    throw badUsage('Experts are pruned or merged, not both', { got: '--prune-experts and --merge-experts' });
  }
  if (measured && mergeExperts !== undefined) throw badUsage('Experts are merged by how alike their outputs are', { got: '--prune-by with --merge-experts' }); // prettier-ignore
  const lost = divides.find((key) => asks(io, key));
  if (lost !== undefined) {
    throw badUsage('Options that divide a dense model mean nothing for a mixture', {
      got: `--${flagName(lost)} with --${pruneExperts === undefined ? 'merge' : 'prune'}-experts`,
      ...(lost === 'then' && { hint: 'Quantize the output with a command of its own.' }),
    });
  }
  return pruneExperts === undefined
    ? { kind: 'merge' as const, keep: mergeExperts! }
    : { kind: 'prune' as const, keep: pruneExperts };
}

/** Options of the second step mean nothing without it. */
export function requireThen(given: Given, io: Io): void {
  if (given.then !== undefined) return;
  const lost = (['bits', 'groupSize'] as const).filter((key) => asks(io, key));
  if (lost.length === 0) return;
  throw badUsage('Bits and groups are those of --then quantize', {
    got: `--${lost[0] === 'bits' ? 'bits' : 'group-size'} without --then quantize`,
    hint: 'Add --then quantize, or quantize the output with a command of its own.',
  });
}
