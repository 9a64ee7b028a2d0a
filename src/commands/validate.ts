import { Expected, choice, custom, integer, list, number, text, type Option } from '../base/options.js';
import { columns } from '../base/text.js';
import { gates } from '../validate/gates.js';
import type { GateResult, ValidateReport } from '../validate/report.js';
import { deviceOptions, openEnvironment, seedOption } from './shared.js';
import { defineCommand, type Io } from './types.js';

type Bound = number | null | undefined;

const section = 'Gates (defaults depend on the kind of conversion, --profile; off: no gate):';

/** One option for each gate, from the same table that judges. */
const gateOptions = Object.fromEntries(
  gates.map((gate): [string, Option<Bound>] => {
    const { quantized, restructured } = gate.bounds;
    const show = (bound: number | null): string => (bound === null ? 'off' : String(bound));
    const note =
      quantized === restructured ? show(quantized) : `${show(quantized)}, dense -> MoE ${show(restructured)}`;
    const option = custom<Bound>({ section, help: `${gate.metric}.`, defaultNote: note }, 'x|off', (given) => {
      if (given === 'off') return null;
      const value = Number(given);
      if (given.trim() === '' || !Number.isFinite(value)) throw new Expected('a number, or off');
      return value;
    });
    return [gate.id, option];
  }),
);

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
    temperature: number({ min: 0, default: 0.8, help: 'Of the generations; 0: always the most probable token.' }),
    resamples: integer({ min: 100, default: 1000, help: 'Draws of the bootstrap behind the intervals.' }),
    dtype: choice(['f32', 'bf16'], { defaultNote: 'f32 on the CPU, bf16 on a GPU', help: 'Arithmetic.' }),
    profile: choice(['exact', 'quantized', 'restructured'], { defaultNote: 'by what the models are', help: 'Which default bounds: for the same weights in another container, for quantized ones, for dense -> MoE.' }), // prettier-ignore
    referenceConfig: text({ value: 'path', help: "The reference's config.json, where it does not lie beside the weights." }), // prettier-ignore
    candidateConfig: text({ value: 'path', help: "The candidate's." }),
    report: text({ value: 'report.html', help: 'Write the report as one self-contained HTML file.' }),
    reportJson: text({ value: 'report.json', help: 'Write it as JSON.' }),
    reportMd: text({ value: 'report.md', help: 'Write it as Markdown.' }),
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
    const all = given as unknown as Readonly<Record<string, unknown>>;
    const bounds = Object.fromEntries(
      gates.filter(({ id }) => all[id] !== undefined).map(({ id }) => [id, all[id] as number | null]),
    );
    const report = await runValidate({ ...given, texts: given.text, bounds }, environment);
    const failure = gateFailure(report);
    return { data: { report }, text: summary(report, io, given), ...(failure && { failure }) };
  },
});

interface Written {
  readonly report: string | undefined;
  readonly reportJson: string | undefined;
  readonly reportMd: string | undefined;
}

function summary(report: ValidateReport, { paint }: Pick<Io, 'paint'>, written: Written): string {
  const { logits, settings } = report;
  const number = (value: number | null): string =>
    value === null ? 'not finite' : String(Number(value.toPrecision(4)));
  const row = (gate: GateResult): string[] => {
    const word = gate.status === 'pass' ? paint.green('pass') : gate.status === 'fail' ? paint.red('FAIL') : paint.dim('none'); // prettier-ignore
    const sign = gate.direction === 'max' ? '<=' : '>=';
    return [word, gate.name, number(gate.value), gate.bound === null ? '' : `${sign} ${gate.bound}`, gate.where ?? ''];
  };
  const rows = report.gates.filter(({ status }) => status !== 'skipped').map(row);
  const failed = report.gates.filter(({ status }) => status === 'fail');
  const verdict = report.passed
    ? paint.green('PASSED')
    : paint.red(`FAILED (${failed.map(({ flag }) => flag).join(', ')})`);
  const files = [written.report, written.reportJson, written.reportMd].filter((path) => path !== undefined);
  const kl = logits.intervals.kl;
  const ratio = logits.intervals.ratio;
  return [
    columns(rows, 'llrll'),
    '',
    ...report.diagnosis,
    ...report.skipped.map(({ part, reason }) => paint.dim(`left out: ${part} (${reason})`)),
    ...report.notes.map((note) => paint.dim(note)),
    `${settings.tokens} tokens: KL ${number(logits.kl.mean)} (95%: ${number(kl.low)} to ${number(kl.high)}), perplexity ${number(logits.perplexity.reference)} -> ${number(logits.perplexity.candidate)} (x ${number(logits.perplexity.ratio)}, 95%: ${number(ratio.low)} to ${number(ratio.high)}: ${number(100 / logits.perplexity.ratio)}% of the quality), same first choice ${number(logits.top1 * 100)}%`,
    `${paint.bold('Verdict:')} ${verdict} ${report.candidate.path} against ${report.reference.path}, bounds for ${report.profile} models`,
    ...(files.length > 0 ? [`Written: ${files.join(', ')}`] : []),
  ].join('\n');
}
