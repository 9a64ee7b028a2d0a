import { chmodSync, existsSync, mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeEach, describe, expect, it } from 'vitest';
import { FileLock } from '../../../src/base/lock.js';
import { readKubernetes } from '../../../src/batch/kubernetes-options.js';
import { readSlurm } from '../../../src/batch/slurm-options.js';
import { runTask, readTaskRecord } from '../../../src/batch/slurm-task.js';
import type { TaskSpec } from '../../../src/batch/slurm-script.js';

const all = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(all, { recursive: true, force: true }));

/** Stands in for our own program: what it does is its first argument. */
const program = join(all, 'program.mjs');
writeFileSync(
  program,
  `
import { appendFileSync, existsSync, mkdirSync, readFileSync } from 'node:fs';
const [what, out] = process.argv.slice(2);
const calls = out + '.calls';
const n = existsSync(calls) ? readFileSync(calls, 'utf8').length : 0;
appendFileSync(calls, 'x');
const step = () => console.error(JSON.stringify({ event: 'progress', seconds: 1, stage: 'quantize', done: 1, total: 2 }));
const say = (data) => console.log(JSON.stringify(data));
if (what === 'make') { mkdirSync(out); step(); say({ ok: true }); }
if (what === 'crash-once') { if (n === 0) process.kill(process.pid, 'SIGKILL'); else { mkdirSync(out); say({ ok: true }); } }
if (what === 'bad') { say({ ok: false, error: { message: 'bad model' } }); process.exitCode = 1; }
if (what === 'gate') { say({ ok: false, error: { message: '1 gate failed' } }); process.exitCode = 3; }
if (what === 'long' || what === 'stuck') {
  if (what === 'long') step();
  process.on('SIGTERM', () => process.exit(75));
  setInterval(() => {}, 1000);
  console.error(JSON.stringify({ event: 'ready', pid: process.pid }));
}
`,
);

const bin = join(all, 'bin');
mkdirSync(bin);
writeFileSync(join(bin, 'scontrol'), `#!/bin/sh\necho "$@" >> ${all}/scontrol\n`);
chmodSync(join(bin, 'scontrol'), 0o755);
const requeued = () => (existsSync(join(all, 'scontrol')) ? readFileSync(join(all, 'scontrol'), 'utf8').trim() : '');

let folder: string;
let out: string;
let count = 0;
beforeEach(() => {
  folder = join(all, `work${count++}`);
  out = join(folder, 'out');
  for (const name of ['slurm', 'logs', 'results']) mkdirSync(join(folder, name), { recursive: true });
  rmSync(join(all, 'scontrol'), { force: true });
});

function start(what: string, id = '7', extra: NodeJS.ProcessEnv = {}) {
  const path = join(folder, 'slurm/a.json');
  const job = { name: 'a', command: 'convert', needs: [], retries: undefined, given: [], values: {}, writes: [out], out, reads: [], shards: undefined, slurm: readSlurm([]), kubernetes: readKubernetes([]) }; // prettier-ignore
  const spec: TaskSpec = { version: 1, stage: null, program, workFolder: folder, retries: 1, job, argv: [what, out] };
  writeFileSync(path, JSON.stringify(spec));
  const [gone, timeUp] = [new AbortController(), new AbortController()];
  const environment = { PATH: `${bin}:${process.env.PATH}`, SLURM_JOB_ID: id, ...extra };
  const code = runTask(path, environment, { gone: gone.signal, timeUp: timeUp.signal }, 50);
  return { code, gone, timeUp };
}
const record = () => readTaskRecord(folder, 'a');
const calls = () => (existsSync(`${out}.calls`) ? readFileSync(`${out}.calls`, 'utf8').length : 0);
/** Waits for the worker, and gives its pid. */
async function ready(): Promise<number> {
  const log = join(folder, 'logs/a.log');
  for (;;) {
    const pid = existsSync(log) ? /"ready","pid":(\d+)/.exec(readFileSync(log, 'utf8'))?.[1] : undefined;
    if (pid !== undefined) return Number(pid);
    await delay(20);
  }
}

