import { spawn } from 'node:child_process';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { hostname, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { ConvertError } from '../../../src/base/errors.js';
import { ioError, readFully, requireSpace, writeFileAtomic } from '../../../src/base/files.js';
import { diffJson, Job } from '../../../src/base/job.js';
import { open } from 'node:fs/promises';

let folder: string;
let out: string;
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'job-'));
  out = join(folder, 'model');
});
afterEach(() => rmSync(folder, { recursive: true }));

const fingerprint = { recipe: { bits: 4, groups: [128, 64] }, tool: '1' };
const start = (more: object = {}): Promise<Job> => Job.open({ out, fingerprint, ...more });

async function refusal(promise: Promise<unknown>): Promise<ConvertError> {
  const error = await promise.then(
    () => undefined,
    (reason: unknown) => reason,
  );
  expect(error).toBeInstanceOf(ConvertError);
  return error as ConvertError;
}

describe('Job', () => {
  it('keeps steps, their data and their order over a restart', async () => {
    const first = await start();
    expect(first.resumed).toBe(false);
    for (let i = 0; i < 12; i++) await first.mark(`block ${i}`, { error: i / 7 });
    await first.close();
    const second = await start();
    expect(second.resumed).toBe(true);
    expect(second.steps()).toEqual(Array.from({ length: 12 }, (_, i) => `block ${i}`));
    expect(second.done('block 3')).toBe(true);
    expect(second.done('block 12')).toBe(false);
    expect(second.data('block 3')).toEqual({ error: 3 / 7 });
    await second.remove();
    expect(existsSync(second.folder)).toBe(false);
  });

  it('keeps steps that are marked at the same time', async () => {
    const first = await start();
    const names = Array.from({ length: 8 }, (_, i) => `block ${i}`);
    await Promise.all(names.map((name, i) => first.mark(name, i)));
    await first.close();
    const second = await start();
    expect(second.steps()).toEqual(names);
    expect(names.map((name) => second.data(name))).toEqual(names.map((_, i) => i));
    await second.close();
  });

  it('refuses another fingerprint and says what differs; --restart begins anew', async () => {
    const first = await start();
    await first.mark('a');
    writeFileSync(first.statePath('x'), 'state');
    await first.close();
    const other = { recipe: { bits: 3, groups: [128, 32] }, tool: '1', seed: 7 };
    const error = await refusal(Job.open({ out, fingerprint: other }));
    expect(error.kind).toBe('input');
    expect(error.message).toContain('recipe.bits: 4 -> 3');
    expect(error.message).toContain('recipe.groups[1]: 64 -> 32');
    expect(error.message).toContain('seed: (none) -> 7');
    expect(error.message).toContain('--restart');
    expect(error.message).not.toContain('tool');
    const again = await Job.open({ out, fingerprint: other, restart: true });
    expect(again.done('a')).toBe(false);
    expect(existsSync(again.statePath('x'))).toBe(false);
    await again.close();
  });

  it('sees differences deep inside long texts', () => {
    const long = 'x'.repeat(500);
    expect(diffJson({ a: `${long}1` }, { a: `${long}2` })).toHaveLength(1);
    expect(diffJson({ b: 1, a: [1, { c: 2 }] }, { a: [1, { c: 2 }], b: 1 })).toEqual([]);
  });

  it('is held by one live process at a time', async () => {
    const first = await start();
    const error = await refusal(start());
    expect(error.kind).toBe('input');
    expect(error.message).toContain(`process ${process.pid} on ${hostname()}`);
    await first.close();
    await (await start()).close();
  });

  it('takes over the lock of a dead process, and only of a dead one', async () => {
    const child = spawn('sleep', ['60']);
    await new Promise((done) => child.once('spawn', done));
    const pid = child.pid!;
    const first = await start();
    const lock = join(first.folder, 'lock');
    const owner = JSON.parse(readFileSync(lock, 'utf8')) as Record<string, unknown>;
    await first.close();
    const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
    const processStart = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];

    writeFileSync(lock, JSON.stringify({ ...owner, pid, processStart }));
    expect((await refusal(start())).message).toContain(`process ${pid}`);
    // The same pid, but it is another process now.
    writeFileSync(lock, JSON.stringify({ ...owner, pid, processStart: '1' }));
    await (await start()).close();

    writeFileSync(lock, JSON.stringify({ ...owner, pid, processStart }));
    child.kill('SIGKILL');
    await new Promise((done) => child.once('exit', done));
    await (await start()).close();
  });

  it("believes another host's lock while it beats", async () => {
    const first = await start();
    const lock = join(first.folder, 'lock');
    const owner = JSON.parse(readFileSync(lock, 'utf8')) as Record<string, unknown>;
    await first.close();
    writeFileSync(lock, JSON.stringify({ ...owner, host: 'elsewhere', pid: 1 }));
    expect((await refusal(start())).message).toContain('process 1 on elsewhere');
    const longAgo = new Date(Date.now() - 6 * 60_000);
    utimesSync(lock, longAgo, longAgo);
    await (await start()).close();
  });

  it('leaves nothing behind when it fails before its first step, and everything after it', async () => {
    const first = await start();
    writeFileSync(first.statePath('x'), 'state');
    await first.fail();
    expect(existsSync(`${out}.part`)).toBe(false);
    const second = await start();
    await second.mark('block 0');
    await second.fail();
    expect((await start()).resumed).toBe(true);
  });

  it('removes what dead processes left of taking the lock, and nothing of live ones', async () => {
    const first = await start();
    const owner = JSON.parse(readFileSync(join(first.folder, 'lock'), 'utf8')) as Record<string, unknown>;
    writeFileSync(join(first.folder, '.lock.77.1'), JSON.stringify({ ...owner, processStart: '1' }));
    writeFileSync(join(first.folder, '.lock.78.1'), '{"pid"');
    const longAgo = new Date(Date.now() - 60_000);
    utimesSync(join(first.folder, '.lock.78.1'), longAgo, longAgo);
    const live = join(first.folder, '.lock.79.1');
    writeFileSync(live, JSON.stringify(owner));
    await first.remove();
    expect(readdirSync(first.folder)).toEqual(['.lock.79.1']);
    rmSync(live);
    await (await start()).remove();
    expect(existsSync(`${out}.part`)).toBe(false);
  });

  it('refuses an existing output before any work, but takes an empty folder', async () => {
    mkdirSync(out);
    await (await start()).remove();
    writeFileSync(join(out, 'notes.txt'), 'mine');
    const error = await refusal(start());
    expect(error.kind).toBe('input');
    expect(error.message).toContain('--overwrite');
    expect(existsSync(`${out}.part`)).toBe(false);
    expect((await refusal(start({ overwrite: true }))).message).toContain('not a model folder');
    writeFileSync(join(out, 'config.json'), '{}');
    await (await start({ overwrite: true })).close();
  });

  it('knows an output that got its name just before the process died', async () => {
    const job = await start();
    mkdirSync(job.outputFolder);
    await job.markFinishing();
    await job.close();
    expect((await start()).finished).toBe(false);
    rmSync(join(job.folder, 'lock'));
    rmSync(job.outputFolder, { recursive: true });
    mkdirSync(out);
    writeFileSync(join(out, 'config.json'), '{}');
    const again = await start();
    expect(again.finished).toBe(true);
    await again.remove();
    expect(existsSync(job.folder)).toBe(false);
  });

  it('leaves nothing in the output that a killed process was writing', async () => {
    const job = await start();
    mkdirSync(join(job.outputFolder, 'gptq'), { recursive: true });
    const files = ['.config.json.4711.tmp', 'gptq/.README.md.12.tmp', 'config.json', '.hidden.tmp'];
    for (const name of files) writeFileSync(join(job.outputFolder, name), 'x');
    await job.markFinishing();
    expect(files.map((name) => existsSync(join(job.outputFolder, name)))).toEqual([false, false, true, true]);
    await job.remove();
  });

  it('starts anew over a work folder whose header never reached the disk', async () => {
    mkdirSync(join(`${out}.part`, 'steps'), { recursive: true });
    writeFileSync(join(`${out}.part`, 'steps', '000000.json'), '{"step":"a","data":null}');
    const job = await start();
    expect(job.done('a')).toBe(false);
    await job.close();
  });
});

