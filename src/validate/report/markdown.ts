import type { GateResult, ValidateReport } from '../report.js';
import { percent, show } from '../../base/html/markup.js';

/** For a pull request or a model card: the verdict, the gates, the numbers that people ask for. */
export function toMarkdown(report: ValidateReport): string {
  const { logits, attention, diversity, routing, layers } = report;
  const lines: string[] = [
    `# Validation: ${report.passed ? 'passed' : '**FAILED**'}`,
    '',
    `\`${report.candidate.path}\` against \`${report.reference.path}\`, ${report.settings.tokens} tokens of ${report.settings.texts.length} texts, bounds for ${report.profile} models.`,
    '',
  ];
  for (const line of report.diagnosis) lines.push(`- ${line}`);
  if (report.diagnosis.length > 0) lines.push('');
  lines.push(
    ...table(
      ['verdict', 'gate', 'value', 'bound', 'where'],
      report.gates.filter(({ status }) => status !== 'skipped').map(gateRow),
    ),
  );
  const failed = report.gates.filter(({ status }) => status === 'fail');
  if (failed.length > 0) {
    lines.push('', '## Likely remedies', '');
    for (const gate of failed) lines.push(`- ${gate.flag}: ${gate.remedy ?? ''}.`);
  }
  lines.push('', '## Predictions', '');
  lines.push(
    ...table(
      ['text', 'positions', 'KL', 'KL p99', 'perplexity', 'candidate', 'ratio', 'top-1'],
      [...(logits.texts.length > 1 ? [{ name: 'all', ...logits }] : []), ...logits.texts].map((t) => [
        t.name,
        String(t.tokens),
        show(t.kl.mean),
        show(t.kl.p99),
        show(t.perplexity.reference),
        show(t.perplexity.candidate),
        show(t.perplexity.ratio, 4),
        percent(t.top1),
      ]),
    ),
  );
  const worst = layers.toSorted((a, b) => b.teacherForced.update - a.teacherForced.update).slice(0, 5);
  if (worst.length > 0) {
    lines.push('', '## Layers with the largest error of their own', '');
    lines.push(
      ...table(
        ['layer', 'own error', 'error of the stream behind it'],
        worst.map((l) => [l.name, show(l.teacherForced.update), show(l.freeRunning.output)]),
      ),
    );
  }
  if (attention) {
    const row = (name: string, mode: typeof attention.teacherForced): string[] => [
      name,
      show(mode.mean.divergence),
      show(mode.worst.divergence),
      show(mode.mean.cosine),
      show(mode.mean.overlap),
    ];
    lines.push('', '## Attention patterns', '');
    lines.push(
      ...table(
        ['', 'divergence', 'worst 5% of heads', 'cosine', 'top-8 shared'],
        [row("reference's input", attention.teacherForced), row('free-running', attention.freeRunning)],
      ),
    );
  }
  if (routing) {
    lines.push('', '## Experts', '');
    lines.push(
      `Mean MaxVio ${show(routing.mean.maxVio)}, entropy ${show(routing.mean.entropy)}, ${routing.dead} of ${routing.experts} dead.`,
    );
  }
  if (diversity) {
    lines.push('', `## Generations (${diversity.settings.prompts} prompts)`, '');
    lines.push(
      ...table(
        ['metric', 'reference', 'candidate', '95% of the difference'],
        [
          ...diversity.differences.map((d) => [
            d.metric,
            show(d.reference),
            show(d.candidate),
            `${show(d.interval.low)} to ${show(d.interval.high)}`,
          ]),
          ['EAD', show(diversity.reference.ead), show(diversity.candidate.ead), ''],
          ['self-BLEU', show(diversity.reference.selfBleu), show(diversity.candidate.selfBleu), ''],
        ],
      ),
    );
  }
  const rest = [...report.skipped.map((s) => `Left out: ${s.part} (${s.reason}).`), ...report.notes];
  if (rest.length > 0) lines.push('', ...rest.map((note) => `- ${note}`));
  return `${lines.join('\n')}\n`;
}

function gateRow(gate: GateResult): string[] {
  const words = { pass: 'pass', fail: '**FAIL**', off: 'no bound', skipped: 'n/a' };
  const sign = gate.direction === 'max' ? '<=' : '>=';
  return [
    words[gate.status],
    `${gate.name}: ${gate.metric}`,
    gate.value === null ? 'not finite' : show(gate.value, 4),
    gate.bound === null ? '' : `${sign} ${show(gate.bound)}`,
    gate.where ?? '',
  ];
}

const cell = (text: string): string => text.replaceAll('|', '\\|').replace(/\s+/g, ' ');

function table(head: readonly string[], rows: readonly (readonly string[])[]): string[] {
  const line = (cells: readonly string[]): string => `| ${cells.map(cell).join(' | ')} |`;
  return [line(head), line(head.map(() => '---')), ...rows.map(line)];
}
