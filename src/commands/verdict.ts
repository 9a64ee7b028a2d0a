import { columns } from '../base/text.js';
import type { GateResult, ValidateReport } from '../validate/report.js';
import type { Io } from './types.js';

export interface Written {
  readonly report: string | undefined;
  readonly reportJson: string | undefined;
  readonly reportMd: string | undefined;
}

const number = (value: number | null): string => (value === null ? 'not finite' : String(Number(value.toPrecision(4))));

/** One line: the verdict and the numbers that matter most. */
export function verdictLine(report: ValidateReport, { paint }: Pick<Io, 'paint'>): string {
  const { kl, perplexity, top1 } = report.logits;
  const failed = report.gates.filter(({ status }) => status === 'fail').map(({ flag }) => flag);
  const judged = report.gates.filter(({ status }) => status === 'pass' || status === 'fail').length;
  const verdict = report.passed ? paint.green(`passed ${judged} gates`) : paint.red(`FAILED ${failed.join(', ')}`);
  const notes = report.notes.map((note) => `\n${note}`).join('');
  return `validation: ${verdict}; KL ${number(kl.mean)}, perplexity x ${number(perplexity.ratio)}, same first choice ${number(top1 * 100)}% on ${report.settings.tokens} held-out tokens${notes}`;
}

/** A report for the terminal: every gate, what the numbers point at, the verdict, and the files written. */
export function verdictText(report: ValidateReport, { paint }: Pick<Io, 'paint'>, written: Written): string {
  const { logits, settings } = report;
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