describe('files', () => {
  it('replaces a file as a whole', async () => {
    const path = join(folder, 'a');
    writeFileSync(path, 'old');
    await writeFileAtomic(path, 'new');
    expect(readFileSync(path, 'utf8')).toBe('new');
  });

  it('names the byte at which a file ended too early', async () => {
    const path = join(folder, 'short');
    writeFileSync(path, Buffer.alloc(10));
    const handle = await open(path);
    const error = await refusal(readFully(handle.fd, Buffer.alloc(8), 6, path));
    await handle.close();
    expect(error.kind).toBe('input');
    expect(error.message).toContain(`${path}, byte 10`);
  });

  it('tells full disks from bad paths', async () => {
    const fault = (code: string): Error => Object.assign(new Error(code), { code });
    const full = ioError(fault('ENOSPC'), 'write', '/a/b', 1234);
    expect([full.kind, full.exitCode]).toEqual(['resource', 4]);
    expect(full.message).toContain('/a/b, 1.23 kB');
    expect(ioError(fault('EIO'), 'write', '/a/b').kind).toBe('resource');
    expect(ioError(fault('ENOENT'), 'read', '/a/b').kind).toBe('input');
    expect((await refusal(requireSpace(folder, 1e18))).kind).toBe('resource');
  });

  it('reports a full disk as a resource error', async () => {
    const error = await refusal(writeFileAtomic('/dev/full/x', 'y'));
    expect(error.kind).toBe('input'); // not a folder
    const handle = await open('/dev/full', 'w');
    const { writeFully } = await import('../../../src/base/files.js');
    const full = await refusal(writeFully(handle.fd, Buffer.alloc(5000), 0, '/dev/full'));
    await handle.close();
    expect(full.kind).toBe('resource');
    expect(full.message).toContain('the disk is full');
  });
});
