import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createProgress, type ProgressLog, type ProgressMode } from '../../../src/base/progress.js';

let written: string;
let now: number;
let log: ProgressLog | undefined;
const stream = { write: (text: string) => (written += text) } as unknown as NodeJS.WriteStream;

async function open(mode: ProgressMode, more: { quiet?: boolean; verbose?: boolean } = {}): Promise<ProgressLog> {
  const plain = (text: string) => text;
  const options = { quiet: false, verbose: false, ...more, warnColor: plain, dimColor: plain, clock: () => now };
  return (log = await createProgress({ mode, stream, ...options }));
}
const step = (done: number, total: number, stage = 'quantize') => ({ stage, done, total, detail: 'error 0.01' });
/** Time passes for the clock and for timers alike. */
const wait = (seconds: number) => {
  for (let i = 0; i < seconds; i++) {
    now += 1;
    vi.advanceTimersByTime(1000);
  }
};

beforeEach(() => {
  [written, now] = ['', 0];
  vi.useFakeTimers();
});
afterEach(() => {
  log?.stop();
  vi.useRealTimers();
});

describe('plain progress', () => {
  it('writes one line a step, with its time and what is left', async () => {
    const log = await open('plain');
    for (let done = 1; done <= 4; done++) {
      now += 10;
      log.progress(step(done, 4));
    }
    expect(written.split('\n')).toEqual([
      'quantize 1/4  error 0.01  10.0 s, 30.0 s left',
      'quantize 2/4  error 0.01  10.0 s, 20.0 s left',
      'quantize 3/4  error 0.01  10.0 s, 10.0 s left',
      'quantize 4/4  error 0.01  10.0 s',
      '',
    ]);
  });
  it('measures the first step from the last message, heartbeats aside', async () => {
    const log = await open('plain');
    log.info('begins');
    wait(60);
    log.progress(step(1, 2));
    expect(written).toContain('still working');
    expect(written).toMatch(/quantize 1\/2 {2}error 0\.01 {2}60\.0 s, 60\.0 s left\n$/);
  });
  it('does not count resumed steps as fast ones', async () => {
    const log = await open('plain');
    now += 10;
    log.progress(step(30, 32));
    expect(written).toBe('quantize 30/32  error 0.01  10.0 s, 20.0 s left\n');
  });
  it('writes at most a line a second for thousands of steps, and the last', async () => {
    const log = await open('plain');
    for (let done = 1; done <= 10_000; done++) {
      now += 0.001;
      log.progress(step(done, 10_000));
    }
    const lines = written.trim().split('\n');
    expect(lines.length).toBeGreaterThan(8);
    expect(lines.length).toBeLessThan(14);
    expect(lines.at(-1)).toContain('10000/10000');
  });
  it('says at least every 30 seconds that it lives', async () => {
    const log = await open('plain');
    log.progress(step(1, 4));
    written = '';
    wait(29);
    expect(written).toContain('still working: quantize 1/4');
    written = '';
    wait(30);
    expect(written).toContain('still working');
    log.stop();
    written = '';
    wait(120);
    expect(written).toBe('');
  });
});

describe('other modes', () => {
  it('json writes one object a line', async () => {
    const log = await open('json');
    now = 2.5;
    log.info('hello');
    log.progress({ ...step(1, 2), data: { error: 0.01 } });
    wait(30);
    const events = written.trim().split('\n').map((line) => JSON.parse(line) as Record<string, unknown>); // prettier-ignore
    expect(events[0]).toEqual({ event: 'info', seconds: 2.5, text: 'hello' });
    expect(events[1]).toMatchObject({ event: 'progress', stage: 'quantize', done: 1, total: 2, data: { error: 0.01 } });
    expect(events[2]).toMatchObject({ event: 'heartbeat' });
  });
  it('none shows no progress and keeps messages', async () => {
    const log = await open('none');
    log.progress(step(1, 2));
    wait(60);
    expect(written).toBe('');
    log.info('x');
    expect(written).toBe('x\n');
  });
  it('quiet keeps warnings only', async () => {
    const log = await open('plain', { quiet: true, verbose: true });
    log.debug('d');
    log.info('i');
    log.progress(step(1, 2));
    log.warn('w');
    wait(60);
    expect(written).toBe('warning: w\n');
  });
  it('debug lines need --verbose', async () => {
    (await open('plain')).debug('d');
    expect(written).toBe('');
    (await open('plain', { verbose: true })).debug('d');
    expect(written).toBe('d\n');
  });
});
