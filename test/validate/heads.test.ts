import { describe, expect, it } from 'vitest';
import type { AttentionCall } from '../../src/nn/calls.js';
import { Scope } from '../../src/tensor/tensor.js';
import { compareHeads } from '../../src/validate/attention.js';
import { cpu } from './models.js';

describe('heads of two attention calls', () => {
  const [rows, length, heads, width] = [2, 20, 3, 8];
  const values = (seed: number) => Float32Array.from({ length: rows * length * heads * width }, (_, i) => 3 * Math.sin(seed + i * i)); // prettier-ignore

  it('a soft cap of one side alone is seen, and the same on both sides is not', async () => {
    const env = cpu();
    using s = new Scope(env.device);
    const [q, k] = [1, 2].map((seed) => s.from('f32', [rows, length, heads, width], values(seed)));
    const call = (cap?: number): AttentionCall => {
      const options = { scale: 1, ...(cap !== undefined && { cap }) };
      return { kind: 'attention', layer: 0, q: q!, k: k!, v: k!, options };
    };
    const divergence = async (a: AttentionCall, b: AttentionCall): Promise<number[]> => {
      const { sums, queries } = compareHeads(s, a, b);
      const all = await sums.float32();
      return [0, 1, 2].map((h) => all[3 * h]! / queries);
    };
    for (const value of await divergence(call(4), call())) expect(value).toBeGreaterThan(0.01);
    for (const value of await divergence(call(), call(4))) expect(value).toBeGreaterThan(0.01);
    expect(await divergence(call(4), call(4))).toEqual([0, 0, 0]);
    s[Symbol.dispose]();
    env.close();
  });
});
