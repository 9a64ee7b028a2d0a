import { afterAll, describe, expect, it } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import { pack, unpack, type PackOptions } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { fixture, noise } from './quant-cases.js';

const device = openDevice({ kind: 'cpu', poison: true });
afterAll(() => device.close());
const expected = fixture('quant');

describe('pack', () => {
  for (const bits of [2, 3, 4, 8] as const) {
    it(`lays ${bits}-bit codes out as GPTQ does`, async () => {
      using s = new Scope(device);
      const codes = s.from('i8', [64, 16], expected.i8(`pack.${bits}.codes`));
      const o: PackOptions = { bits, bias: 2 ** (bits - 1), axis: 0, order: bits === 3 ? 'dense' : 'linear' };
      const words = pack(s, codes, o);
      expect(await words.int32()).toEqual(expected.i32(`pack.${bits}.gptq`));
      expect(await unpack(s, words, 64, 16, o).int8()).toEqual(expected.i8(`pack.${bits}.codes`));
    });
  }
  it('lays 4-bit codes out as AWQ does', async () => {
    using s = new Scope(device);
    const o: PackOptions = { bits: 4, bias: 8, axis: 1, order: 'awq' };
    const words = pack(s, s.from('i8', [64, 16], expected.i8('pack.4.codes')), o);
    expect(await words.int32()).toEqual(expected.i32('pack.awq'));
    expect(await unpack(s, words, 64, 16, o).int8()).toEqual(expected.i8('pack.4.codes'));
  });
  it('pads the last word with zeros and comes back, whatever the shape', async () => {
    using s = new Scope(device);
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
    using s = new Scope(device);
    const codes = expected.i8('pack.4.codes');
    const wide = new Int8Array(64 * 20).map((_, i) => (i % 20 < 16 ? codes[Math.floor(i / 20) * 16 + (i % 20)]! : 5));
    const o: PackOptions = { bits: 4, bias: 8, axis: 0 };
    const words = pack(s, s.from('i8', [64, 20], wide).slice(1, 0, 16), o);
    expect(await words.int32()).toEqual(expected.i32('pack.4.gptq'));
  });
});
