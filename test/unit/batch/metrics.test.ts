import { readFileSync } from 'node:fs';
import { describe, expect, it, vi } from 'vitest';
import { Meter } from '../../../src/batch/meter.js';
import { Metrics } from '../../../src/batch/metrics.js';
import type { Outcome, WorkerUsage } from '../../../src/batch/worker.js';

const value = (metrics: Metrics, sample: string): number | undefined => {
  const line = metrics.text().split('\n').find((text) => text.startsWith(`deepseek_convert_${sample} `)); // prettier-ignore
  return line === undefined ? undefined : Number(line.split(' ').at(-1));
};
const usage = (memory: number, read: number, written: number, devices: WorkerUsage['devices'] = []) => ({ memory, read, written, devices }); // prettier-ignore
const outcome = (result?: Outcome['result']): Outcome => ({ exitCode: 0, signal: null, result, message: null, seconds: 1, usage: usage(0, 0, 0) }); // prettier-ignore

describe('metrics of a batch', () => {
  it('count blocks, steps and tokens of workers, one that goes on included', () => {
    const metrics = new Metrics('1');
    const block = (done: number) => ({ stage: 'quantize', done, total: 4, data: { block: `layers.${done - 1}`, tokens: 1000 } }); // prettier-ignore
    const first = new Meter(metrics, 'a');
    first.step({ stage: 'sampling', done: 0, total: 8 });
    first.step({ stage: 'sampling', done: 8, total: 8 });
    [1, 2].forEach((done) => first.step(block(done)));
    const second = new Meter(metrics, 'a');
    [3, 4].forEach((done) => second.step(block(done)));
    second.step({ stage: 'score', done: 1, total: 2, data: { tokens: 700 } });
    expect(value(metrics, 'blocks_total{stage="quantize"}')).toBe(4);
    expect(value(metrics, 'blocks_total{stage="sampling"}')).toBeUndefined();
    expect(value(metrics, 'steps_total{stage="quantize"}')).toBe(4);
    expect(value(metrics, 'steps_total{stage="sampling"}')).toBe(8);
    expect(value(metrics, 'tokens_total{stage="quantize"}')).toBe(1000); // four quarters of the model
    expect(value(metrics, 'tokens_total{stage="score"}')).toBe(700);
  });

  it('count what a killed worker had finished and could not tell any more', () => {
    const metrics = new Metrics('1');
    const block = (done: number) => ({ stage: 'quantize', done, total: 4, data: { block: `layers.${done - 1}`, tokens: 1000 } }); // prettier-ignore
    const first = new Meter(metrics, 'a');
    first.step(block(1));
    const second = new Meter(metrics, 'a', first); // block 2 was durable
    [3, 4].forEach((done) => second.step(block(done)));
    for (const name of ['blocks_total', 'steps_total']) expect(value(metrics, `${name}{stage="quantize"}`)).toBe(4);
    expect(value(metrics, 'tokens_total{stage="quantize"}')).toBe(1000);
    const third = new Meter(metrics, 'a', second); // begins anew, with two rounds: all that is done is counted
    [1, 2, 3, 4, 1].forEach((done) => third.step(block(done)));
    expect(value(metrics, 'blocks_total{stage="quantize"}')).toBe(9);
  });

  it('give all the time of a worker to its stages', () => {
    const clock = vi.spyOn(performance, 'now');
    const metrics = new Metrics('1');
    clock.mockReturnValue(1000);
    const meter = new Meter(metrics, 'a');
    for (const [at, stage, done] of [[3000, 'x', 1], [4000, 'y', 1], [4500, 'y', 2]] as const) {
      clock.mockReturnValue(at);
      meter.step({ stage, done, total: 2 });
    } // prettier-ignore
    clock.mockReturnValue(8500);
    meter.end(outcome());
    clock.mockRestore();
    const seconds = ['x', 'y', 'end'].map((stage) => value(metrics, `stage_seconds_total{stage="${stage}"}`));
    expect(seconds).toEqual([2, 1.5, 4]);
  });

  it('add up bytes over workers, and keep peaks', () => {
    const metrics = new Metrics('1');
    const [a, b] = [new Meter(metrics, 'a'), new Meter(metrics, 'b')];
    a.usage(usage(50, 100, 10));
    b.usage(usage(70, 1000, 0));
    a.usage(usage(90, 150, 30));
    a.usage({ ...usage(80, 150, 30, [{ device: 'cuda:1', memory: 5 }]), read: null }); // the last look found nothing
    new Meter(metrics, 'a').usage(usage(20, 7, 7, [{ device: 'cuda:1', memory: 3 }])); // a second attempt
    expect(value(metrics, 'read_bytes_total')).toBe(1157);
    expect(value(metrics, 'written_bytes_total')).toBe(37);
    expect(value(metrics, 'job_memory_peak_bytes{name="a"}')).toBe(90);
    expect(value(metrics, 'job_memory_peak_bytes{name="b"}')).toBe(70);
    expect(value(metrics, 'job_device_memory_peak_bytes{name="a",device="cuda:1"}')).toBe(5);
  });

  it('tell the error of what was quantized, and nothing where nothing was', () => {
    const metrics = new Metrics('1');
    new Meter(metrics, 'a').end(outcome({ linears: [{ error: 0.02 }, { error: 0.04 }, { error: null }] }));
    new Meter(metrics, 'b').end(outcome({ linears: [] }));
    new Meter(metrics, 'c').end(outcome());
    expect(value(metrics, 'quantization_error_ratio{name="a"}')).toBeCloseTo(0.03);
    expect(metrics.text().match(/quantization_error_ratio\{/g)).toHaveLength(1);
  });

  it('write labels so that no value can end early', () => {
    const metrics = new Metrics('1');
    metrics.set('job_attempts', { name: 'a"} 9\nb\\' }, 1);
    expect(metrics.text()).toContain('\ndeepseek_convert_job_attempts{name="a\\"} 9\\nb\\\\"} 1\n');
  });

  it('are all in the table of docs/batch.md, and rules name no others', () => {
    const read = (name: string) => readFileSync(new URL(`../../../docs/${name}`, import.meta.url), 'utf8');
    const source = readFileSync(new URL('../../../src/batch/metrics.ts', import.meta.url), 'utf8');
    const defined = [...source.matchAll(/#define\(\s*'(\w+)',\s*'(\w+)'/g)].map(([, name, type]) => `${name} ${type}`).sort(); // prettier-ignore
    const rows = read('batch.md').match(/^\| `\w+`.*\| (counter|gauge) \|.*$/gm) ?? [];
    const told = rows.flatMap((row) => {
      const [, names, type] = row.split('|').map((cell) => cell.trim());
      return [...names!.matchAll(/`(\w+)`/g)].map(([, name]) => `${name} ${type}`);
    });
    expect(told.sort()).toEqual(defined);
    const used = read('prometheus/deepseek-convert.rules.yml').match(/deepseek_convert_\w+/g)!;
    const known = defined.map((entry) => `deepseek_convert_${entry.split(' ')[0]}`);
    expect([...new Set(used)].filter((name) => !known.includes(name))).toEqual([]);
  });
});
