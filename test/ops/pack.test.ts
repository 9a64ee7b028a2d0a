import { describe, expect, it } from 'vitest';
import { cast, int4Matmul, pack, unpack, type PackOptions } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture, nmse, noise } from './quant-cases.js';
import { onDevices } from './support.js';

onDevices('packed codes', (device) => {
  const expected = fixture('quant');

  describe('pack', () => {
    for (const bits of [2, 3, 4, 8] as const) {
      it(`lays ${bits}-bit codes out as GPTQ does`, async () => {
        using s = new Scope(device());
        const codes = s.from('i8', [64, 16], expected.i8(`pack.${bits}.codes`));
        const o: PackOptions = { bits, bias: 2 ** (bits - 1), axis: 0, order: bits === 3 ? 'dense' : 'linear' };
        const words = pack(s, codes, o);
        expect(await words.int32()).toEqual(expected.i32(`pack.${bits}.gptq`));
        expect(await unpack(s, words, 64, 16, o).int8()).toEqual(expected.i8(`pack.${bits}.codes`));
      });
    }
    it('lays 4-bit codes out as AWQ does', async () => {
      using s = new Scope(device());
      const o: PackOptions = { bits: 4, bias: 8, axis: 1, order: 'awq' };
      const words = pack(s, s.from('i8', [64, 16], expected.i8('pack.4.codes')), o);
      expect(await words.int32()).toEqual(expected.i32('pack.awq'));
      expect(await unpack(s, words, 64, 16, o).int8()).toEqual(expected.i8('pack.4.codes'));
    });
    it('pads the last word with zeros and comes back, whatever the shape', async () => {
      using s = new Scope(device());
      for (const bits of [2, 3, 4, 8] as const)
        for (const axis of [0, 1] as const)
          for (const order of ['linear', 'dense', ...(bits === 4 ? (['awq'] as const) : [])] as const)
            for (const [r, c] of [
              [1, 1],
              [5, 13],
              [33, 21],
            ] as const) {
              const half = 2 ** (bits - 1);
              const codes = Int8Array.from(noise(bits, r * c), (v) => (((v % half) + half) % half) - half / 2);
              const o: PackOptions = { bits, bias: half, axis, order };
              const words = pack(s, s.from('i8', [r, c], codes), o);
              expect(await unpack(s, words, r, c, o).int8()).toEqual(codes);
              if (r === 1) expect((await words.int32())[0]).toBe(codes[0]! + half);
            }
    });
    it('reads and writes views', async () => {
      using s = new Scope(device());
      const codes = expected.i8('pack.4.codes');
      const wide = new Int8Array(64 * 20).map((_, i) => (i % 20 < 16 ? codes[Math.floor(i / 20) * 16 + (i % 20)]! : 5));
      const o: PackOptions = { bits: 4, bias: 8, axis: 0 };
      const words = pack(s, s.from('i8', [64, 20], wide).slice(1, 0, 16), o);
      expect(await words.int32()).toEqual(expected.i32('pack.4.gptq'));
    });
  });

  describe('int4_matmul', () => {
    const product = async (
      m: number,
      k: number,
      n: number,
      group: number,
      o: { zero?: boolean; bias?: boolean; dtype?: 'f32' | 'bf16' } = {},
    ) => {
      using s = new Scope(device());
      const groups = Math.ceil(k / group);
      const values = Int8Array.from(noise(m + k, n * k), (v) => ((v % 16) + 16) % 16); // unsigned codes, zero at 8 or stored
      const scale = noise(n, n * groups).map((v) => Math.fround(v / 4096));
      const zeros = Int8Array.from(noise(k, n * groups), (v) => ((v % 16) + 16) % 16);
      const x = noise(7, m * k).map((v) => Math.trunc(v / 4) / 16); // exact in bf16
      const bias = noise(8, n).map((v) => v / 64);
      const words = pack(s, s.from('i8', [n, k], values), { bits: 4, bias: 0, axis: 1 });
      const zero = pack(s, s.from('i8', [n, groups], zeros), { bits: 4, bias: 0, axis: 0 });
      const dtype = o.dtype ?? 'f32';
      const y = int4Matmul(
        s,
        cast(s, s.from('f32', [m, k], x), dtype),
        { words, scale: s.from('f32', [n, groups], scale), zero: o.zero ? zero : undefined, group },
        o.bias ? { bias: s.from('f32', [n], bias) } : {},
      );
      const want = new Float64Array(m * n);
      for (let i = 0; i < m; i++)
        for (let r = 0; r < n; r++) {
          let sum = o.bias ? bias[r]! : 0;
          for (let j = 0; j < k; j++) {
            const at = r * groups + Math.floor(j / group);
            sum += x[i * k + j]! * (values[r * k + j]! - (o.zero ? zeros[at]! : 8)) * scale[at]!;
          }
          want[i * n + r] = sum;
        }
      return nmse(await cast(s, y, 'f32').float32(), want);
    };
    for (const [m, k, n, group] of [
      [1, 256, 40, 128],
      [3, 100, 17, 32],
      [5, 72, 9, 24],
      [16, 128, 33, 128],
      [40, 200, 70, 64],
      [2, 50, 5, 10],
    ] as const) {
      it(`x [${m}, ${k}] times W [${n}, ${k}]', groups of ${group}`, async () => {
        expect(await product(m, k, n, group)).toBeLessThan(1e-11);
        expect(await product(m, k, n, group, { zero: true, bias: true })).toBeLessThan(1e-11);
        expect(await product(m, k, n, group, { zero: true, dtype: 'bf16' })).toBeLessThan(2e-5);
      });
    }
  });
});
