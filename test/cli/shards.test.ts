import type { ChildProcess } from 'node:child_process';
import { existsSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { hashesOf } from '../support/shards.js';
import { cli, json, listing, v1, workFolder, type Finished } from './support.js';

const folder = workFolder();
const work = ['--samples', '4', '--seq-len', '64', '--device', 'cpu', '--threads', '1'];
const run = (...args: readonly string[]) => cli([...args, '--progress', 'plain'], { cwd: folder });

interface Plan {
  readonly workFolder: string;
  readonly workers: readonly { readonly shard: number; readonly blocks: readonly number[]; readonly done: boolean; readonly argv: readonly string[] }[];
  readonly merge: { readonly argv: readonly string[] };
} // prettier-ignore

/** Sends a signal once the first block of the shard is done. Where the shard was complete before it came, once more. */
async function stopped(argv: readonly string[], signal: NodeJS.Signals, shard: string): Promise<Finished> {
  for (let left = 9; ; left--) {
    const finished = await cli([...argv, '--progress', 'plain'], {
      started: (child) => {
        let seen = '';
        child.stderr!.on('data', (text: string) => {
          seen += text;
          if (/quantize 1\/2/.test(seen) && !child.killed) child.kill(signal); // a second one would stop it at once
        });
      },
    });
    if (finished.code !== 0 || left === 0) return finished;
    rmSync(shard, { recursive: true });
  }
}

/** The command twice: the second one starts and ends while the first one stands still with the lock in its hands. */
async function twins(argv: readonly string[], lock: string): Promise<[Finished, Finished]> {
  let child: ChildProcess | undefined;
  const first = cli(argv, { cwd: folder, started: (process) => (child = process) });
  const holds = () => existsSync(lock) && readFileSync(lock, 'utf8').includes(`"pid": ${child!.pid},`);
  while (!holds() && child!.exitCode === null) await delay(2);
  child!.kill('SIGSTOP');
  const second = await cli(argv, { cwd: folder });
  child!.kill('SIGCONT');
  return [await first, second];
}

describe('plan, worker, merge', () => {
  it('give the bytes of one process, through a kill -9, a SIGTERM and a twin', async () => {
    const whole = await run('quantize', v1, '-o', 'whole', '--independent-blocks', '--validate-samples', '1', ...work);
    expect(whole.code, whole.stderr).toBe(0);
    const planned = await run('plan', v1, '-o', 'sharded', '--shards', '2', '--validate-samples', '1', ...work, '--json'); // prettier-ignore
    expect(planned.code, planned.stderr).toBe(0);
    const plan = json<Plan>(planned);
    expect(plan.workFolder).toBe(join(folder, 'sharded.part'));
    expect(plan.workers.map(({ shard, blocks, done }) => [shard, blocks, done])).toEqual([[0, [0, 1], false], [1, [2, 3], false]]); // prettier-ignore
    expect(plan.merge.argv).toEqual(['merge', plan.workFolder, '--validate-samples=1']);

    // The last digits of errors and of what validation measures depend on the number of threads.
    const [first, second] = plan.workers.map(({ argv }) => [...argv, '--threads', '1']);
    const shards = join(plan.workFolder, 'shards');
    expect((await stopped(first!, 'SIGKILL', join(shards, '0'))).signal).toBe('SIGKILL');
    const term = await stopped(second!, 'SIGTERM', join(shards, '1'));
    expect([term.code, term.stderr]).toEqual([75, expect.stringContaining('Go on with: deepseek-convert worker')]);
    expect(existsSync(join(plan.workFolder, 'shards/1.part/lock'))).toBe(false);
    const early = await run(...plan.merge.argv);
    expect(early.code).toBe(1);
    expect(early.stderr).toMatch(/2 of 2 shards are missing[^]*worker .*sharded\.part --shard 1\/2/);

    const [one, twin] = await twins(
      [...second!, '--progress', 'plain', '--json'],
      join(plan.workFolder, 'shards/1.part/lock'),
    );
    expect(twin.code).toBe(1);
    expect(twin.stdout).toMatch(/Shard 1 of 2 is in use[^]*process \d+ on /);
    expect(one.code, one.stderr).toBe(0);
    expect(json(await run(...first!, '--json'))).toMatchObject({ resumed: true, before: false });
    expect(json(await run(...first!, '--json'))).toMatchObject({ resumed: true, before: true });
    const again = json<Plan>(await run('plan', v1, '-o', 'sharded', '--shards', '2', ...work, '--json'));
    expect(again.workers.map(({ done }) => done)).toEqual([true, true]);

    const merged = await run(...plan.merge.argv, '--threads', '1', '--json');
    expect(merged.code, merged.stderr).toBe(0);
    expect(json(merged)).toMatchObject({ ok: true, verified: 28, validation: { passed: true } });
    expect(hashesOf(join(folder, 'sharded'))).toEqual(hashesOf(join(folder, 'whole')));
    expect(existsSync(plan.workFolder)).toBe(false);
  }, 240_000);

  it('reads a plan file as it reads a command line', async () => {
    expect((await run('plan', v1, '-o', 'read', '--shards', '2', ...work)).code).toBe(0);
    const path = join(folder, 'read.part/shards/plan.json');
    const plan = JSON.parse(readFileSync(path, 'utf8')) as {
      sha256: string;
      content: { options: Record<string, unknown> };
    };
    const { createHash } = await import('node:crypto');
    const reseal = (options: Record<string, unknown>) => {
      const content = { ...plan.content, options: { ...plan.content.options, ...options } };
      const sha256 = createHash('sha256').update(JSON.stringify(content)).digest('hex');
      writeFileSync(path, JSON.stringify({ ...plan, sha256, content }));
    };
    const worker = async () => (await run('worker', 'read.part', '--shard', '0/2')).stderr;
    reseal({ bits: 5 });
    expect(await worker()).toMatch(/Invalid value for bits in .*plan\.json: expected 2, 3, 4 or 8, got "5"/);
    reseal({ out: '/tmp/elsewhere' });
    expect(await worker()).toMatch(/no option "out"/);
    reseal({ 'group-size': 64 });
    expect(await worker()).toMatch(/recipe\.groupSize: 128 -> 64/);
    expect((await run('worker', 'read.part', '--shard', '2/2')).stderr).toContain('expected 0/n');
    expect(listing(join(folder, 'read.part/shards'))).toEqual(['plan.json', 'tokens.bin']);
  }, 120_000);
});

describe('a batch', () => {
  it('runs a job in shards as one, side by side, and does again what was killed', async () => {
    const common = `device: cpu, samples: 4, seq-len: 64, validate: false`;
    writeFileSync(join(folder, 'jobs.yaml'), `
jobs:
  - { name: sharded, command: quantize, input: ${v1}, out: batched, shards: 3, ${common} }
  - { name: after, command: inspect, input: batched }
`); // prettier-ignore
    let killed = 0;
    const events = () => {
      const path = join(folder, 'jobs.batch/events.ndjson');
      const lines = existsSync(path) ? readFileSync(path, 'utf8').split('\n').slice(0, -1) : [];
      return lines.map((line) => JSON.parse(line) as { event: string; job: string; pid: number; argv: string[] });
    };
    const watch = setInterval(() => {
      const worker = events().find(({ event, argv }) => event === 'job-start' && argv[0] === 'worker');
      if (!worker || killed > 0) return;
      process.kill((killed = worker.pid), 'SIGKILL');
    }, 20);
    const batch = await run('batch', 'jobs.yaml', '--parallel', '2', '--json');
    clearInterval(watch);
    expect(batch.code, batch.stdout).toBe(0);
    expect(killed).toBeGreaterThan(0);
    const { jobs, retries } = json<{ jobs: { name: string; state: string; attempts: number }[]; retries: number }>(
      batch,
    );
    expect(jobs.map(({ name, state, attempts }) => [name, state, attempts])).toEqual([['sharded', 'done', 2], ['after', 'done', 1]]); // prettier-ignore
    expect(retries).toBe(1);
    const steps = events().flatMap(({ event, job, argv }) =>
      event === 'job-start' && job === 'sharded' ? [argv] : [],
    );
    expect(steps.map(([step]) => step).filter((step) => step !== 'worker')).toEqual(['plan', 'plan', 'merge']);
    expect(new Set(steps.flatMap((argv) => argv.filter((_, i) => argv[i - 1] === '--shard')))).toEqual(new Set(['0/3', '1/3', '2/3'])); // prettier-ignore
    expect(steps.every((argv) => argv.includes('--device=cpu'))).toBe(true);
    // The second of the two places had a worker while the first one's was under way.
    const order = events().filter(({ event, argv, pid }) => ['job-start', 'job-end'].includes(event) && (argv?.[0] === 'worker' || pid === undefined)).map(({ event }) => event); // prettier-ignore
    expect(order.join()).toContain('job-start,job-start');
    const alone = await run('quantize', v1, '-o', 'alone', '--independent-blocks', '--no-validate', ...work);
    expect(alone.code, alone.stderr).toBe(0);
    expect(hashesOf(join(folder, 'batched'))).toEqual(hashesOf(join(folder, 'alone')));
    // As if the batch had been killed in between.
    const state = join(folder, 'jobs.batch/state.json');
    writeFileSync(state, readFileSync(state, 'utf8').replaceAll('"done"', '"running"'));
    const again = await run('batch', 'jobs.yaml');
    expect(again.stderr).toContain('1 of 2 jobs are done already.');
    expect(again.stdout).toMatch(/^sharded +quantize +done before/m);

    const refused = async (line: string) => {
      writeFileSync(join(folder, 'bad.yaml'), `jobs: [{ name: a, input: ${v1}, out: a, ${line} }]`);
      return (await run('batch', 'bad.yaml', '--dry-run')).stderr;
    };
    expect(await refused('command: quantize, shards: 0')).toMatch(/Invalid value for shards .*whole number from 1/);
    expect(await refused('command: convert, shards: 2')).toContain('convert cannot be done in shards');
  }, 240_000);
});
