import { choice, integer, list, number, text } from '../base/options.js';
import { boundsOf, gateOptions, reportOptions } from './gate-options.js';
import { deviceOptions, openEnvironment, seedOption } from './shared.js';
import type { ValidateReport } from '../validate/report.js';
import { defineCommand, type Io } from './types.js';
import { verdictText, type Written } from './verdict.js';

export const command = defineCommand({
  name: 'validate',
  description:
    'Runs both models block by block on the same tokens: attention patterns, errors of each layer, predictions, experts, and generations with the same seeds. A failed gate ends with exit code 3, after the reports are written.',
  arguments: {
    reference: text({ required: true, value: 'reference', help: 'The original: a folder or a file.' }),
    candidate: text({ required: true, value: 'candidate', help: 'What was made of it.' }),
  },
  options: {
    text: list({ value: 'file', help: 'Text to compare on (.txt, .jsonl); repeatable. Default: held-out texts of this tool.' }), // prettier-ignore
    samples: integer({ min: 1, default: 32, help: 'Windows of text in all.' }),
    seqLen: integer({ min: 2, default: 512, help: 'Tokens of each window, at most the context of the models.' }),
    prompts: text({ value: 'file', help: 'Prompts of the generations (.txt, .jsonl); default: beginnings of the windows.' }), // prettier-ignore
    generations: integer({ min: 0, defaultNote: '16 where a whole model fits into memory', help: 'Generations to compare; 0: none.' }), // prettier-ignore
    newTokens: integer({ min: 1, default: 64, help: 'Tokens of each generation.' }),
    longTokens: integer({ min: 0, defaultNote: '1000 on a GPU, none on the CPU', help: 'Tokens of four long generations that show whether the candidate collapses into a loop.' }), // prettier-ignore
    temperature: number({ min: 0, default: 0.8, help: 'Of the generations; 0: always the most probable token.' }),
    resamples: integer({ min: 100, default: 1000, help: 'Draws of the bootstrap behind the intervals.' }),
    dtype: choice(['f32', 'bf16'], { defaultNote: 'f32 on the CPU, bf16 on a GPU', help: 'Arithmetic.' }),
    profile: choice(['exact', 'quantized', 'restructured'], { defaultNote: 'by what the models are', help: 'Which default bounds: for the same weights in another container, for quantized ones, for dense -> MoE.' }), // prettier-ignore
    referenceConfig: text({ value: 'path', help: "The reference's config.json, where it does not lie beside the weights." }), // prettier-ignore
    candidateConfig: text({ value: 'path', help: "The candidate's." }),
    reporter: choice(['text', 'github', 'junit'], { default: 'text', help: 'What stdout gets: text for people, annotations of GitHub Actions, or JUnit XML.' }), // prettier-ignore
    ...reportOptions,
    ...gateOptions,
    ...seedOption,
    ...deviceOptions,
  },
  examples: [
    ['validate fixtures/moe-6m fixtures/moe-6m --samples 2 --seq-len 64 --generations 0', 'A model against itself.'],
    [
      'validate fixtures/moe-6m fixtures/moe-6m --samples 2 --seq-len 64 --generations 2 --new-tokens 8 --max-kl 0.01 --report report.html',
      'A stricter bound, and a report to read.',
    ],
  ],
  async run(given, io) {
    const { gateFailure, runValidate } = await import('../validate/run.js');
    using environment = await openEnvironment(given, io);
    const report = await runValidate({ ...given, texts: given.text, bounds: boundsOf(given) }, environment);
    const failure = gateFailure(report);
    return { data: { report }, text: await stdoutOf(report, io, given), ...(failure && { failure }) };
  },
});

async function stdoutOf(
  report: ValidateReport,
  io: Io,
  given: Written & { readonly reporter: 'text' | 'github' | 'junit' },
): Promise<string> {
  if (given.reporter === 'text') return verdictText(report, io, given);
  const { toGithub, toJunit } = await import('../validate/report/reporters.js');
  return given.reporter === 'github' ? toGithub(report) : toJunit(report);
}
