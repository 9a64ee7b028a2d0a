import { afterAll, describe, expect, it } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import { cholesky, dequantize, ldlq, quantize, scaleSearch, type Grid } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { activations, columns, fixture, gram, nmse, noise, permuted, weights } from './quant-cases.js';

const device = openDevice({ kind: 'cpu', poison: true });
afterAll(() => device.close());
const expected = fixture('quant');

interface Case {
  n: number;
  k: number;
  group: number;
  low: number;
  high: number;
  batch: number;
  seed: number;
  damp: number;
}

describe('ldlq gives the codes of GPTQ (PyTorch, float64)', () => {
  for (const [name, c] of Object.entries(expected.meta<Record<string, Case>>('gptq'))) {
    it(name, async () => {
      using s = new Scope(device);
      const { n, k, group, low, high, batch } = c;
      const h = new Float32Array(batch * k * k);
      const w = new Float32Array(batch * n * k);
      const perm = expected.has(`${name}.perm`) ? expected.i32(`${name}.perm`) : undefined;
      for (let e = 0; e < batch; e++) {
        const seed = c.seed + 10 * e;
        const full = gram(activations(seed, 2 * k, k), k);
        const part = weights(seed + 1, n, k);
        h.set(perm ? permuted(full, perm) : full, e * k * k);
        w.set(perm ? columns(part, perm) : part, e * n * k);
      }
      const lead = batch > 1 ? [batch] : [];
      const groups = Math.ceil(k / group);
      const grid: Grid = {
        scale: s.from('f32', [...lead, n, groups], expected.f32(`${name}.scale`)),
        zero: expected.has(`${name}.zero`)
          ? s.from('f32', [...lead, n, groups], expected.f32(`${name}.zero`))
          : undefined,
        low,
        high,
        group,
        columnGroup:
          perm &&
          s.from(
            'i32',
            [k],
            perm.map((p) => Math.floor(p / group)),
          ),
      };
      const { factor, info } = cholesky(s, s.from('f32', [...lead, k, k], h), c.damp, true);
      expect([...(await info.int32())].every((i) => i === 0)).toBe(true);
      const { codes, q, error } = ldlq(s, s.from('f32', [...lead, n, k], w), factor, grid);
      expect(await codes.int8()).toEqual(expected.i8(`${name}.codes`));
      expect(nmse(await error.float32(), expected.f32(`${name}.loss`))).toBeLessThan(1e-8);
      expect(await q.float32()).toEqual(await dequantize(s, codes, grid).float32());
    });
  }
});
