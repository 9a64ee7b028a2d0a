import type { ChildProcess } from 'node:child_process';
import { cpSync, existsSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, json, listing, root, v1, workFolder, type Finished } from './support.js';

interface Report {
  readonly ok: boolean;
  readonly error?: { readonly kind: string; readonly exitCode: number };
  readonly retries: number;
  readonly jobs: readonly { name: string; state: string; attempts: number; exitCode: number; signal: string; before: boolean; needs: string[] }[];
} // prettier-ignore

interface Event {
  readonly event: string;
  readonly job: string;
  readonly stage?: string;
  readonly done?: number;
  readonly pid: number;
}

const eventsOf = (work: string): Event[] =>
  (existsSync(join(work, 'events.ndjson')) ? readFileSync(join(work, 'events.ndjson'), 'utf8') : '')
    .split('\n')
    .slice(0, -1)
    .map((line) => JSON.parse(line) as Event);

/** The first event that `wanted` accepts, as soon as it is there. */
async function when(work: string, wanted: (event: Event) => boolean, over: Promise<unknown>): Promise<Event> {
  let ended = false;
  void over.then(() => (ended = true));
  for (;;) {
    const found = eventsOf(work).find(wanted);
    if (found) return found;
    if (ended) throw new Error('the batch ended before');
    await new Promise((next) => setTimeout(next, 20));
  }
}

const states = (finished: Finished) => Object.fromEntries(json<Report>(finished).jobs.map((job) => [job.name, job.state])); // prettier-ignore
const started = (events: readonly Event[]) => events.filter(({ event }) => event === 'job-start').map(({ job }) => job).sort(); // prettier-ignore
const quantize = `command: quantize, input: ${v1}, samples: 8, seq-len: 128, threads: 1, validate: false`;

