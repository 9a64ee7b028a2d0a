import { mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Job } from '../../../src/base/job.js';
import { FileLock } from '../../../src/base/lock.js';
import { readJobs } from '../../../src/batch/file.js';
import { BatchState } from '../../../src/batch/state.js';
import { Worker } from '../../../src/batch/worker.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import { jobCommands } from '../../../src/commands/batch.js';
import { commands } from '../../../src/commands/index.js';
import { f32, writeTensors } from '../../cli/files.js';

const base = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(base, { recursive: true, force: true }));
const known = await jobCommands(commands);
let [root, outside] = ['', ''];
beforeEach(() => {
  [root, outside] = ['root-', 'outside-'].map((name) => mkdtempSync(join(base, name))) as [string, string];
});
/** Whatever was tried, nothing came there. */
afterEach(() => expect(readdirSync(outside)).toEqual([]));

async function refusal(yaml: string): Promise<string> {
  const path = join(root, 'jobs.yaml');
  writeFileSync(path, yaml);
  const options = { commands: known, environment: {}, outputRoot: root, workFolder: join(root, 'jobs.batch') };
  return readJobs(path, options).then(() => 'accepted', (error: Error & { kind: string }) => `${error.kind}: ${error.message}`); // prettier-ignore
}

describe('a job file of somebody else', () => {
  it('names nothing that objects have of themselves', async () => {
    for (const name of ['constructor', 'toString', '__proto__', 'hasOwnProperty']) {
      expect(await refusal(`jobs: [{ name: a, command: ${name}, input: m }]`)).toMatch(/^usage: Unknown command/);
      expect(await refusal(`jobs: [{ name: a, command: inspect, input: "\${${name}}" }]`)).toMatch(/^usage: \$\{\w+\} has no value/); // prettier-ignore
      expect(await refusal(`jobs: [{ name: a, command: inspect, input: m, kubernetes: { ${name}: x } }]`)).toMatch(/^usage: Unknown key/); // prettier-ignore
    }
    const job = (more: string) => refusal(`jobs: [{ name: a, command: inspect, input: m, ${more} }]`);
    expect(await job('__proto__: { out: /etc/x }')).toMatch(/^usage: /);
    expect(await job('input2: !!js/function "process.exit()"')).toMatch(/^(usage|input): /);
  });

  it('cannot write through links that came along with it', async () => {
    const out = join(root, 'out');
    symlinkSync(outside, `${out}.part`);
    expect(await refusal(`jobs: [{ name: a, command: convert, input: m, out: ${out} }]`)).toMatch(/outside the folder for outputs/); // prettier-ignore
    symlinkSync(join(outside, 'new'), join(root, 'dangling'));
    expect(await refusal(`jobs: [{ name: a, command: convert, input: m, out: ${root}/dangling }]`)).toMatch(/outside the folder for outputs/); // prettier-ignore
    expect(await refusal(`jobs: [{ name: a, command: validate, reference: m, candidate: n, report: ${root}/dangling }]`)).toMatch(/outside the folder for outputs/); // prettier-ignore
    expect(await refusal(`jobs: [{ name: a, command: convert, input: m, out: ${root}/dangling/x }]`)).toMatch(/outside the folder for outputs/); // prettier-ignore
  });

  it('cannot have the batch write through links in its work folder', async () => {
    const work = join(root, 'jobs.batch');
    mkdirSync(work);
    symlinkSync(outside, join(work, 'logs'));
    await expect(BatchState.open(work)).rejects.toThrow(/must have no links in it/);
    rmSync(join(work, 'logs'));
    mkdirSync(join(work, 'logs'));
    symlinkSync(join(outside, 'victim'), join(work, 'logs/a.log'));
    await expect(BatchState.open(work)).rejects.toThrow(/must have no links in it[^]*a\.log/);
    rmSync(join(work, 'logs/a.log'));
    const state = await BatchState.open(work);
    symlinkSync(join(outside, 'victim'), join(work, 'logs/a.log')); // while it runs
    const warnings: string[] = [];
    const worker = new Worker({ program: '-e', argv: ['0'], environment: process.env, logPath: state.logPath('a'), onStep: () => undefined, onUsage: () => undefined, onWarning: (text) => warnings.push(text) }); // prettier-ignore
    await worker.ended;
    await state.close();
    expect(warnings.join()).toMatch(/log cannot be written: ELOOP/);
  });

  it('cannot have a job write through links in its work folder', async () => {
    const out = join(root, 'out');
    mkdirSync(`${out}.part`);
    for (const name of ['state', 'output', 'shards']) {
      symlinkSync(outside, join(`${out}.part`, name));
      await expect(Job.open({ out, fingerprint: {} })).rejects.toThrow(/must have no links in it/);
      rmSync(join(`${out}.part`, name));
    }
  });
});

describe('a model of somebody else', () => {
  it('has no other file of this machine copied into the output', async () => {
    const secret = join(base, 'secret');
    writeFileSync(secret, 'key');
    writeFileSync(join(root, 'config.json'), '{"model_type":"llama"}');
    writeTensors(join(root, 'model.safetensors'), new Map([['a', { dtype: 'F32', shape: [1], data: f32(1) }]]));
    const opened = await openCheckpoint(root);
    expect(opened.companions).toEqual([]);
    await opened.close();
    symlinkSync(secret, join(root, 'NOTICE'));
    await expect(openCheckpoint(root)).rejects.toThrow(/link out of its folder[^]*secret/);
    rmSync(join(root, 'NOTICE'));
    writeFileSync(join(root, 'text'), 'ours');
    symlinkSync('text', join(root, 'NOTICE'));
    const linked = await openCheckpoint(root);
    expect(linked.companions).toEqual([join(root, 'NOTICE')]);
    await linked.close();
  });
});

describe('the lock of an output', () => {
  it('tells owner and age, and can be waited for', async () => {
    const path = join(root, 'lock');
    const first = await FileLock.take(path, 'The output');
    const { since } = JSON.parse(readFileSync(path, 'utf8')) as { since: string };
    writeFileSync(
      path,
      readFileSync(path, 'utf8').replace(since, new Date(Date.parse(since) - 7200_000).toISOString()),
    );
    await expect(FileLock.take(path, 'The output')).rejects.toThrow(new RegExp(`The output is in use[^]*process ${process.pid} on [^]*for 2.0 h`)); // prettier-ignore
    process.env.DEEPSEEK_CONVERT_LOCK_WAIT = '30';
    try {
      let taken = false;
      const second = FileLock.take(path, 'The output').then((lock) => {
        taken = true;
        return lock;
      });
      await delay(300);
      expect(taken).toBe(false);
      await first.release();
      rmSync(path, { force: true }); // its text was changed above
      await (await second).release();
    } finally {
      delete process.env.DEEPSEEK_CONVERT_LOCK_WAIT;
    }
  });
});
