import { describe, expect, it } from 'vitest';
import type { ExpertsCall } from '../../../src/nn/calls.js';
import { AllExpertStatistics } from '../../../src/quant/all-experts.js';
import type { Evidence } from '../../../src/quant/capture.js';
import type { Site } from '../../../src/arch/stream.js';
import { expertSort, gather } from '../../../src/tensor/ops.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { testEnv } from '../../arch/support.js';

const { device } = testEnv();
const [experts, k, width] = [3, 4, 5];

let seed = 7;
const draw = () => {
  seed = (Math.imul(seed, 1664525) + 1013904223) >>> 0;
  return seed / 2 ** 31 - 1;
};
const noise = (n: number) => Float32Array.from({ length: n }, draw);
const product = (x: Float32Array, w: Float32Array, columns: number) =>
  Float32Array.from({ length: w.length / columns }, (_, i) => {
    let sum = 0;
    for (let j = 0; j < columns; j++) sum += x[j]! * w[i * columns + j]!;
    return sum;
  });
const silu = (v: number) => v / (1 + Math.exp(-v));
const moments = (rows: readonly Float32Array[]) => {
  const n = rows[0]!.length;
  return Float32Array.from({ length: n * n }, (_, i) => {
    const sum = rows.reduce((all, row) => all + row[Math.floor(i / n)]! * row[i % n]!, 0);
    return sum / rows.length;
  });
};
const close = (a: Float32Array, b: Float32Array) => b.forEach((value, i) => expect(a[i]!).toBeCloseTo(value, 5));

describe('statistics of experts that all see every token', () => {
  it('are those of all tokens, before down_proj through each expert’s own gate and up', async () => {
    using scope = new Scope(device);
    const tokens = Array.from({ length: 7 }, () => noise(k));
    // Two experts a token, expert 2 never; two batches.
    const batches = [tokens.slice(0, 5), tokens.slice(5)];
    const gate = Array.from({ length: experts }, () => noise(width * k));
    const up = Array.from({ length: experts }, () => noise(width * k));
    const name = (part: string, e: number) => `experts.${e}.${part}`;
    const spec = (part: string, e: number, inFeatures: number) => ({ name: name(part, e), inFeatures, outFeatures: 1, role: 'expert' }); // prettier-ignore
    const ffn = (e: number) => ({ gate: spec('gate', e, k), up: spec('up', e, k), down: spec('down', e, width), activation: 'silu' }); // prettier-ignore
    const weights = new Map<string, Float32Array>();
    for (let e = 0; e < experts; e++) weights.set(name('gate', e), gate[e]!).set(name('up', e), up[e]!);
    const calls = batches.map((rows) => {
      const idx = Int32Array.from(rows.flatMap((_, t) => (t % 2 === 0 ? [0, 1] : [1, 0])));
      const order = expertSort(scope, scope.from('i32', [rows.length, 2], idx), experts);
      const x = scope.from('f32', [rows.length, k], Float32Array.from(rows.flatMap((row) => [...row])));
      return { kind: 'experts', x: gather(scope, x, order.tokens), order } as unknown as ExpertsCall;
    });
    const site = {
      kind: 'experts',
      block: { moe: { expertLinears: Array.from({ length: experts }, (_, e) => ffn(e)) } },
      linears: [Array.from({ length: experts }, (_, e) => ffn(e).gate)],
      tokens: tokens.length,
      weights: {
        stack: () => scope.empty('f32', [1]),
        get: (tensor: string) => scope.from('f32', [width, k], weights.get(tensor.replace('.weight', ''))!),
      },
      each: async (handle: (call: ExpertsCall, batch: number) => unknown) => {
        for (const [b, call] of calls.entries()) await handle(call, b);
      },
    } as unknown as Site;
    const coverage = { layer: 0, experts, tokens: [7, 7, 0], starved: 0, uncovered: 0 };
    using statistics = new AllExpertStatistics(site, coverage);
    const seen: Evidence[] = [];
    const wanted = moments(tokens);
    await statistics.each(site, async (_, evidence) => {
      seen.push(evidence);
      close(await evidence.statistics!.h.float32(), wanted);
    });
    expect(seen.map(({ tokens: count }) => count)).toEqual([7, 7, 7]);
    await statistics.each(site, async (e, evidence) => {
      const hidden = tokens.map((x) => {
        const [g, u] = [product(x, gate[e]!, k), product(x, up[e]!, k)];
        return g.map((value, i) => silu(value) * u[i]!);
      });
      close(await evidence.statistics!.h.float32(), moments(hidden));
    });
  });
});