describe('a batch of twelve jobs', () => {
  const folder = workFolder();
  const work = join(folder, 'jobs.batch');
  const bad = join(folder, 'bad.bin');
  writeFileSync(
    join(folder, 'jobs.yaml'),
    `
defaults: { device: cpu, out: '\${name}' }
matrix:
  models: { moe: ${fixture('moe-6m')}, dense: ${v1}, tiny: ${fixture('arch/llama')} }
  recipes:
    half: { command: convert, dtype: f16 }
    full: { command: convert, dtype: f32 }
jobs:
  - { name: look, command: inspect, input: ${v1} }
  - { name: bad, command: convert, input: ${bad} }
  - { name: after-bad, command: inspect, input: bad }
  - { name: after-that, command: inspect, input: ${v1}, needs: after-bad }
  - { name: judged, command: validate, reference: ${v1}, candidate: dense-half, samples: 1, seq-len: 32, generations: 0, max-layer-error: 1e-9 }
  - { name: killed, ${quantize} }
`,
  );
  const copy = () => {
    cpSync(v1, bad);
    cpSync(v1.replace('.bin', '.config.json'), bad.replace('.bin', '.config.json'));
  };
  const args = ['batch', 'jobs.yaml', '--keep-going', '--parallel', '2'];

  it('survives a bad model, a failed gate and a killed worker', async () => {
    copy();
    truncateSync(bad, 1_000_000);
    const running = cli([...args, '--metrics-file', 'batch.prom', '--reporter', 'junit'], { cwd: folder });
    await when(work, ({ event, job, stage, done }) => event === 'progress' && job === 'killed' && stage === 'quantize' && done! >= 1, running); // prettier-ignore
    const { pid } = eventsOf(work).find(({ event, job }) => event === 'job-start' && job === 'killed')!;
    process.kill(pid, 'SIGKILL');
    const { code, stdout, stderr } = await running;
    expect(code, stderr).toBe(1);
    expect(stderr).toContain('killed: killed by SIGKILL; trying again (1 of 1)');
    expect(stderr).toMatch(/4 of 12 jobs are not done[^]*bad, judged failed/);

    // The retry went on from the block that was durable.
    expect(JSON.parse(readFileSync(join(work, 'results/killed.json'), 'utf8'))).toMatchObject({ ok: true, resumed: true }); // prettier-ignore
    expect(stdout).toContain('<testsuites tests="12" failures="1" errors="1" skipped="2">');
    expect(stdout).toMatch(/name="judged"[^>]*>\s*<failure message="1 of \d+ quality gates failed/);
    expect(stdout).toMatch(/name="bad"[^>]*>\s*<error [^>]*type="exit 1"/);
    expect(stdout).toMatch(/name="after-that"[^>]*>\s*<skipped message="needs after-bad/);
    expect(stdout).toMatch(/name="killed" time="[\d.]+" \/>/);

    const metrics = readFileSync(join(folder, 'batch.prom'), 'utf8');
    for (const line of ['jobs{state="done"} 8', 'jobs{state="failed"} 1', 'jobs{state="gate"} 1', 'jobs{state="skipped"} 2', 'jobs{state="running"} 0', 'retries_total 1', 'gate_failures_total 1', 'job_attempts{name="killed"} 2', 'batch_running 0']) {
      expect(metrics).toContain(`\ndeepseek_convert_${line}\n`);
    } // prettier-ignore
    // Blocks count once, though two workers did them.
    expect(metrics).toContain('\ndeepseek_convert_steps_total{stage="quantize"} 4\n');
    expect(metrics).toMatch(/\ndeepseek_convert_quantization_error_ratio\{name="killed"\} 0\.00\d+\n/);
    for (const line of metrics.trim().split('\n')) {
      expect(line).toMatch(
        /^(# (HELP|TYPE) deepseek_convert_\w+ .+|deepseek_convert_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [\d.e+-]+)$/,
      );
    }
    expect(listing(folder).filter((name) => /\.tmp|\.part|lock/.test(name))).toEqual([]);
  }, 240_000);

  it('run again does only what failed; what stays failed is told in a table', async () => {
    const before = eventsOf(work).length;
    const { code, stdout, stderr } = await cli(args, { cwd: folder });
    expect(code).toBe(1);
    expect(started(eventsOf(work).slice(before))).toEqual(['bad', 'judged']);
    expect(stderr).toContain('8 of 12 jobs are done already.');
    expect(stdout).toMatch(/^job +command +state +time +tries\n/);
    expect(stdout).toMatch(/^killed +quantize +done before +[\d.]+ s +2 +killed$/m);
    expect(stdout).toMatch(/^judged +validate +gate failed +[\d.]+ s +2 +1 of \d+ quality gates failed/m);
    expect(stdout).toMatch(/^after-bad +inspect +skipped +needs bad, which is not done$/m);
    expect(stdout).toMatch(/12 jobs: 8 done, 1 failed, 1 gate failed, 2 skipped; /);
  }, 240_000);

  it('goes on when the model is mended, and does again what has lost its output', async () => {
    copy();
    rmSync(join(folder, 'tiny-half'), { recursive: true });
    const before = eventsOf(work).length;
    const finished = await cli([...args, '--json'], { cwd: folder });
    expect(json<Report>(finished).error).toMatchObject({ kind: 'gate', exitCode: 3 });
    expect(finished.code).toBe(3);
    expect(started(eventsOf(work).slice(before))).toEqual(['after-bad', 'after-that', 'bad', 'judged', 'tiny-half']);
    expect(Object.entries(states(finished)).filter(([, state]) => state !== 'done')).toEqual([['judged', 'gate']]);
  }, 240_000);
});

describe('a batch', () => {
  it('that gets SIGTERM lets its workers finish their block, ends with 75, and goes on', async () => {
    const folder = workFolder();
    const long = quantize.replace('samples: 8', 'samples: 32');
    writeFileSync(join(folder, 'j.yaml'), `jobs:\n  - { name: one, out: one, ${long} }\n  - { name: two, out: two, ${long} }\n`); // prettier-ignore
    const work = join(folder, 'j.batch');
    let child: ChildProcess | undefined;
    const running = cli(['batch', 'j.yaml', '--json'], { cwd: folder, started: (made) => (child = made) });
    const { pid } = await when(work, ({ event }) => event === 'job-start', running);
    await when(work, ({ stage }) => stage === 'quantize', running);
    // Both stand still meanwhile: the job must not be over when the signal comes.
    for (const one of [child!.pid!, pid]) process.kill(one, 'SIGSTOP');
    const second = await cli(['batch', 'j.yaml'], { cwd: folder });
    for (const one of [child!.pid!, pid]) process.kill(one, 'SIGCONT');
    expect(second.code).toBe(1);
    expect(second.stderr).toMatch(/This batch is in use[^]*process \d+ on /);
    child!.kill('SIGTERM');
    const finished = await running;
    expect(finished.code).toBe(75);
    expect(states(finished)).toEqual({ one: 'interrupted', two: 'waiting' });
    expect(listing(folder).some((name) => name.startsWith('one.part/steps/'))).toBe(true);
    const again = await cli(['batch', 'j.yaml', '--json'], { cwd: folder });
    expect([again.code, states(again)]).toEqual([0, { one: 'done', two: 'done' }]);
    const result = (name: string) => JSON.parse(readFileSync(join(work, `results/${name}.json`), 'utf8')) as object;
    expect([result('one'), result('two')]).toMatchObject([{ resumed: true }, { resumed: false }]);
    const bytes = (name: string) => readFileSync(join(folder, name, 'model.safetensors'));
    expect(bytes('one').equals(bytes('two'))).toBe(true);
  }, 240_000);

  it('killed itself, takes an output that was completed meanwhile for what it is', async () => {
    const folder = workFolder();
    const file = join(folder, 'j.yaml');
    writeFileSync(file, `jobs: [{ name: one, command: convert, input: ${v1}, out: one, dtype: f16 }]`);
    expect((await cli(['batch', 'j.yaml'], { cwd: folder })).code).toBe(0);
    const path = join(folder, 'j.batch/state.json');
    const state = readFileSync(path, 'utf8');
    writeFileSync(path, state.replace('"done"', '"running"'));
    const again = await cli(['batch', 'j.yaml', '--json'], { cwd: folder });
    expect(json<Report>(again).jobs[0]).toMatchObject({ state: 'done', before: true });
    // Another recipe is another job: its output is in the way, and is not touched.
    writeFileSync(file, readFileSync(file, 'utf8').replace('f16', 'bf16'));
    const other = await cli(['batch', 'j.yaml'], { cwd: folder });
    expect([other.code, other.stdout]).toEqual([1, expect.stringContaining('The output exists already')]);
  }, 240_000);

  it('stops at the first failure without --keep-going, and serves metrics meanwhile', async () => {
    const folder = workFolder();
    writeFileSync(
      join(folder, 'j.yaml'),
      `jobs:\n  - { name: one, out: one, ${quantize} }\n  - { name: bad, command: inspect, input: none }\n  - { name: last, command: inspect, input: ${v1} }\n`,
    );
    let said = '';
    const running = cli(['batch', 'j.yaml', '--json', '--metrics-port', '0'], {
      cwd: folder,
      started: (child) => child.stderr!.on('data', (text: string) => (said += text)),
    });
    await when(join(folder, 'j.batch'), ({ stage }) => stage === 'quantize', running);
    const url = /Metrics: (http:\/\/127\.0\.0\.1:\d+\/metrics)/.exec(said)![1]!;
    const answer = await fetch(url);
    expect(answer.headers.get('content-type')).toContain('version=0.0.4');
    expect(await answer.text()).toMatch(/deepseek_convert_steps_total\{stage="quantize"\} [1-4]\n/);
    expect((await fetch(url.replace('metrics', ''))).status).toBe(404);
    const finished = await running;
    expect(finished.code).toBe(1);
    expect(states(finished)).toEqual({ one: 'done', bad: 'failed', last: 'waiting' });
  }, 240_000);

  it('--dry-run shows sizes and order, finds what would fail, and writes nothing', async () => {
    const folder = workFolder();
    cpSync(fixture('batch/jobs.yaml'), join(folder, 'jobs.yaml'));
    const yaml = readFileSync(join(folder, 'jobs.yaml'), 'utf8').replaceAll('fixtures/', `${root}/fixtures/`);
    writeFileSync(join(folder, 'jobs.yaml'), yaml);
    const { code, stdout } = await cli(['batch', 'jobs.yaml', '--dry-run', '--json'], { cwd: folder });
    expect(code).toBe(0);
    const { jobs } = JSON.parse(stdout) as { jobs: { name: string; writes: number; note: string }[] };
    expect(jobs.map(({ name }) => name)).toEqual(['dense-look', 'dense-half', 'moe-look', 'moe-half', 'dense-file']);
    expect(jobs[1]!.writes).toBeGreaterThan(12e6);
    expect(jobs[4]!.note).toBe('after dense-half');
    expect(listing(folder)).toEqual(['jobs.yaml']);
    writeFileSync(join(folder, 'jobs.yaml'), yaml.replace('v1.0_checkpoint.bin', 'v1.0_checkpoint.bim'));
    const bad = await cli(['batch', 'jobs.yaml', '--dry-run'], { cwd: folder });
    expect([bad.code, bad.stderr]).toEqual([1, expect.stringMatching(/2 of 5 jobs would fail/)]);
  }, 240_000);
});
