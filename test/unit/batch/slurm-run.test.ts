import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import { silentLog } from '../../../src/base/log.js';
import { readJobs } from '../../../src/batch/file.js';
import { failureOf } from '../../../src/batch/run.js';
import { batchStatus, cancelOnSlurm, runOnSlurm, takeBackFromSlurm } from '../../../src/batch/slurm.js';
import { fingerprintOf } from '../../../src/batch/state.js';
import type { Job } from '../../../src/batch/types.js';
import { jobCommands } from '../../../src/commands/batch.js';
import { commands } from '../../../src/commands/index.js';

const all = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(all, { recursive: true, force: true }));
const known = await jobCommands(commands);

// Slurm's programs as far as the batch calls them: they tell what they were called with, and say what the test has written.
const bin = join(all, 'bin');
mkdirSync(bin);
const programs = {
  sbatch: `[ -z "$SBATCH_ARRAY_INX" ] || exit 1
    for a; do printf '%s\\n' "$a"; done > "$FAKE/sbatch.$(ls "$FAKE" | grep -c '^sbatch')"
    for a; do [ "$a" != "--job-name=$(cat "$FAKE/refuse" 2>/dev/null)" ] || { echo "sbatch: error: invalid partition specified: x" >&2; exit 1; }; done
    echo "$((99 + $(ls "$FAKE" | grep -c '^sbatch')));cluster"`,
  squeue: `[ -e "$FAKE/queue" ] || { echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1; }; cat "$FAKE/queue"`,
  sacct: `[ -e "$FAKE/sacct" ] || { echo 'Slurm accounting storage is disabled' >&2; exit 1; }; cat "$FAKE/sacct"`,
  scancel: `echo "$@" >> "$FAKE/scancel"`,
};
for (const [name, body] of Object.entries(programs)) {
  writeFileSync(join(bin, name), `#!/bin/sh\n${body}\n`);
  chmodSync(join(bin, name), 0o755);
}

let folder: string;
let work: string;
let count = 0;
let jobs: Job[];
beforeEach(async () => {
  folder = join(all, `run${count++}`);
  work = join(folder, 'work');
  mkdirSync(join(work, 'slurm'), { recursive: true });
  mkdirSync(join(folder, 'fake'));
  said('queue', '');
  const path = join(folder, 'jobs.yaml');
  writeFileSync(
    path,
    `
defaults: { slurm: { partition: gpu, time: 60 } }
jobs:
  - { name: half, command: convert, input: ${folder}/m, out: ${folder}/half }
  - { name: int4, command: quantize, input: ${folder}/half, out: ${folder}/int4, shards: 3 }
  - { name: look, command: inspect, input: ${folder}/int4 }
`,
  );
  jobs = await readJobs(path, { commands: known, environment: {}, outputRoot: folder, workFolder: work });
});

const said = (name: string, text: string) => writeFileSync(join(folder, 'fake', name), text);
const calls = () =>
  Array.from({ length: 20 }, (_, i) => join(folder, 'fake', `sbatch.${i}`))
    .filter((path) => existsSync(path))
    .map((path) => readFileSync(path, 'utf8').trim().split('\n'));
const cancelled = () => (existsSync(join(folder, 'fake/scancel')) ? readFileSync(join(folder, 'fake/scancel'), 'utf8').trim() : ''); // prettier-ignore
const options = () => ({
  jobs,
  workFolder: work,
  program: '/bin/dc.js',
  taskProgram: '/dist/task.js',
  environment: { PATH: `${bin}:${process.env.PATH}`, FAKE: join(folder, 'fake'), SBATCH_ARRAY_INX: '0-9' },
  retries: 1,
  wait: false,
  metricsFile: undefined,
  metricsAddress: undefined,
});
const run = (more: object = {}) => runOnSlurm({ ...options(), ...more }, silentLog, new AbortController().signal);
const states = (report: Awaited<ReturnType<typeof run>>) => Object.fromEntries(report.jobs.map(({ name, state }) => [name, state])); // prettier-ignore
const messages = (report: Awaited<ReturnType<typeof run>>) => Object.fromEntries(report.jobs.map(({ name, message }) => [name, message])); // prettier-ignore

