import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { buildModel } from '../../../src/arch/registry.js';
import type { Model } from '../../../src/arch/types.js';
import { activationBytes, bytesRead, cacheBytes, footprint } from '../../../src/quant/footprint.js';

const folder = join(import.meta.dirname, '../../../fixtures/advise');
const read = (name: string) => JSON.parse(readFileSync(join(folder, name), 'utf8')) as unknown;
interface Counted {
  parameters: number;
  blocks: number;
  experts: number;
  other: number;
  cachedValuesPerToken: number;
}
const { models } = read('expected.json') as { models: Record<string, Counted> };
const model = (name: string): Model => buildModel(read(`${name}.config.json`) as Record<string, unknown>, `${name}.config.json`); // prettier-ignore
const within = (value: number, expected: number, share: number) =>
  expect(Math.abs(value / expected - 1), `${value} against ${expected}`).toBeLessThan(share);

describe.each(Object.entries(models))('%s', (name, counted) => {
  const m = model(name);
  it('bf16: two bytes for each of the parameters that transformers counts', () => {
    // Selection biases of routers are held in fp32: 2 bytes more for each, some thousands of them.
    const { weights } = footprint(m, { kind: 'plain' });
    expect(weights).toBeGreaterThanOrEqual(2 * counted.parameters);
    within(weights, 2 * counted.parameters, 1e-6);
  });
  it.each([
    [4, 128],
    [4, 32],
    [8, 128],
  ])('int%d g%d: codes and a bf16 scale a group for the linears, two bytes for the rest', (bits, group) => {
    const { weights, experts } = footprint(m, { kind: 'grid', bits, group });
    const perWeight = bits / 8 + 2 / group;
    within(weights, (counted.blocks + counted.experts) * perWeight + 2 * counted.other, 0.005);
    if (counted.experts > 0) within(experts, counted.experts * perWeight, 0.005);
    else expect(experts).toBe(0);
  });
  it('caches what transformers would', () => {
    expect(cacheBytes(m, 1000)).toBe(2 * 1000 * counted.cachedValuesPerToken);
  });
});

// docs/advise.md has the same arithmetic with its reasons.
describe('by hand', () => {
  it('Llama-3-8B', () => {
    const attention = 4096 * 4096 * 2 + 4096 * 1024 * 2;
    const block = attention + 3 * 4096 * 14336 + 2 * 4096;
    const all = 32 * block + 2 * 128256 * 4096 + 4096;
    const m = model('llama-3-8b');
    expect(footprint(m, { kind: 'plain' }).weights).toBe(2 * all);
    expect(footprint(m, { kind: 'plain' }).always).toBe(2 * (all - 128256 * 4096));
    expect(cacheBytes(m, 8192)).toBe(32 * 2 * 8 * 128 * 8192 * 2);
    // Eight heads of keys and values go to eight devices, not to sixteen.
    expect(cacheBytes(m, 8192, 8)).toBe(cacheBytes(m, 8192) / 8);
    expect(cacheBytes(m, 8192, 16)).toBe(cacheBytes(m, 8192) / 8);
    // gate, up and down of 2048 tokens; the state twice; the logits of one token
    expect(activationBytes(m, 2048)).toBe(2 * 2048 * (2 * 4096 + 2 * 14336 + 4096) + 4 * 128256);
  });
  it('DeepSeek-V2-Lite: 64 experts of 1408, 6 active, in 26 of 27 layers; latents of 512 + 64', () => {
    const m = model('deepseek-v2-lite');
    const plain = footprint(m, { kind: 'plain' });
    expect(plain.experts).toBe(2 * 26 * 64 * 3 * 2048 * 1408);
    expect(plain.activeShare).toBe(6 / 64);
    expect(bytesRead(plain, 1)).toBeCloseTo(plain.always + (plain.experts * 6) / 64, 0);
    expect(bytesRead(plain, 1000) / (plain.always + plain.experts)).toBeCloseTo(1, 6);
    expect(cacheBytes(m, 32768)).toBe(27 * 576 * 32768 * 2);
    // A latent serves all heads, so each device has it.
    expect(cacheBytes(m, 32768, 8)).toBe(cacheBytes(m, 32768));
    // 10944 inner channels are padded to 11008 for groups of 128.
    const int4 = footprint(m, { kind: 'grid', bits: 4, group: 128 });
    const dense = 3 * 2048 * 11008 * (0.5 + 2 / 128);
    const shared = 26 * 3 * 2048 * 2816 * (0.5 + 2 / 128);
    const attention = 27 * (2048 * 16 * 192 + 2048 * 576 + 512 * 16 * 256 + 2048 * 2048) * (0.5 + 2 / 128);
    const rest = 2 * (102400 * 2048 + 26 * 64 * 2048 + 2048 * (2 * 27 + 1) + 512 * 27);
    expect(int4.always).toBe(dense + shared + attention + rest);
  });
  it('DeepSeek-V3 as published: 37 B of 671 B active, FP8 with a scale for each tile of 128 x 128', () => {
    const m = model('deepseek-v3');
    const fp8 = footprint(m, { kind: 'fp8', tile: [128, 128] });
    const linears = models['deepseek-v3']!.blocks + models['deepseek-v3']!.experts;
    within(fp8.weights, linears * (1 + 4 / 16384) + 2 * models['deepseek-v3']!.other, 1e-3);
    within(fp8.activeParameters, 37e9, 0.02);
    expect(cacheBytes(m, 1)).toBe(70_272);
  });
});
