import { spawn } from 'node:child_process';
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { bin, root, workFolder } from '../cli/support.js';
import { tinyModel } from './model.js';

const jobs = Number(process.env.SOAK_JOBS ?? 200);
/** By then everything is loaded and every cache is warm. */
const early = Math.round(jobs / 10);
const mostGrowth = 1.05;
/** What V8 compiles, and its young generation, grow with time whatever the program does: they hide what grows with jobs. */
const still = ['--expose-gc', '--jitless', '--semi-space-growth-factor=1', '--max-semi-space-size=1'];
const probe = join(root, 'test/soak/probe.mjs');

interface Left {
  readonly rss: number;
  readonly heap: number;
  readonly files: number;
  readonly threads: number;
}

const linesOf = (path: string): string[] => (existsSync(path) ? readFileSync(path, 'utf8').trim().split('\n') : []);

function expectNoGrowth([before, after]: readonly Left[], [few, many]: readonly [number, number]): void {
  console.log(`after ${few} jobs: ${JSON.stringify(before)}\nafter ${many} jobs: ${JSON.stringify(after)}`);
  for (const key of ['rss', 'heap', 'files', 'threads'] as const) {
    expect(after![key], key).toBeLessThanOrEqual(before![key] * mostGrowth);
  }
}

/** Names below a folder that a finished job has no use for. */
const leftovers = (folder: string): string[] =>
  readdirSync(folder, { recursive: true, encoding: 'utf8' }).filter((name) => /\.tmp$|\.part(\/|$)|lock/.test(name));

describe(`${jobs} jobs in a row`, () => {
  it('leave a batch as small as it was', async () => {
    const folder = workFolder();
    const model = tinyModel(join(folder, 'model'));
    const temporary = join(folder, 'temporary');
    mkdirSync(temporary);
    const kinds = ['command: inspect', 'command: convert, dtype: f16', 'command: quantize, method: rtn, group-size: 32, threads: 1, validate: false, device: cpu']; // prettier-ignore
    // Each waits for the one before: a batch of one chain is the longest that there is.
    const lines = Array.from({ length: jobs }, (_, i) => {
      const out = i % 3 === 0 ? '' : `, out: out-${i}`;
      return `  - { name: j${i}, ${kinds[i % 3]}, input: ${model}${out}${i === 0 ? '' : `, needs: j${i - 1}`} }`;
    });
    writeFileSync(join(folder, 'j.yaml'), `jobs:\n${lines.join('\n')}\n`);
    const found = join(folder, 'found.ndjson');
    const child = spawn(
      process.execPath,
      [...still, '--import', probe, bin, 'batch', 'j.yaml', '--json', '--metrics-port', '0', '--metrics-file', 'batch.prom'],
      { cwd: folder, env: { ...process.env, SOAK_PROBE: found, TMPDIR: temporary }, stdio: ['ignore', 'pipe', 'pipe'] },
    ); // prettier-ignore
    let [stdout, stderr] = ['', ''];
    child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
    child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
    const ended = new Promise<number | null>((done) => child.on('close', done));
    let over = false;
    void ended.then(() => (over = true));
    // The last look is taken while the last job runs.
    for (const wanted of [early, jobs - 1]) {
      const isThere = () => linesOf(join(folder, 'j.batch/events.ndjson')).filter((line) => line.includes('"state":"done"')).length >= wanted; // prettier-ignore
      while (!over && !isThere()) await delay(50);
      const looks = linesOf(found).length;
      if (!over) child.kill('SIGUSR2');
      while (!over && linesOf(found).length === looks) await delay(20);
    }
    expect(await ended, stderr).toBe(0);
    const { jobs: ran } = JSON.parse(stdout) as { jobs: { state: string }[] };
    expect(ran.filter(({ state }) => state === 'done')).toHaveLength(jobs);
    const looks = linesOf(found).map((line) => JSON.parse(line) as Left);
    expect(looks).toHaveLength(2);
    expectNoGrowth(looks, [early, jobs]);
    expect(leftovers(folder)).toEqual([]);
    expect(readdirSync(temporary)).toEqual([]);
  }, 1_500_000);

  // What leaks in a worker shows here.
  it('leave one process as small as it was', async () => {
    const folder = workFolder();
    const model = tinyModel(join(folder, 'model'));
    const temporary = join(folder, 'temporary');
    mkdirSync(temporary);
    const child = spawn(
      process.execPath,
      [...still, join(root, 'test/soak/in-process.mjs'), model, folder, String(jobs), String(early)],
      {
        cwd: folder,
        env: { ...process.env, TMPDIR: temporary, MALLOC_ARENA_MAX: '1' },
        stdio: ['ignore', 'pipe', 'inherit'],
      },
    );
    let stdout = '';
    child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
    expect(await new Promise((done) => child.on('close', done))).toBe(0);
    expectNoGrowth(JSON.parse(stdout) as Left[], [3 * early, 3 * jobs]);
    expect(leftovers(folder)).toEqual([]);
    expect(readdirSync(temporary)).toEqual([]);
  }, 1_500_000);
});
