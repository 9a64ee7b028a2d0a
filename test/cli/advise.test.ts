import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { cli, fixture, json, root, workFolder } from './support.js';

const folder = workFolder();
interface Scheme {
  scheme: string;
  weights: number;
  weightsOfAll: number;
  cache: number;
  total: number;
  usable: number;
  fits: boolean;
  mostSequences: number;
  stepSeconds: number;
  tokensPerSecond: number;
}
interface Advised {
  schemes: Scheme[];
  chosen: string | null;
  gpusNeeded: number | null;
  next: string[];
  usdPerMillionTokens: number | null;
  gpu: { memoryGB: number; bandwidthGBs: number };
  gpus: { gpu: string; chosen: Scheme | null }[];
}
const config = (name: string) => fixture(`advise/${name}.config.json`);
const advised = async (...args: string[]) => {
  const done = await cli(['advise', ...args, '--json']);
  expect(done.code, done.stderr).toBe(0);
  return json<Advised>(done);
};
const near = (value: number, expected: number, share = 0.02) =>
  expect(Math.abs(value / expected - 1), `${value} against ${expected}`).toBeLessThan(share);

describe('advise', () => {
  // Figures of docs/advise.md, computed by hand there, in GB.
  it.each([
    ['llama-3-8b', { bf16: 16.06, 'int4 g128': 5.7 }, 8192, 1.07],
    ['deepseek-v2-lite', { bf16: 31.41, 'int4 g128': 8.73 }, 32768, 1.02],
    ['deepseek-v3', { bf16: 1342, 'fp8, stored': 673, 'int4 g128': 349 }, 32768, 2.3],
  ])('%s: memory as in the worksheet', async (name, weights, context, cache) => {
    const { schemes } = await advised(config(name), '--gpu', 'h200', '--context', String(context));
    for (const [scheme, gigabytes] of Object.entries(weights)) {
      const found = schemes.find((one) => one.scheme === scheme)!;
      near(found.weightsOfAll, gigabytes * 1e9);
      near(found.cache, cache * 1e9);
      expect(found.fits).toBe(found.total <= 141e9 * 0.9);
    }
  });
  it('quality takes the most bits that fit, latency and memory the fewest; the data sheet gives the speed', async () => {
    const lite = (goal: string) => advised(config('deepseek-v2-lite'), '--gpu', 'l4', '--context', '32768', '--goal', goal); // prettier-ignore
    const [quality, latency, memory] = await Promise.all([lite('quality'), lite('latency'), lite('memory')]);
    expect(quality.schemes.map(({ fits }) => fits)).toEqual([false, true, true, true]);
    expect([quality.chosen, latency.chosen, memory.chosen]).toEqual(['int8 g128', 'int4 g128', 'int4 g128']);
    const { stepSeconds, cache } = latency.schemes[3]!;
    // Hand: always-read 13.76 M x 27 + dense + shared, experts x 6/64, in 4.125 bits; head and routers in bf16.
    const linears = 27 * 13_762_560 + 3 * 2048 * 11008 + 449_839_104 + (14_394_851_328 * 6) / 64;
    const read = linears * 0.515625 + 2 * (102_400 * 2048 + 26 * 64 * 2048);
    near(stepSeconds, (read + cache) / (300e9 * 0.7), 0.005);
    expect(latency.next[0]).toBe('deepseek-convert quantize MODEL -o MODEL-int4-g128');
    expect(quality.next[0]).toContain('--bits 8');
  });
  it('says how many GPUs would do where one does not, and divides what can be divided', async () => {
    const one = await advised(config('deepseek-v3'), '--gpu', 'h100-80g', '--context', '32768');
    expect(one).toMatchObject({ chosen: null, gpusNeeded: 8 });
    const eight = await advised(config('deepseek-v3'), '--gpu', 'h100-80g', '--gpus', '8', '--context', '32768', '--price', '2'); // prettier-ignore
    expect(eight.chosen).toBe('int4 g32');
    expect(eight.next.at(-1)).toContain('--tensor-parallel-size 8');
    const [before, after] = [one, eight].map(({ schemes }) => schemes.find(({ scheme }) => scheme === 'int4 g32')!);
    expect(after!.weights).toBe(before!.weights / 8);
    expect(after!.cache).toBe(before!.cache);
    near(eight.usdPerMillionTokens!, (8 * 2 * 1e6) / (3600 * after!.tokensPerSecond), 1e-6);
  });
  it('shows formulas on request only', async () => {
    const plain = await cli(['advise', config('llama-3-8b'), '--gpu', 'a100-40g']);
    const explained = await cli(['advise', config('llama-3-8b'), '--gpu', 'a100-40g', '--explain']);
    expect(plain.stdout).not.toContain('4/8 B a weight');
    expect(explained.stdout).toContain('32 layers x 2 x 8 heads x 128');
    expect(explained.stdout).toContain('40 GB x 0.9 = 36.0 GB');
    const rows = plain.stdout.split('\n').slice(0, 8);
    expect(Math.max(...rows.slice(2).map((row) => row.length))).toBeLessThanOrEqual(80);
  });
  it('every command that it names can be run as it stands', async () => {
    // A bf16 model with weights: at its own precision there is nothing to make.
    const { chosen, next } = await advised(fixture('moe-6m'), '--gpu', 'l4');
    expect([chosen, next]).toEqual(['bf16', [`vllm serve ${fixture('moe-6m')}`]]);
    const small = await advised(fixture('moe-6m'), '--gpu', 'l4', '--goal', 'memory');
    const words = small.next[0]!.split(' ').slice(1);
    expect(words[0]).toBe('quantize');
    const dry = await cli([...words, '--dry-run', '--device', 'cpu']);
    expect(dry.code, dry.stderr).toBe(0);
  });
  it('takes GPUs and prices of a file, and refuses what such a file cannot mean', async () => {
    const own = join(folder, 'own.yaml');
    writeFileSync(own, 'gpus:\n  mine: { memoryGB: 10, bandwidthGBs: 500, bf16Tflops: 50, usdPerHour: 1, source: me }\n'); // prettier-ignore
    const found = await advised(config('llama-3-8b'), '--gpu', 'mine', '--hardware', own, '--context', '4096');
    expect(found.gpu).toMatchObject({ memoryGB: 10, bandwidthGBs: 500 });
    expect(found.chosen).toBe('int4 g32');
    expect(found.usdPerMillionTokens).toBeGreaterThan(0);
    writeFileSync(own, 'gpus:\n  mine: { memoryGB: -1, bandwidthGBs: 500, bf16Tflops: 50, source: me }\n');
    const refused = await cli(['advise', config('llama-3-8b'), '--gpu', 'mine', '--hardware', own]);
    expect(refused.code).toBe(1);
    expect(refused.stderr).toContain('gpus.mine.memoryGB');
  });
  it('without --gpu: every GPU of the file, each with what fits', async () => {
    const { gpus } = await advised(config('llama-3-8b'), '--context', '8192');
    const file = JSON.parse(readFileSync(join(root, 'data/hardware.json'), 'utf8')) as { gpus: object };
    expect(gpus.map(({ gpu }) => gpu)).toEqual(Object.keys(file.gpus));
    expect(gpus.every(({ chosen }) => chosen?.fits)).toBe(true);
  });
  it.each([
    [['--gpu', 'h100'], 2, 'Did you mean h100'],
    [['--gpu', 'l4', '--context', '9000'], 2, 'at most 8192'],
    [['--explain'], 2, '--explain needs --gpu'],
  ])('refuses %j', async (args, code, words) => {
    const done = await cli(['advise', config('llama-3-8b'), ...args]);
    expect([done.code, done.stderr]).toEqual([code, expect.stringContaining(words)]);
  });
  it('takes a quantized model as it is', async () => {
    const made = join(folder, 'int4');
    mkdirSync(made);
    const plain = JSON.parse(readFileSync(config('llama-3-8b'), 'utf8')) as object;
    const quantization_config = { quant_method: 'gptq', bits: 4, group_size: 64 };
    writeFileSync(join(made, 'config.json'), JSON.stringify({ ...plain, quantization_config }));
    const { schemes, chosen } = await advised(made, '--gpu', 'l4');
    expect([schemes.length, chosen]).toEqual([1, 'int4 g64, stored']);
    near(schemes[0]!.weights, 6_979_321_856 * (0.5 + 2 / 64) + 2 * 1_050_939_392, 0.001);
  });
});