/** What the task on the node would leave. */
async function ran(stem: string, id: string, exitCode: number | null, more: object = {}): Promise<void> {
  const job = jobs.find(({ name }) => stem.startsWith(name))!;
  const time = new Date().toISOString();
  const state = exitCode === null ? 'running' : 'ended';
  const ended = exitCode === null ? null : time;
  const record = { version: 1, id, state, exitCode, message: exitCode === 0 ? null : 'why', attempts: 1, fingerprint: await fingerprintOf(job), started: time, ended, memory: 5e6, signal: null, ...more }; // prettier-ignore
  writeFileSync(join(work, 'slurm', `${stem}.record.json`), JSON.stringify(record));
}

const live = '100|N/A|RUNNING|None\n101|N/A|PENDING|Dependency\n102|0|PENDING|Dependency\n102|1|PENDING|Dependency\n102|2|PENDING|Dependency\n103|N/A|PENDING|Dependency\n104|N/A|PENDING|Dependency\n'; // prettier-ignore

describe('a batch given to Slurm', () => {
  it('makes needs dependencies, and of a job in shards plan, array and merge', async () => {
    expect(states(await run())).toEqual({ half: 'waiting', int4: 'waiting', look: 'waiting' });
    const dependencies = calls().map((args) => args.find((arg) => arg.startsWith('--dependency')));
    expect(dependencies).toEqual([undefined, ...[100, 101, 102, 103].map((id) => `--dependency=afterok:${id}`)]);
    expect(calls().map((args) => args.find((arg) => arg.startsWith('--job-name')))).toEqual(
      ['half', 'int4+plan', 'int4+worker', 'int4+merge', 'look'].map((name) => `--job-name=${name}`),
    );
    for (const args of calls()) {
      for (const wanted of ['--parsable', '--requeue', '--kill-on-invalid-dep=yes', '--open-mode=append', '--partition=gpu', '--time=60']) expect(args).toContain(wanted); // prettier-ignore
      expect(readFileSync(args.at(-1)!, 'utf8')).toContain('exec ');
    }
  });

  it('submits nothing twice, and what has failed again', async () => {
    await run();
    said('queue', live);
    expect(states(await run())).toEqual({ half: 'running', int4: 'waiting', look: 'waiting' });
    expect(calls()).toHaveLength(5);
    await ran('half', '100', 1);
    said('queue', live.replace('100|N/A|RUNNING', '100|N/A|FAILED').replaceAll('PENDING', 'CANCELLED'));
    const status = await batchStatus(options());
    expect(states(status)).toEqual({ half: 'failed', int4: 'skipped', look: 'skipped' });
    expect(failureOf(status)!.exitCode).toBe(1);
    expect(states(await run())).toEqual({ half: 'waiting', int4: 'waiting', look: 'waiting' });
    expect(calls()).toHaveLength(10);
  });

  it('leaves out what is done, and depends on nothing that is', async () => {
    await run();
    await ran('half', '100', 0);
    mkdirSync(join(folder, 'half'));
    await ran('half', '100', 0); // its input is as it was
    const report = await run();
    expect(report.jobs[0]).toMatchObject({ name: 'half', state: 'done', before: true, memory: 5e6 });
    expect(calls()[5]).toContain('--job-name=int4+plan');
    expect(calls()[5]!.some((arg) => arg.startsWith('--dependency'))).toBe(false);
    await takeBackFromSlurm({ ...options(), jobs: jobs.slice(0, 1) });
    expect(states(await batchStatus(options()))).toMatchObject({ half: 'done' });
  });

  it('refuses a changed job, and to run here, while Slurm has it', async () => {
    await run();
    said('queue', live);
    jobs = jobs.map((job) => (job.name === 'int4' ? { ...job, shards: 2 } : job));
    await expect(run()).rejects.toThrow(/changed while Slurm has it \(int4\)/);
    await expect(takeBackFromSlurm(options())).rejects.toThrow(/Slurm has jobs of this batch.*half, int4, look/);
  });

  it('cancels what is alive', async () => {
    await run();
    said('queue', live.replace('100|N/A|RUNNING', '100|N/A|COMPLETED'));
    await ran('half', '100', 0);
    expect(await cancelOnSlurm(options())).toEqual(['int4', 'look']);
    expect(cancelled()).toBe('--quiet 101 102 103 104');
  });

  it('takes back the stages of a job of which Slurm refuses one', async () => {
    said('refuse', 'int4+merge');
    await expect(run()).rejects.toThrow(
      /Slurm does not take the job \(int4\+merge\): got invalid partition specified: x/,
    );
    expect(cancelled()).toBe('--quiet 101 102');
    said('refuse', '');
    said('queue', '100|N/A|PENDING|Priority\n');
    await run();
    expect(calls().slice(4).map((args) => args.find((arg) => arg.startsWith('--job-name')))).toEqual(['int4+plan', 'int4+worker', 'int4+merge', 'look'].map((name) => `--job-name=${name}`)); // prettier-ignore
    expect(calls()[4]).toContain('--dependency=afterok:100');
  });

  it('says how each job came to its end', async () => {
    await run();
    await ran('half', '100', 0);
    await ran('int4+plan', '101', 0);
    await ran('int4+worker-0', '102', 0);
    await ran('int4+worker-1', '102', 3, { message: '1 gate failed' });
    await ran('int4+worker-2', '102', 0);
    said('queue', '103|N/A|CANCELLED|DependencyNeverSatisfied\n104|N/A|CANCELLED|DependencyNeverSatisfied\n105|N/A|RUNNING|None\n'); // prettier-ignore
    const report = await batchStatus(options());
    expect(states(report)).toEqual({ half: 'done', int4: 'gate', look: 'skipped' });
    expect(messages(report).int4).toBe('worker-1: 1 gate failed');
    expect(report.jobs[1]).toMatchObject({ attempts: 4, exitCode: 3 });
    expect(failureOf(report)!.exitCode).toBe(3);
  });

  it.each([
    ['TIMEOUT', 'failed', 4, 'Slurm ended 100: TIMEOUT'],
    ['OUT_OF_MEMORY', 'failed', 4, 'Slurm ended 100: OUT_OF_MEMORY'],
    ['CANCELLED', 'interrupted', 75, 'cancelled in Slurm (100)'],
  ])('knows from squeue and from sacct that a job ended by %s', async (slurmState, state, exitCode, message) => {
    jobs = jobs.slice(0, 1);
    await run();
    await ran('half', '100', null);
    for (const source of ['queue', 'sacct']) {
      said('queue', '');
      said(source, source === 'queue' ? `100|N/A|${slurmState}|None\n` : `100|${slurmState} by 0\n`);
      const report = await batchStatus(options());
      expect(messages(report)).toEqual({ half: message });
      expect(states(report)).toEqual({ half: state });
      expect(failureOf(report)!.exitCode).toBe(exitCode);
    }
  });

  it('tells a queue that does not answer from one that is empty', async () => {
    jobs = jobs.slice(0, 1);
    await run();
    await ran('half', '100', null);
    expect(messages(await batchStatus(options()))).toEqual({ half: 'Slurm’s 100 has ended and left no result' });
    rmSync(join(folder, 'fake/queue'));
    await expect(batchStatus(options())).rejects.toThrow(/does not say what is in its queue.*Unable to contact/);
    const nowhere = { ...options(), environment: { PATH: folder } };
    await expect(batchStatus(nowhere)).rejects.toThrow(/Slurm is not on this machine/);
  });

  it('stays until a job that is running has ended', async () => {
    jobs = jobs.slice(0, 1);
    const waiting = run({ wait: true });
    said('queue', '100|N/A|RUNNING|None\n');
    setTimeout(() => void ran('half', '100', 0), 1500);
    const report = await waiting;
    expect(states(report)).toEqual({ half: 'done' });
    expect(report.jobs[0]!.before).toBe(false);
    expect(JSON.parse(readFileSync(join(work, 'slurm/submitted.json'), 'utf8'))).toMatchObject({ jobs: {} });
    expect(JSON.parse(readFileSync(join(work, 'state.json'), 'utf8'))).toMatchObject({ jobs: { half: { state: 'done' } } }); // prettier-ignore
  });
});
