import { execFileSync } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it } from 'vitest';
import { readKubernetes } from '../../../src/batch/kubernetes-options.js';
import { readSlurm } from '../../../src/batch/slurm-options.js';
import { parseAccounts, parseQueue } from '../../../src/batch/slurm-queue.js';
import { sbatchOptions, sbatchScript, specOf, tasksOf } from '../../../src/batch/slurm-script.js';
import type { Job } from '../../../src/batch/types.js';

const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const job = (more: Partial<Job> = {}): Job => ({
  name: 'int4',
  command: 'quantize',
  needs: [],
  retries: undefined,
  given: new Map([['input', { from: 'file', name: 'input', raw: 'a model' }], ['bits', { from: 'file', name: 'bits', raw: 4n }]] as never),
  values: { input: 'a model', bits: 4 },
  writes: ['/out/int4'],
  out: '/out/int4',
  reads: ['/models/a model'],
  slurm: readSlurm([{ where: 'defaults', value: { partition: 'gpu', time: 90, extra: ['--comment=for a, b'], merge: { partition: 'cpu' } } }]),
  kubernetes: readKubernetes([]),
  shards: undefined,
  ...more,
}); // prettier-ignore
const context = {
  program: '/bin/dc.js',
  taskProgram: '/dist/task.js',
  workFolder: '/work',
  folder: '/here',
  retries: 1,
};

describe('a script for sbatch', () => {
  it('says the same as the arguments, quoted where it must be', () => {
    const [task] = tasksOf(job());
    const options = sbatchOptions(task!, context);
    expect(options).toEqual([
      '--job-name=int4',
      '--chdir=/here',
      '--output=/work/logs/int4.log',
      '--open-mode=append',
      '--requeue',
      '--kill-on-invalid-dep=yes',
      '--signal=B:USR2@120',
      '--nodes=1',
      '--ntasks=1',
      '--partition=gpu',
      '--time=90',
      '--comment=for a, b',
    ]);
    const script = sbatchScript(task!, context).split('\n');
    expect(script[0]).toBe('#!/bin/sh');
    expect(script).toContain('#SBATCH --kill-on-invalid-dep=yes');
    expect(script).toContain('#SBATCH --comment="for a, b"');
    expect(script.at(-2)).toBe(`exec ${process.execPath} /dist/task.js /work/slurm/int4.json`);
  });

  it('makes of a job in shards a plan, an array and a merge', () => {
    const tasks = tasksOf(job({ shards: 4 }));
    expect(tasks.map(({ stage }) => stage)).toEqual(['plan', 'worker', 'merge']);
    const options = tasks.map((task) => sbatchOptions(task, context));
    expect(options[1]).toContain('--array=0-3');
    expect(options[1]).toContain('--output=/work/logs/int4+worker-%a.log');
    expect(options.map((list) => list.find((option) => option.startsWith('--partition')))).toEqual(['--partition=gpu', '--partition=gpu', '--partition=cpu']); // prettier-ignore
    expect(options[0]!.some((option) => option.startsWith('--array'))).toBe(false);
    expect(specOf(tasks[0]!, context).argv).toEqual(['plan', '--input=a model', '--bits=4', '--shards=4']);
  });

  it('keeps what is odd in paths away from the shell and from Slurm', () => {
    const odd = join(folder, `it's $(touch ${folder}/ran) \`id\` #1 100% & ;`.replaceAll('/', '|'));
    mkdirSync(join(odd, 'slurm'), { recursive: true });
    const program = join(odd, 'task.mjs');
    writeFileSync(program, 'process.stdout.write(JSON.stringify(process.argv.slice(2)));');
    const here = { ...context, taskProgram: program, workFolder: odd, folder: odd };
    const [task] = tasksOf(job());
    const path = join(folder, 'script.sh');
    writeFileSync(path, sbatchScript(task!, here));
    expect(JSON.parse(execFileSync('sh', [path], { encoding: 'utf8' }))).toEqual([join(odd, 'slurm/int4.json')]);
    expect(existsSync(join(folder, 'ran'))).toBe(false);
    // % begins a pattern of Slurm.
    expect(sbatchOptions(task!, here)[2]).toBe(`--output=${join(odd, 'logs/int4.log').replaceAll('%', '%%')}`);
    expect(readFileSync(path, 'utf8').split('\n').slice(1, -3).every((line) => line.startsWith('#SBATCH --'))).toBe(true); // prettier-ignore
  });

  it.each(['/a"b', '/a\nb', '/a\\b', '/a\u0000b'])('refuses the path %j', (path) => {
    const [task] = tasksOf(job());
    expect(() => sbatchScript(task!, { ...context, workFolder: path })).toThrow('Slurm cannot be given this path');
    expect(() => sbatchScript(task!, { ...context, folder: path })).toThrow('Slurm cannot be given this path');
  });
});

describe('what Slurm says', () => {
  it('is read from squeue', () => {
    const queue = parseQueue(
      '12|N/A|RUNNING|None\n13|0|PENDING|Dependency\n13|2|NODE_FAIL|NodeDown\n\nslurm: odd line\n',
    );
    expect([...queue]).toEqual([
      ['12', { state: 'RUNNING', reason: 'None' }],
      ['13_0', { state: 'PENDING', reason: 'Dependency' }],
      ['13_2', { state: 'NODE_FAIL', reason: 'NodeDown' }],
    ]);
  });

  it('is read from sacct', () => {
    const text = '12|COMPLETED\n13_1|CANCELLED by 0\n13_[2-3]|PENDING\n12.batch|COMPLETED\n';
    expect([...parseAccounts(text)].map(([id, { state }]) => [id, state])).toEqual([['12', 'COMPLETED'], ['13_1', 'CANCELLED']]); // prettier-ignore
  });
});
