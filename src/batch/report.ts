import type { Paint } from '../base/paint.js';
import { githubAnnotation, junitXml, type JunitCase } from '../base/reporters.js';
import { columns, duration } from '../base/text.js';
import type { BatchReport, JobReport } from './run.js';
import type { JobState } from './types.js';

const words: Readonly<Record<JobState, string>> = {
  waiting: 'not started',
  running: 'running',
  done: 'done',
  failed: 'failed',
  gate: 'gate failed',
  skipped: 'skipped',
  interrupted: 'interrupted',
};

const firstLine = (text: string | null): string => text?.split('\n')[0] ?? '';

/** The table at the end, and one line of sums. */
export function batchTable(report: BatchReport, paint: Paint): string {
  const colour = ({ state }: JobReport) => (state === 'done' ? paint.green : state === 'failed' || state === 'gate' ? paint.red : paint.yellow); // prettier-ignore
  const head = ['job', 'command', 'state', 'time', 'tries', ''].map((cell) => paint.bold(cell));
  const rows = report.jobs.map((job) => [
    job.name,
    job.command,
    colour(job)(job.before ? 'done before' : words[job.state]),
    job.attempts === 0 ? '' : duration(job.seconds),
    job.attempts === 0 ? '' : String(job.attempts),
    job.state === 'done' ? (job.out ?? '') : firstLine(job.message),
  ]);
  const counts = (Object.keys(words) as JobState[]).flatMap((state) => {
    const n = report.jobs.filter((job) => job.state === state).length;
    return n === 0 ? [] : [`${n} ${words[state]}`];
  });
  const retries = report.retries === 0 ? '' : `; ${report.retries} ${report.retries === 1 ? 'retry' : 'retries'}`;
  return `${columns([head, ...rows], 'lllrrl')}\n\n${report.jobs.length} jobs: ${counts.join(', ')}${retries}; ${duration(report.seconds)}`;
}

/** An annotation for each job that is not done, and one for the batch. */
export function batchGithub(report: BatchReport, file: string): string {
  const bad = report.jobs.filter(({ state }) => state !== 'done');
  const lines = bad.map(
    ({ name, state, message }) =>
    githubAnnotation(state === 'failed' || state === 'gate' ? 'error' : 'warning', `${name}: ${words[state]}`, message ?? words[state]), // prettier-ignore
  );
  const passed = bad.length === 0;
  const verdict = `${file}: ${report.jobs.length - bad.length} of ${report.jobs.length} jobs done in ${duration(report.seconds)}`; // prettier-ignore
  return [...lines, githubAnnotation(passed ? 'notice' : 'error', passed ? 'Batch done' : 'Batch not done', verdict)].join('\n'); // prettier-ignore
}

/** A test case for each job: a failed gate is a failure, a job that broke an error, one that did not run skipped. */
export function batchJunit(report: BatchReport, file: string): string {
  const outcome = ({ state, message, exitCode, signal }: JobReport): JunitCase['outcome'] => {
    if (state === 'done') return { kind: 'passed' };
    if (state !== 'failed' && state !== 'gate') return { kind: 'skipped', message: message ?? words[state] };
    const type = signal ?? `exit ${exitCode}`;
    return { kind: state === 'gate' ? 'failure' : 'error', message: firstLine(message), type, body: message ?? '' };
  };
  const cases = report.jobs.map((job) => ({
    classname: `deepseek-convert.batch.${job.command}`,
    name: job.name,
    seconds: job.seconds,
    outcome: outcome(job),
  }));
  return junitXml(file, cases);
}
