import { describe, expect, it } from 'vitest';
import { expertWidth, type Padding } from '../../../src/moe/shape.js';
import { chooseShared, evenCapacities } from '../../../src/moe/shared.js';
import { layOut, sharedNeurons } from '../../../src/moe/split.js';
import { loadOf } from '../../../src/moe/judge.js';
import { normalQuantile } from '../../../src/moe/quantile.js';

describe('widths of experts', () => {
  it.each<[number, number, Padding, number]>([
    [1024, 8, 'auto', 128],
    [1024, 9, 'auto', 128], // 114 -> 128: 12.5% more
    [14336, 9, 'auto', 1664],
    [14336, 64, 'auto', 224],
    [172, 9, 'auto', 20], // 24 would be a quarter more
    [172, 9, 1, 20],
    [172, 9, 32, 32],
    [1024, 8, 'none', 128],
  ])('%i neurons in %i parts, padding %s: %i', (ffn, parts, padding, width) => {
    expect(expertWidth(ffn, parts, padding)).toBe(width);
  });

  it('refuses what does not divide when padding is off, naming what does', () => {
    expect(() => expertWidth(1024, 9, 'none')).toThrow('8 or 16 are the nearest');
    expect(() => expertWidth(4, 9, 'auto')).toThrow('More experts than neurons');
  });
});

describe('layout of a split', () => {
  it('is a partition of the neurons, the strongest shared, the rest even', () => {
    const shape = { routed: 3, active: 1, shared: 1, width: 3, ffn: 10 };
    const { shared, rest } = chooseShared(Float32Array.from([5, 1, 9, 1, 1, 7, 1, 1, 1, 1]), sharedNeurons(shape));
    expect([...shared]).toEqual([0, 2, 5]);
    expect([...evenCapacities(rest.length, 3)]).toEqual([3, 2, 2]);
    const { order } = layOut(shape, shared, rest, Int32Array.from([2, 0, 0, 1, 1, 2, 0]));
    expect([...order]).toEqual([3, 4, 9, 6, 7, -1, 1, 8, -1, 0, 2, 5]);
  });

  it('gives the shared experts no more than there is', () => {
    expect(sharedNeurons({ routed: 2, active: 1, shared: 4, width: 8, ffn: 20 })).toBe(20);
  });
});

describe('figures', () => {
  it('load: violation, entropy, dead experts', () => {
    const load = loadOf(Int32Array.from([0, 1, 0, 1, 0, 2, 0, 1]), 2, 4);
    expect(load.share).toEqual([1, 0.75, 0.25, 0]);
    expect(load.maxVio).toBe(1);
    expect(load.dead).toBe(1);
    const entropy = -[0.5, 0.375, 0.125].reduce((sum, p) => sum + p * Math.log(p), 0) / Math.log(4);
    expect(load.entropy).toBeCloseTo(entropy, 12);
  });

  it('quantiles of the normal distribution', () => {
    // scipy.stats.norm.ppf
    for (const [p, x] of [
      [0.5, 0],
      [0.25, -0.6744897501960817],
      [0.9, 1.2815515655446004],
      [0.999, 3.090232306167813],
    ] as const)
      // prettier-ignore
      expect(normalQuantile(p)).toBeCloseTo(x, 3);
  });
});