describe('a task on a node', () => {
  it('keeps result and record, and does nothing a second time', async () => {
    expect(await start('make').code).toBe(0);
    expect(await record()).toMatchObject({ id: '7', state: 'ended', exitCode: 0, attempts: 1, isNew: true });
    expect(JSON.parse(readFileSync(join(folder, 'results/a.json'), 'utf8'))).toEqual({ ok: true });
    expect(await start('make', '8').code).toBe(0);
    expect(calls()).toBe(1);
    expect(await record()).toMatchObject({ id: '8', exitCode: 0 });
  });

  it('knows an output that an attempt made whose end nobody saw', async () => {
    expect(await start('make').code).toBe(0);
    const seen = { ...(await record()), state: 'running', exitCode: null };
    writeFileSync(join(folder, 'slurm/a.record.json'), JSON.stringify(seen));
    expect(await start('make', '7', { SLURM_RESTART_COUNT: '1' }).code).toBe(0);
    expect(calls()).toBe(1);
    // An output that was there before the first attempt is not its own.
    writeFileSync(join(folder, 'slurm/a.record.json'), JSON.stringify({ ...seen, isNew: false }));
    await start('bad').code;
    expect(calls()).toBe(2);
  });

  it('starts a crashed worker again, and no other', async () => {
    expect(await start('crash-once').code).toBe(0);
    expect(await record()).toMatchObject({ exitCode: 0, attempts: 2 });
    rmSync(out, { recursive: true });
    expect(await start('bad').code).toBe(1);
    expect(await record()).toMatchObject({ exitCode: 1, message: 'bad model', state: 'ended' });
    expect(await start('gate').code).toBe(3);
    expect(calls()).toBe(4);
  });

  it('puts itself back into the queue when its time is up', async () => {
    const { code, timeUp } = start('long');
    await ready();
    timeUp.abort();
    expect(await code).toBe(75);
    expect(await record()).toMatchObject({ state: 'ended', exitCode: 75, requeued: true });
    expect(requeued()).toBe('requeue 7');
  });

  it('does not go round and round where the time is too short for anything', async () => {
    const { code, timeUp } = start('stuck');
    await ready();
    timeUp.abort();
    expect(await code).toBe(4);
    expect((await record())!.message).toMatch(/time limit is too short/);
    expect(requeued()).toBe('');
  });

  it('leaves the queue to Slurm when Slurm ends it', async () => {
    const { code, gone } = start('long');
    const worker = await ready();
    gone.abort();
    process.kill(worker, 'SIGTERM'); // as Slurm does to all processes of a job
    expect(await code).toBe(75);
    expect(await record()).toMatchObject({ exitCode: 75, requeued: false });
    expect(requeued()).toBe('');
  });

  it('waits until no other attempt, and no worker of one, is alive', async () => {
    const lock = await FileLock.take(join(folder, 'slurm/a.lock'), 'The task');
    const { code } = start('make');
    await delay(300);
    expect(await record()).toBeUndefined();
    mkdirSync(`${out}.part`);
    const left = await FileLock.take(join(`${out}.part`, 'lock'), 'The work folder');
    await lock.release();
    await delay(300);
    expect(await record()).toBeUndefined();
    await left.release();
    expect(await code).toBe(0);
    expect(calls()).toBe(1);
  });

  it('stops at once, and writes no more, when another attempt has its lock', async () => {
    const { code } = start('long');
    await ready();
    const before = await record();
    rmSync(join(folder, 'slurm/a.lock'));
    const other = await FileLock.take(join(folder, 'slurm/a.lock'), 'The task');
    expect(await code).toBe(75);
    expect(await record()).toEqual(before);
    expect(await other.isLost()).toBe(false);
    await other.release();
  });

  it('gives a worker the CPUs of the allocation', async () => {
    const path = join(folder, 'slurm/a.json');
    const { code } = start('make', '7', { SLURM_CPUS_PER_TASK: '3' });
    expect(await code).toBe(0);
    const argvOf = () => readFileSync(join(folder, 'logs/a.log'), 'utf8').split('\n').filter((line) => line.includes('"event":"start"')).map((line) => (JSON.parse(line) as { argv: string[] }).argv).at(-1); // prettier-ignore
    expect(argvOf()).toEqual(['make', out]);
    const spec = JSON.parse(readFileSync(path, 'utf8')) as TaskSpec;
    rmSync(out, { recursive: true });
    writeFileSync(path, JSON.stringify({ ...spec, job: { ...spec.job, values: { device: 'auto' } } }));
    const signal = new AbortController().signal;
    await runTask(path, { PATH: bin, SLURM_JOB_ID: '9', SLURM_CPUS_PER_TASK: '3' }, { gone: signal, timeUp: signal });
    expect(argvOf()).toEqual(['make', out, '--threads=3']);
  });
});
