import { describe, expect, it } from 'vitest';
import { allocateBits } from '../../../src/quant/allocate.js';
import { changesOf, parseOverride } from '../../../src/quant/overrides.js';
import type { Bits } from '../../../src/quant/scheme.js';
import type { Sensitivity } from '../../../src/quant/sensitivity.js';
import type { LinearSpec } from '../../../src/nn/calls.js';

const linear = (name: string, role: LinearSpec['role'] = 'mlp'): LinearSpec => ({
  name,
  role,
  inFeatures: 256,
  outFeatures: 256,
});
const block = (i: number) => {
  const at = (name: string, role?: LinearSpec['role']) => linear(`model.layers.${i}.${name}`, role);
  return {
    linears: [
      [at('self_attn.q_proj'), at('self_attn.k_proj'), at('self_attn.v_proj')],
      [at('mlp.experts.0.up_proj', 'expert')],
      [at('mlp.experts.1.up_proj', 'expert')],
    ],
  };
};

describe('--override', () => {
  it('says what linears get, in short and in full', () => {
    expect(parseOverride('down_proj=8')).toEqual({ pattern: 'down_proj', bits: 8 });
    expect(parseOverride('layers.0=bits:3,group:-1,asym')).toEqual({
      pattern: 'layers.0',
      bits: 3,
      groupSize: -1,
      symmetric: false,
    });
    expect(parseOverride('re:a=b$=group:64')).toEqual({ pattern: 're:a=b$', groupSize: 64 });
    for (const wrong of ['down_proj', 'down_proj=', 'down_proj=5', '=4', 'a=bits:4;group:64', 'a=true']) {
      expect(parseOverride(wrong), wrong).toBeUndefined();
    }
  });

  it('takes fused partners along, all experts of a layer among them', () => {
    const blocks = [block(0), block(1)];
    const changes = changesOf(blocks, [
      { pattern: 'q_proj', bits: 8 },
      { pattern: 'layers.1.mlp.experts.1', bits: 3 },
    ]);
    const bits = (name: string) => changes.get(name)?.bits;
    expect(['q', 'k', 'v'].map((x) => bits(`model.layers.0.self_attn.${x}_proj`))).toEqual([8, 8, 8]);
    expect(bits('model.layers.0.mlp.experts.0.up_proj')).toBeUndefined();
    expect(bits('model.layers.1.mlp.experts.0.up_proj')).toBe(3);
  });

  it('counts the last one that fits, and refuses two for one fused set', () => {
    const last = changesOf([block(0)], [{ pattern: 'self_attn', bits: 8 }, { pattern: 're:layers', bits: 3 }]); // prettier-ignore
    expect(last.get('model.layers.0.self_attn.k_proj')).toEqual({ bits: 3 });
    const two = [{ pattern: 'q_proj', bits: 8 as Bits }, { pattern: 'k_proj', bits: 3 as Bits }]; // prettier-ignore
    expect(() => changesOf([block(0)], two)).toThrow(/cannot get different schemes/);
    expect(() => changesOf([block(0)], [{ pattern: 'q_pro', bits: 8 }])).toThrow(/No linear has a name/);
  });
});

describe('bits by sensitivity', () => {
  const bits: readonly Bits[] = [2, 3, 4, 8];
  const unit = (name: string, weights: number, errors: readonly number[]): Sensitivity => ({
    linears: [name],
    weights,
    candidates: bits.map((b, i) => ({ bits: b, bitsPerWeight: b + 0.125, error: errors[i]! })),
  });
  const units = [
    unit('a', 10, [0.5, 0.1, 0.02, 0.0001]),
    unit('b', 20, [5, 1.5, 0.4, 0.001]),
    unit('c', 40, [0.9, 0.3, 0.08, 0.0004]),
    unit('d', 10, [0.01, 0.004, 0.001, 0]),
  ];
  const of = (chosen: ReadonlyMap<string, { bits?: Bits }>) => {
    const picked = units.map(({ linears, candidates }) => candidates.find((c) => c.bits === chosen.get(linears[0]!)!.bits)!); // prettier-ignore
    const weights = units.reduce((sum, one) => sum + one.weights, 0);
    return {
      error: picked.reduce((sum, { error }) => sum + error, 0),
      mean: picked.reduce((sum, { bitsPerWeight }, u) => sum + bitsPerWeight * units[u]!.weights, 0) / weights,
    };
  };

  it('keeps to the target and comes close to the best choice there is', () => {
    for (const target of [2.2, 3, 3.6, 4.125, 5, 6.5, 8.2]) {
      const chosen = of(allocateBits(units, target));
      expect(chosen.mean, String(target)).toBeLessThanOrEqual(target + 1e-9);
      // All 256 choices.
      let least = Infinity;
      for (let code = 0; code < 4 ** units.length; code++) {
        const one = new Map(
          units.map(({ linears }, u) => [linears[0]!, { bits: bits[Math.floor(code / 4 ** u) % 4]! }]),
        );
        const { error, mean } = of(one);
        if (mean <= target + 1e-9) least = Math.min(least, error);
      }
      expect(chosen.error, String(target)).toBeLessThanOrEqual(1.35 * least);
    }
  });

  it('gives all the most where there is room, and refuses what cannot be', () => {
    expect([...allocateBits(units, 9).values()]).toEqual(units.map(() => ({ bits: 8 })));
    expect([...allocateBits(units, 2.125).values()]).toEqual(units.map(() => ({ bits: 2 })));
    expect(() => allocateBits(units, 2.1)).toThrow(/at least 2\.125/);
  });

  it('never takes a candidate that costs more and is no better', () => {
    const odd = [unit('a', 1, [1, 0.2, 0.3, 0.25])];
    expect(allocateBits(odd, 9).get('a')).toEqual({ bits: 3 });
  });
});
