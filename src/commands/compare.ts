import { ConvertError, badUsage } from '../base/errors.js';
import { formatBytes, writeFileAtomic } from '../base/files.js';
import { choice, integer, list, text } from '../base/options.js';
import { columns } from '../base/text.js';
import type { Duel, Recommendation } from '../validate/compare.js';
import type { ValidateReport } from '../validate/report.js';
import { boundsOf, gateOptions } from './gate-options.js';
import { deviceOptions, openEnvironment, seedOption } from './shared.js';
import { defineCommand, type Io } from './types.js';

export const command = defineCommand({
  name: 'compare',
  description:
    'Validates each candidate against the reference on the same windows, tells which differences are more than chance, and recommends the smallest that passes. Exit code 3 where none does.',
  arguments: {
    reference: text({ required: true, value: 'reference', help: 'The original: a folder or a file.' }),
    candidates: list({ required: true, value: 'candidate', help: 'What was made of it: two or more.' }),
  },
  options: {
    text: list({ value: 'file', help: 'Text to compare on (.txt, .jsonl); repeatable. Default: held-out texts of this tool.' }), // prettier-ignore
    samples: integer({ min: 2, default: 32, help: 'Windows of text in all.' }),
    seqLen: integer({ min: 2, default: 512, help: 'Tokens of each window, at most the context of the models.' }),
    generations: integer({ min: 0, default: 0, help: 'Generations to compare; 0: none.' }),
    newTokens: integer({ min: 1, default: 64, help: 'Tokens of each generation.' }),
    resamples: integer({ min: 100, default: 1000, help: 'Draws of the bootstrap behind the intervals.' }),
    dtype: choice(['f32', 'bf16'], { defaultNote: 'f32 on the CPU, bf16 on a GPU', help: 'Arithmetic.' }),
    profile: choice(['exact', 'quantized', 'restructured'], { defaultNote: 'by what the models are', help: 'Which default bounds.' }), // prettier-ignore
    reportJson: text({ value: 'compare.json', help: 'Write all reports, pairs and the recommendation as JSON.' }),
    ...gateOptions,
    ...seedOption,
    ...deviceOptions,
  },
  examples: [
    [
      'compare fixtures/moe-6m fixtures/moe-6m fixtures/moe-6m --samples 2 --seq-len 64',
      'Two candidates that are the reference itself.',
    ],
  ],
  async run(given, io) {
    if (given.candidates.length < 2) {
      throw badUsage('compare needs two candidates or more', {
        got: given.candidates.join(', ') || 'none',
        hint: 'For one: deepseek-convert validate <reference> <candidate>.',
      });
    }
    const { runValidate } = await import('../validate/run.js');
    const { comparisonSchema, duels, recommend, rule } = await import('../validate/compare.js');
    using environment = await openEnvironment(given, io);
    const { reportJson, ...rest } = given;
    const options = { ...rest, longTokens: 0 };
    const reports: ValidateReport[] = [];
    for (const candidate of given.candidates) {
      io.log.info(`${candidate} against ${given.reference}`);
      reports.push(await runValidate({ ...options, candidate, texts: given.text, bounds: boundsOf(given) }, environment)); // prettier-ignore
    }
    const pairs = duels(reports, { resamples: given.resamples, seed: given.seed });
    const recommendation = recommend(reports, pairs);
    const data = { rule, recommendation, pairs, reports };
    if (reportJson !== undefined) {
      const object = { schema: comparisonSchema, version: 1, ...data };
      await writeFileAtomic(reportJson, `${JSON.stringify(object, null, 1)}\n`);
    }
    const failure =
      recommendation.candidate === null &&
      new ConvertError('gate', `None of ${reports.length} candidates passes every gate`, {
        where: given.candidates.join(', '),
        hint: `deepseek-convert validate ${given.reference} <candidate> says what fails, where, and the likely remedy.`,
      });
    return { data, text: tableOf(reports, pairs, recommendation, rule, io), ...(failure && { failure }) };
  },
});

const number = (value: number): string => String(Number(value.toPrecision(4)));

function tableOf(
  reports: readonly ValidateReport[],
  pairs: readonly Duel[],
  recommendation: Recommendation,
  rule: string,
  { paint }: Pick<Io, 'paint'>,
): string {
  const name = (i: number): string => reports[i]!.candidate.path;
  const rows = reports.map(({ candidate, passed, gates, logits }) => {
    const failed = gates.filter(({ status }) => status === 'fail').map(({ flag }) => flag);
    const { low, high } = logits.intervals.kl;
    return [
      candidate.path,
      formatBytes(candidate.storedBytes),
      `${number((8 * candidate.storedBytes) / candidate.parameters)} bits`,
      `KL ${number(logits.kl.mean)} (${number(low)} to ${number(high)})`,
      `x ${number(logits.perplexity.ratio)}`,
      `${number(100 * logits.top1)}%`,
      passed ? paint.green('passed') : paint.red(`FAILED ${failed.join(', ')}`),
    ];
  });
  const lines = pairs.map(({ first, second, kl, better }) => {
    const { low, high } = kl.interval;
    const verdict = better === null ? 'no more than chance' : `${name(better)} is better`;
    return `${name(first)} - ${name(second)}: KL ${number(kl.difference)} (95%: ${number(low)} to ${number(high)}): ${verdict}`;
  });
  const { candidate, because } = recommendation;
  return [
    columns(
      [['candidate', 'size', 'a weight', 'divergence (95%)', 'perplexity', 'same choice', 'gates'], ...rows],
      'lrrlrrl',
    ),
    '',
    ...lines,
    '',
    `${paint.bold('Recommended:')} ${candidate === null ? 'none' : name(candidate)}, ${because}`,
    paint.dim(`Rule: ${rule}.`),
  ].join('\n');
}
