import { basename } from 'node:path';
import type { GateResult, ValidateReport } from '../report.js';
import { escapeHtml, show } from './markup.js';

const sides = (report: ValidateReport): string =>
  `${basename(report.candidate.path)} against ${basename(report.reference.path)}`;

function finding({ value, bound, direction, where, flag }: GateResult): string {
  const sign = direction === 'max' ? 'at most' : 'at least';
  return `${show(value ?? NaN)}, ${sign} ${show(bound)} (${flag})${where === undefined ? '' : `; ${where}`}`;
}

/** Workflow commands of GitHub Actions: an annotation for each failed gate and one for the verdict. */
export function toGithub(report: ValidateReport): string {
  // What ends a command or a property there; the documentation of workflow commands has these escapes.
  const message = (text: string) => text.replaceAll('%', '%25').replaceAll('\r', '%0D').replaceAll('\n', '%0A');
  const property = (text: string) => message(text).replaceAll(':', '%3A').replaceAll(',', '%2C');
  const failed = report.gates.filter(({ status }) => status === 'fail');
  const lines = failed.map(
    (gate) => `::error title=${property(gate.name)}::${message(`${finding(gate)}\n${gate.remedy ?? ''}.`)}`,
  );
  const { kl, perplexity, top1 } = report.logits;
  const numbers = `KL ${show(kl.mean)}, perplexity x ${show(perplexity.ratio, 4)}, same first choice ${show(100 * top1)}%`;
  const verdict = report.passed ? 'Validation passed' : `Validation failed: ${failed.length} gates`;
  const level = report.passed ? 'notice' : 'error';
  return [...lines, `::${level} title=${property(verdict)}::${message(`${sides(report)}: ${numbers}`)}`].join('\n');
}

/** JUnit XML: one test case for each gate, in the form that CI systems read. */
export function toJunit(report: ValidateReport): string {
  const text = (value: string) => escapeHtml(value).replaceAll("'", '&apos;');
  const count = (status: GateResult['status']) => report.gates.filter((gate) => gate.status === status).length;
  const totals = `tests="${report.gates.length}" failures="${count('fail')}" errors="0" skipped="${count('skipped') + count('off')}"`;
  const cases = report.gates.map((gate) => {
    const open = `    <testcase classname="deepseek-convert.validate" name="${text(gate.name)}" time="0"`;
    if (gate.status === 'pass') return `${open} />`;
    const inner =
      gate.status === 'fail'
        ? `<failure message="${text(finding(gate))}" type="gate">${text(`${gate.meaning}\nLikely remedy: ${gate.remedy ?? ''}.`)}</failure>`
        : `<skipped message="${text(gate.reason ?? 'no bound')}" />`;
    return `${open}>\n      ${inner}\n    </testcase>`;
  });
  return [
    '<?xml version="1.0" encoding="UTF-8"?>',
    `<testsuites ${totals}>`,
    `  <testsuite name="${text(sides(report))}" ${totals} time="0">`,
    ...cases,
    '  </testsuite>',
    '</testsuites>',
  ].join('\n');
}
