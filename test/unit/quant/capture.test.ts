import { describe, expect, it } from 'vitest';
import type { Site } from '../../../src/arch/stream.js';
import type { ExpertsCall, LinearSpec, Weights } from '../../../src/nn/calls.js';
import { expertSort } from '../../../src/tensor/ops.js';
import { Scope } from '../../../src/tensor/tensor.js';
import {
  captureAll,
  captureExperts,
  captureLinear,
  countTokens,
  rowErrors,
  type Evidence,
} from '../../../src/quant/capture.js';
import { ExpertStatistics } from '../../../src/quant/experts.js';
import { testEnv } from '../../arch/support.js';

const { device } = testEnv();
const k = 12;
let state = 7;
const draw = (): number => {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
  return state / 2 ** 32 - 0.5;
};
const rows = (n: number): Float32Array => Float32Array.from({ length: n * k }, draw);

/** X'X / rows over the rows of all batches that `pick` takes. */
function moments(
  batches: readonly Float32Array[],
  pick: (batch: number, row: number) => boolean,
  count: number,
): number[] {
  const h = new Array<number>(k * k).fill(0);
  batches.forEach((x, b) => {
    for (let r = 0; r < x.length / k; r++) {
      if (!pick(b, r)) continue;
      for (let i = 0; i < k; i++) for (let j = 0; j < k; j++) h[i * k + j]! += (x[r * k + i]! * x[r * k + j]!) / count;
    }
  });
  return h;
}
const close = (got: ArrayLike<number>, wanted: readonly number[]): void => {
  wanted.forEach((value, i) =>
    expect(Math.abs(got[i]! - value), `element ${i}`).toBeLessThan(1e-5 * (1 + Math.abs(value))),
  );
};
const linear = (name: string, role: LinearSpec['role'] = 'mlp'): LinearSpec => ({
  name,
  inFeatures: k,
  outFeatures: 4,
  role,
});

describe('Hessians', () => {
  it('are the mean over the tokens of all batches', async () => {
    using scope = new Scope(device);
    const batches = [rows(20), rows(13)];
    const linears = [linear('q'), linear('k')];
    const site = {
      kind: 'linear',
      linears,
      tokens: 33,
      each: async (handle: (call: unknown, batch: number) => unknown) => {
        for (const [b, x] of batches.entries())
          await handle({ kind: 'linear', linears, x: scope.from('f32', [x.length / k, k], x) }, b);
      },
    } as unknown as Site;
    const { h, energy, tokens } = await captureLinear(site, scope);
    const wanted = moments(batches, () => true, 33);
    close(await h.float32(), wanted);
    close(
      energy,
      Array.from({ length: k }, (_, i) => wanted[i * k + i]!),
    );
    expect(tokens).toBe(33);
    const d = rows(5);
    const errors = await rowErrors(scope.from('f32', [5, k], d), h);
    for (let r = 0; r < 5; r++) {
      let sum = 0;
      for (let i = 0; i < k; i++) for (let j = 0; j < k; j++) sum += d[r * k + i]! * wanted[i * k + j]! * d[r * k + j]!;
      expect(errors[r]).toBeCloseTo(sum, 5);
    }
  });
});

describe('Hessians of experts', () => {
  const experts = 4;
  // Expert 3 is never chosen, expert 2 once.
  const choices = [
    [0, 1, 0, 0, 1, 1, 0, 2, 0, 1],
    [1, 0, 0, 1, 0, 1],
  ];
  const spec = Array.from({ length: experts }, (_, e) => linear(`experts.${e}.up`, 'expert'));

  function siteOf(scope: Scope, sorted: readonly Float32Array[]): Site {
    const calls = choices.map((idx, b) => ({
      kind: 'experts',
      layer: 0,
      linears: [spec],
      x: scope.from('f32', [idx.length, k], sorted[b]!),
      order: expertSort(scope, scope.from('i32', [idx.length, 1], Int32Array.from(idx)), experts),
    }));
    return {
      kind: 'experts',
      block: { index: 0 },
      linears: [spec],
      tokens: 16,
      weights: { stack: () => scope.empty('f32', [experts, 4, k]) } as unknown as Weights,
      each: async (handle: (call: ExpertsCall, batch: number) => unknown) => {
        for (const [b, call] of calls.entries()) await handle(call as unknown as ExpertsCall, b);
      },
    } as unknown as Site;
  }
  const expertOfRow = choices.map((idx) => [...idx].sort((a, b) => a - b));
  const counts = Array.from({ length: experts }, (_, e) => choices.flat().filter((c) => c === e).length);

  it('are the mean over the tokens routed to each, whole or in parts', async () => {
    using scope = new Scope(device);
    const sorted = choices.map((idx) => rows(idx.length));
    const site = siteOf(scope, sorted);
    expect(await countTokens(site, experts)).toEqual(counts);
    for (const [from, to] of [
      [0, 4],
      [1, 3],
    ] as const) {
      const h = await captureExperts(site, from, to, counts, scope);
      for (let e = from; e < to; e++) {
        close(
          await h.at(e - from).float32(),
          moments(sorted, (b, r) => expertOfRow[b]![r] === e, Math.max(counts[e]!, 1)),
        );
      }
    }
    close(
      await (await captureAll(site, 16, scope)).float32(),
      moments(sorted, () => true, 16),
    );
  });

  it('are drawn towards the layer’s where tokens are few, and replaced by rounding where there are none', async () => {
    using scope = new Scope(device);
    const sorted = choices.map((idx) => rows(idx.length));
    const site = siteOf(scope, sorted);
    const statistics = await ExpertStatistics.at(site, experts, undefined);
    expect(statistics.coverage).toMatchObject({ experts, tokens: counts, uncovered: 1, starved: 4 });
    const seen: Evidence[] = [];
    const all = moments(sorted, () => true, 16);
    await statistics.each(site, async (e, evidence) => {
      seen.push(evidence);
      if (counts[e] === 0) return;
      const share = 1 - counts[e]! / (2 * k);
      const own = moments(sorted, (b, r) => expertOfRow[b]![r] === e, counts[e]!);
      close(
        await evidence.statistics!.h.float32(),
        own.map((value, i) => (1 - share) * value + share * all[i]!),
      );
    });
    expect(seen.map(({ roundOnly }) => roundOnly ?? false)).toEqual([false, false, false, true]);
    expect(seen.map(({ tokens }) => tokens)).toEqual(counts);
    expect(seen[3]!.note).toMatch(/no calibration token/);
    // Before down_proj channels of different experts have nothing in common: only the own diagonal is left whole.
    const inner = await ExpertStatistics.at(site, experts, statistics);
    await inner.each(site, async (e, evidence) => {
      if (counts[e] === 0) return expect(evidence.statistics).toBeUndefined();
      const kept = counts[e]! / (2 * k);
      const own = moments(sorted, (b, r) => expertOfRow[b]![r] === e, counts[e]!);
      const wanted = own.map((value, i) => (Math.floor(i / k) === i % k ? value : kept * value));
      close(await evidence.statistics!.h.float32(), wanted);
    });
  });
});
