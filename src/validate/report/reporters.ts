import { basename } from 'node:path';
import { githubAnnotation, junitXml, type JunitCase } from '../../base/reporters.js';
import type { GateResult, ValidateReport } from '../report.js';
import { show } from '../../base/html/markup.js';

const sides = (report: ValidateReport): string =>
  `${basename(report.candidate.path)} against ${basename(report.reference.path)}`;

function finding({ value, bound, direction, where, flag }: GateResult): string {
  const sign = direction === 'max' ? 'at most' : 'at least';
  return `${show(value ?? NaN)}, ${sign} ${show(bound)} (${flag})${where === undefined ? '' : `; ${where}`}`;
}

/** Workflow commands of GitHub Actions: an annotation for each failed gate and one for the verdict. */
export function toGithub(report: ValidateReport): string {
  const failed = report.gates.filter(({ status }) => status === 'fail');
  const lines = failed.map((gate) => githubAnnotation('error', gate.name, `${finding(gate)}\n${gate.remedy ?? ''}.`));
  const { kl, perplexity, top1 } = report.logits;
  const numbers = `KL ${show(kl.mean)}, perplexity x ${show(perplexity.ratio, 4)}, same first choice ${show(100 * top1)}%`;
  const verdict = report.passed ? 'Validation passed' : `Validation failed: ${failed.length} gates`;
  const level = report.passed ? 'notice' : 'error';
  return [...lines, githubAnnotation(level, verdict, `${sides(report)}: ${numbers}`)].join('\n');
}

/** JUnit XML: one test case for each gate, in the form that CI systems read. */
export function toJunit(report: ValidateReport): string {
  const outcome = (gate: GateResult): JunitCase['outcome'] => {
    if (gate.status === 'pass') return { kind: 'passed' };
    if (gate.status !== 'fail') return { kind: 'skipped', message: gate.reason ?? 'no bound' };
    const body = `${gate.meaning}\nLikely remedy: ${gate.remedy ?? ''}.`;
    return { kind: 'failure', message: finding(gate), type: 'gate', body };
  };
  const cases = report.gates.map((gate) => ({
    classname: 'deepseek-convert.validate',
    name: gate.name,
    seconds: 0,
    outcome: outcome(gate),
  }));
  return junitXml(sides(report), cases);
}
