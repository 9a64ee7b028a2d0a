import { describe, expect, it } from 'vitest';
import { blockScheme } from '../../../src/quant/blocks.js';
import { statisticsOf } from '../../../src/quant/capture.js';
import { total } from '../../../src/quant/gptq.js';
import { valuesOf } from '../../../src/quant/rtn.js';
import { bitsPerWeight, defaultRecipe } from '../../../src/quant/scheme.js';
import { solve } from '../../../src/quant/solve.js';
import { binary, blockFormats, decode, hessianAdd, random, symmetrize, type BlockFormatName } from '../../../src/tensor/ops.js'; // prettier-ignore
import { Scope } from '../../../src/tensor/tensor.js';
import { testEnv } from '../../arch/support.js';

const { device } = testEnv();
const [n, k, tokens] = [24, 512, 1024];

describe('blocks of GGUF', () => {
  it('give way to smaller ones where a row is no whole number of them', () => {
    expect(blockScheme(512, 'q4_k')?.blocks).toBe('q4_k');
    expect(blockScheme(96, 'q4_k')?.blocks).toBe('q5_0');
    expect(blockScheme(96, 'q6_k')?.blocks).toBe('q8_0');
    expect(blockScheme(100, 'q4_k')).toBeUndefined();
    expect(bitsPerWeight(blockScheme(512, 'q4_k')!, 512, 16)).toBe(4.5);
    expect(bitsPerWeight(blockScheme(512, 'q6_k')!, 512, 16)).toBe(6.5625);
  });

  for (const type of ['q4_k', 'q4_0', 'q6_k', 'q3_k'] as BlockFormatName[]) {
    it(`${type}: error feedback on their grids, stored as they are decoded`, async () => {
      using scope = new Scope(device);
      const [x, mix, w] = [
        scope.empty('f32', [tokens, k]),
        scope.empty('f32', [tokens, 1]),
        scope.empty('f32', [n, k]),
      ];
      random(x, 'normal', 11, 0, 1);
      random(mix, 'normal', 12, 0, 1);
      random(w, 'normal', 13, 0, 0.05);
      binary(scope, 'add', x, mix, { out: x }); // channels that go together: what feedback lives on
      const h = scope.zeros('f32', [k, k]);
      hessianAdd(h, x, { alpha: 1 / tokens });
      symmetrize(h);
      const statistics = await statisticsOf(h, tokens, scope, 'test');
      const scheme = blockScheme(k, type)!;
      const solve_ = (method: 'gptq' | 'rtn') =>
        solve(scope, w, statistics, scheme, { ...defaultRecipe, method }, 'f32');
      const [fed, rounded] = [await solve_('gptq'), await solve_('rtn')];
      expect(total(fed.errors)).toBeLessThan(0.92 * total(rounded.errors));
      expect(total(fed.errors)).toBeLessThan(0.9 * total(fed.plain));
      const values = await valuesOf(scope, fed, scheme).float32();
      const { bytes, values: per } = blockFormats[type];
      expect(fed.blocks!.shape).toEqual([n, (k / per) * bytes]);
      const stored = await decode(scope, fed.blocks!, type, [n, k], 'f32').float32();
      expect(stored).toEqual(values);
      // tr((W - Q) H (W - Q)') / tokens, from the stored blocks alone.
      const [xs, ws] = [await x.float32(), await w.float32()];
      let exact = 0;
      for (let i = 0; i < n; i++) {
        for (let t = 0; t < tokens; t++) {
          let y = 0;
          for (let j = 0; j < k; j++) y += (ws[i * k + j]! - stored[i * k + j]!) * xs[t * k + j]!;
          exact += y * y;
        }
      }
      expect(total(fed.errors) / (exact / tokens)).toBeCloseTo(1, 2);
    });
  }
});
