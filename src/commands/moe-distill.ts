import { badUsage } from '../base/errors.js';
import { choice, custom, flag, flagName, integer, number, text, type Values } from '../base/options.js';
import { count } from '../base/text.js';
import type { MoeOptions } from '../moe/options.js';
import {
  distillParts,
  type DistillMixtureResult,
  type DistillPart,
  type MixtureTraining,
} from '../train/moe/options.js';
import { readScaled, asks } from './shared.js';
import type { Io } from './types.js';

const section = 'Distillation behind it:';
/** Largest learning rates, in parts of a tensor's size (docs/moe.md). */
const rates: Readonly<Record<DistillPart, number>> = { router: 0.01, scales: 0.01, lora: 0.003, full: 0.003 };

export const distillOptions = {
  distillTokens: custom(
    {
      section,
      defaultNote: '0: none',
      help: 'Train the mixture against the dense model, on so many tokens of the calibration text (2M; what it does not hold is gone through again). With all experts on it is then no longer the dense model.',
    },
    '2M',
    (given) => (given === '0' ? 0 : readScaled(given, 'a number of tokens: 200000, 200K, 2M')),
  ),
  distillPasses: integer({ min: 1, max: 1000, default: 1, section, help: 'How often those tokens are gone through.' }),
  distillTrain: choice(distillParts, {
    default: 'full',
    section,
    help: 'What learns: the routers alone; factors of rows, and norms; low-rank additions to the weights beside these, merged into them at the end; or all weights of the layers.',
  }),
  distillLr: number({
    min: 0,
    max: 1e3,
    section,
    defaultNote: Object.entries(rates).map(([part, rate]) => `${rate} ${part}`).join(', '), // prettier-ignore
    help: 'Largest learning rate: how far a value moves a step, in parts of the root mean square of its tensor.',
  }),
  distillBatch: integer({ min: 1, max: 4096, default: 8, section, help: 'Windows of text a step.' }),
  distillHidden: number({ min: 0, max: 1e6, default: 20, section, help: 'Weight of the relative error of hidden states behind each layer; that of the divergence from the dense predictions is 1.' }),
  distillRouter: number({ min: 0, max: 100, default: 0, section, help: 'Learning rate of the routers beside that of the weights; 0: they stay as they are, unless they alone learn.' }),
  distillRank: integer({ min: 1, max: 4096, default: 16, section, help: 'Rank of the additions of --distill-train lora.' }),
  failOnGradientAlarm: flag({ section, help: 'Stop with exit code 3 when gradients vanish, explode or are not finite.' }),
  trainingReport: text({ value: 'training.html', section, help: 'Write losses and gradient norms as one self-contained HTML file.' }),
} as const; // prettier-ignore

type Given = Values<typeof distillOptions>;

/** The distillation that is asked for; undefined: none. Refused by name: what has nothing to learn, and options without it. */
export function distillationOf(given: Given, job: MoeOptions, io: Io): MixtureTraining | undefined {
  const { distillTokens: tokens = 0, distillTrain: part } = given;
  if (tokens === 0) {
    const keys = Object.keys(distillOptions) as (keyof Given)[];
    const lost = keys.find((key) => key !== 'distillTokens' && asks(io, key));
    if (lost === undefined) return undefined;
    throw badUsage('Options of the distillation mean nothing without it', {
      got: `--${flagName(lost)} without --distill-tokens`,
      hint: 'Say how long to train: --distill-tokens 2M.',
    });
  }
  if (job.method !== 'split') {
    throw badUsage('Only a mixture that was split from the dense model is distilled', {
      got: `--distill-tokens with --method ${job.method}`,
      hint: job.method === 'upcycle' ? 'Copies give the dense output already: there is nothing to learn from it.' : 'Neurons drawn anew are a start for real training, not for a short distillation.', // prettier-ignore
    });
  }
  if (job.active >= job.experts) {
    throw badUsage('Distillation teaches a mixture to do with fewer experts: here none is off', {
      got: `--active ${job.active} of --experts ${job.experts}`,
      expected: '--active below --experts',
    });
  }
  if (part === 'router' && job.split === 'static') {
    throw badUsage('A static mask has no router that could learn', { got: '--split static --distill-train router' });
  }
  if ((part === 'router' || job.split === 'static') && given.distillRouter > 0) {
    throw badUsage('--distill-router is for routers that learn beside weights', { got: part === 'router' ? '--distill-train router' : '--split static' }); // prettier-ignore
  }
  if (part !== 'lora' && asks(io, 'distillRank')) {
    throw badUsage('A rank is that of low-rank additions', { got: `--distill-rank with --distill-train ${part}`, expected: '--distill-train lora' }); // prettier-ignore
  }
  return {
    ...{ tokens, part, lr: given.distillLr ?? rates[part], batch: given.distillBatch, hidden: given.distillHidden },
    passes: given.distillPasses,
    rank: given.distillRank,
    routerRate: given.distillRouter,
    failOnAlarm: given.failOnGradientAlarm,
  };
}

const learned: Readonly<Record<DistillPart, string>> = {
  router: 'routers',
  scales: 'factors of rows and norms',
  lora: 'low-rank additions, factors of rows and norms',
  full: 'all weights of the layers',
};

/** Lines for people. */
export function distillSummary({ part, tokens, passes, training, heldOut }: DistillMixtureResult): string[] {
  const { steps, best, health } = training;
  const kinds = [...new Set(health.alarms.map(({ kind }) => kind))].join(', ');
  const alarms = health.alarms.length === 0 ? 'no alarm' : `${health.alarms.length} alarms (${kinds})`;
  const change = `${heldOut.before.toPrecision(4)} -> ${heldOut.after.toPrecision(4)}`;
  return [
    `Distilled (${learned[part]}) on ${count(tokens)} tokens, ${passes.toFixed(1)} x the text: KL from the dense model ${change} on ${heldOut.windows} held-out windows (step ${best} of ${steps.length})`,
    `  equality with all experts on was tested before and holds no longer; gradients: norm ${health.medianNorm.toPrecision(3)} (largest ${health.largestNorm.toPrecision(3)}), ${(100 * health.clippedShare).toFixed(0)}% of the steps clipped at 1, ${alarms}`,
  ];
}
