import { existsSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { cli, json, v1, workFolder, type Finished } from '../cli/support.js';
import { hashesOf } from '../support/shards.js';
import { Cluster, installSlurm, until } from './slurm.js';

interface Report {
  readonly jobs: readonly { name: string; state: string; attempts: number; message: string | null }[];
}
interface Record {
  readonly id: string;
  readonly state: string;
  readonly host: string;
  readonly restarts: number;
  readonly exitCode: number | null;
  readonly attempts: number;
}

const folder = workFolder();
const work = join(folder, 'jobs.batch');
const recipe = 'samples: 12, seq-len: 512, threads: 1, device: cpu, validate: false';
writeFileSync(
  join(folder, 'jobs.yaml'),
  `
defaults: { slurm: { partition: gpu, gres: 'gpu:1', cpus: 1, time: 10, memory: 500M, merge: { gres: none } } }
jobs:
  - { name: int4, command: quantize, input: ${v1}, out: int4, shards: 4, ${recipe} }
  - { name: look, command: inspect, input: int4 }
`,
);
writeFileSync(
  join(folder, 'one.yaml'),
  `jobs: [{ name: whole, command: quantize, input: ${v1}, out: whole, independent-blocks: true, slurm: { time: 10 }, ${recipe} }]`,
);

let cluster: Cluster;
let expected: { [name: string]: string };
const batch = (file: string, ...args: string[]): Promise<Finished> =>
  cli(['batch', file, ...args, '--json'], { cwd: folder, env: cluster.environment });
const states = (finished: Finished) => Object.fromEntries(json<Report>(finished).jobs.map(({ name, state }) => [name, state])); // prettier-ignore

function record(stem: string, batchFolder = work): Record | undefined {
  const path = join(batchFolder, 'slurm', `${stem}.record.json`);
  return existsSync(path) ? (JSON.parse(readFileSync(path, 'utf8')) as Record) : undefined;
}
const blocks = (log: string): number => (existsSync(log) ? readFileSync(log, 'utf8').split('"stage":"quantize"').length - 1 : 0); // prettier-ignore
const pending = (id: string) => cluster.run('squeue', '-h', '-r', '-j', id, '-o', '%K %T').split('\n').filter((line) => line.endsWith('PENDING')); // prettier-ignore

beforeAll(async () => {
  installSlurm();
  const out = join(folder, 'unbroken');
  const options = ['--samples=12', '--seq-len=512', '--threads=1', '--device=cpu', '--no-validate'];
  cluster = await Cluster.start();
  const { code, stderr } = await cli(['quantize', v1, '-o', out, '--independent-blocks', ...options]);
  expect(code, stderr).toBe(0);
  expected = hashesOf(out);
});
afterAll(() => cluster?.stop());

describe('Slurm', () => {
  it('quantizes in shards, one of whose nodes dies meanwhile, into the bytes of an unbroken run', async () => {
    const running = batch('jobs.yaml', '--executor', 'slurm', '--wait');
    let ended = false;
    void running.then(() => (ended = true));
    const lost = () => [0, 1, 2, 3].find((i) => {
      const { host, state } = record(`int4+worker-${i}`) ?? {};
      return host === 'n2' && state === 'running' && existsSync(join(folder, `int4.part/shards/${i}.part/lock`));
    }); // prettier-ignore
    await until('a worker on node n2', () => lost() !== undefined || ended, 60);
    const shard = lost()!;
    const { id } = record(`int4+worker-${shard}`)!;
    expect(cluster.killNode('n2')).toBeGreaterThanOrEqual(2);
    await until('the task back in the queue', () => pending(id).some((line) => line.startsWith(`${shard} `)) && record(`int4+worker-${shard}`)!.host === 'n2' && cluster.run('sinfo', '-h', '-n', 'n2', '-o', '%T').startsWith('down'), 60); // prettier-ignore
    expect(ended).toBe(false);
    expect(states(await batch('jobs.yaml', '--status'))).toEqual({ int4: 'running', look: 'waiting' });
    // Slurm lets a task that lost its node wait for two minutes.
    cluster.run('scontrol', 'update', `jobid=${id}_${shard}`, 'StartTime=now');

    const finished = await running;
    expect(finished.code, finished.stderr + cluster.logs()).toBe(0);
    expect(states(finished)).toEqual({ int4: 'done', look: 'done' });
    expect(record(`int4+worker-${shard}`)).toMatchObject({ id, host: 'n1', restarts: 1, attempts: 2, exitCode: 0 });
    expect(hashesOf(join(folder, 'int4'))).toEqual(expected);
    expect(existsSync(join(folder, 'int4.part'))).toBe(false);
    expect(readFileSync(join(work, 'logs', `int4+worker-${shard}.log`), 'utf8').match(/"event":"start"/g)).toHaveLength(2); // prettier-ignore

    cluster.startNode('n2');
    expect(states(await batch('jobs.yaml', '--executor', 'slurm', '--wait'))).toEqual({ int4: 'done', look: 'done' });
    expect(record(`int4+worker-${shard}`)!.attempts).toBe(2);
  });

  it('goes on with a job whose time was up, and with one that was cancelled', async () => {
    const here = join(folder, 'one.batch');
    const log = join(here, 'logs/whole.log');
    expect((await batch('one.yaml', '--executor', 'slurm')).code).toBe(0);
    await until('one block', () => blocks(log) >= 1, 60);
    const { id } = record('whole', here)!;
    // What --signal=B:USR2@120 does two minutes before the limit.
    cluster.run('scancel', '--batch', '--signal=USR2', id);
    await until('the job back in the queue', () => cluster.run('squeue', '-h', '-j', id, '-o', '%T') === 'PENDING');
    expect(record('whole', here)).toMatchObject({ state: 'ended', exitCode: 75, requeued: true });
    const before = blocks(log);
    cluster.run('scontrol', 'update', `jobid=${id}`, 'StartTime=now');
    await until('one more block', () => blocks(log) > before, 60);

    const refused = json<{ error: { message: string } }>(await batch('one.yaml'));
    expect(refused.error.message).toMatch(/Slurm has jobs of this batch.*whole/);
    expect((await batch('one.yaml', '--cancel')).code).toBe(0);
    await until('the end of the job', () => !/RUNNING|COMPLETING|PENDING/.test(cluster.run('squeue', '-h', '-j', id, '-t', 'all', '-o', '%T'))); // prettier-ignore
    const status = await batch('one.yaml', '--status');
    expect([status.code, states(status)]).toEqual([75, { whole: 'interrupted' }]);

    const finished = await batch('one.yaml', '--executor', 'slurm', '--wait');
    expect(finished.code, finished.stderr).toBe(0);
    expect(hashesOf(join(folder, 'whole'))).toEqual(expected);
    expect(blocks(log)).toBe(4);
  });
});
