import { describe, expect, it } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import {
  cast,
  cholesky,
  codeDescent,
  dequantize,
  ldlq,
  quantize,
  scaleRefit,
  scaleSearch,
  type Grid,
} from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { activations, columns, fixture, gram, nmse, noise, permuted, weights } from './quant-cases.js';
import { onDevices } from './support.js';

onDevices('quantization', (device) => {
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
        using s = new Scope(device());
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

  describe('ldlq', () => {
    it('gives each expert its own column groups, rows wider than the matrix, and no R above need', async () => {
      using s = new Scope(device());
      const [e, n, k, group] = [2, 5, 70, 32];
      const r = new Float32Array(e * k * k);
      const columnGroup = new Int32Array(e * k);
      for (let i = 0; i < e; i++) {
        const h = s.from('f32', [k, k], Float32Array.from(gram(activations(i, 100, k), k)));
        r.set(await cholesky(s, h, 0.01, true).factor.float32(), i * k * k);
        for (let j = 0; j < k; j++) columnGroup[i * k + j] = (j * 7 + i) % 3;
      }
      const w = s.from('f32', [e, n, k + 3], weights(3, e * n, k + 3)).slice(2, 2, k + 2);
      const scale = s.from(
        'f32',
        [e, n, 3],
        noise(8, e * n * 3).map((v) => 0.02 + Math.abs(v) / 20000),
      );
      const factor = s.from('f32', [e, k, k], r);
      const shape = { low: -8, high: 7, group };
      const all = ldlq(s, w, factor, { scale, ...shape, columnGroup: s.from('i32', [e, k], columnGroup) });
      for (let i = 0; i < e; i++) {
        const alone = ldlq(s, w.at(i), factor.at(i), {
          scale: scale.at(i),
          ...shape,
          columnGroup: s.from('i32', [k], columnGroup.slice(i * k, (i + 1) * k)),
        });
        expect(await all.codes.at(i).int8()).toEqual(await alone.codes.int8());
        expect(await all.q.at(i).float32()).toEqual(await alone.q.float32());
        expect(await all.error.at(i).float32()).toEqual(await alone.error.float32());
      }
    });
    it('is plain rounding under a diagonal H, and with one row, one column', async () => {
      using s = new Scope(device());
      for (const [n, k] of [
        [3, 40],
        [1, 1],
        [1, 300],
        [130, 2],
      ] as const) {
        const w = s.from('f32', [n, k], weights(n + k, n, k));
        const identity = Float32Array.from({ length: k * k }, (_, i) => (i % (k + 1) === 0 ? 1 + (i % 3) : 0));
        const grid = scaleSearch(s, w, { low: -8, high: 7, group: 16, points: 5, from: 0.8, to: 1 });
        const { codes } = ldlq(s, w, s.from('f32', [k, k], identity), grid);
        expect(await codes.int8()).toEqual(await quantize(s, w, grid).int8());
      }
    });
    it('ends with weights and factors that are not finite, and shows it in the error', async () => {
      using s = new Scope(device());
      const [n, k] = [4, 150];
      const values = weights(1, n, k);
      values[10] = NaN;
      values[k + 5] = Infinity;
      const h = s.from('f32', [k, k], Float32Array.from(gram(activations(1, 300, k), k)));
      const { factor } = cholesky(s, h, 0.01, true);
      const w = s.from('f32', [n, k], values);
      const grid = scaleSearch(s, w, { low: -8, high: 7, group: 64 });
      expect((await grid.scale.float32()).every((v) => Number.isFinite(v) && v !== 0)).toBe(true);
      const { codes, q, error } = ldlq(s, w, factor, grid);
      expect((await codes.int8()).every((v) => v >= -8 && v <= 7)).toBe(true);
      expect((await q.float32()).every(Number.isFinite)).toBe(true);
      expect([...(await error.float32())].map(Number.isFinite)).toEqual([false, false, true, true]);
    });
    it('gives the same bytes twice, and with any number of threads', async () => {
      const run = async (threads: number) => {
        const other = openDevice({ kind: 'cpu', threads, poison: true });
        const s = new Scope(other);
        const [n, k] = [67, 290];
        const h = s.from('f32', [k, k], Float32Array.from(gram(activations(5, 600, k), k)));
        const { factor } = cholesky(s, h, 0.01, true);
        const w = s.from('f32', [n, k], weights(6, n, k));
        const grid = scaleSearch(s, w, { low: -8, high: 7, group: 128, points: 8, from: 0.6, to: 1, freeSign: true });
        const { codes, error } = ldlq(s, w, factor, grid);
        const out = [
          await factor.bytesOut(),
          await grid.scale.bytesOut(),
          await codes.bytesOut(),
          await error.bytesOut(),
        ];
        s[Symbol.dispose]();
        other.close();
        return out;
      };
      const one = await run(1);
      expect(await run(1)).toEqual(one);
      expect(await run(3)).toEqual(one);
    });
  });

  interface SearchCase {
    n: number;
    k: number;
    group: number;
    low: number;
    high: number;
    points: number;
    start: number;
    stop: number;
    free_sign: boolean;
    weighted: boolean;
    seed: number;
  }

  describe('scale_search finds the grid of an exhaustive search (numpy, float64)', () => {
    for (const [name, c] of Object.entries(expected.meta<Record<string, SearchCase>>('search'))) {
      it(name, async () => {
        using s = new Scope(device());
        const { n, k, group, low, high } = c;
        const h = gram(activations(c.seed + 1, 50, k), k);
        const weight = Float32Array.from({ length: k }, (_, j) => h[j * k + j]!);
        const values = weights(c.seed, n, k);
        const grid = scaleSearch(s, s.from('f32', [n, k], values), {
          low,
          high,
          group,
          asymmetric: low === 0,
          ...(c.weighted ? { weight: s.from('f32', [k], weight) } : {}),
          points: c.points,
          from: c.start,
          to: c.stop,
          freeSign: c.free_sign,
        });
        const scale = await grid.scale.float32();
        const zero = grid.zero ? await grid.zero.float32() : new Float32Array(scale.length);
        expect(nmse(scale, expected.f32(`search.${name}.scale`))).toBeLessThan(1e-12);
        if (grid.zero) expect(zero).toEqual(expected.f32(`search.${name}.zero`));
        if (c.free_sign) expect(scale.some((v) => v < 0)).toBe(true);
        const loss = new Float64Array(scale.length);
        const groups = Math.ceil(k / group);
        const back = await dequantize(s, quantize(s, s.from('f32', [n, k], values), grid), grid).float32();
        back.forEach((v, i) => {
          const [r, j] = [Math.floor(i / k), i % k];
          loss[r * groups + Math.floor(j / group)]! += (c.weighted ? weight[j]! : 1) * (values[i]! - v) ** 2;
        });
        expect(nmse(loss, expected.f32(`search.${name}.loss`))).toBeLessThan(1e-8);
      });
    }
    it('zeros get scale 1; dead channels are judged by the weights; bf16 weights are taken', async () => {
      using s = new Scope(device());
      const values = new Float32Array(3 * 64);
      values.set(
        noise(1, 64).map((v) => v / 4096),
        0,
      ); // group 0 of row 0 and 1 of row 0
      values.fill(0.5, 128, 160);
      const bf16 = Uint16Array.from(new Uint32Array(values.buffer), (u) => u >>> 16);
      const w = s.from('bf16', [3, 64], bf16);
      const o = { low: -8, high: 7, group: 32, points: 28, from: 0.55, to: 1.06 };
      const dead = await scaleSearch(s, w, { ...o, weight: s.from('f32', [64], new Float32Array(64)) }).scale.float32();
      const plain = await scaleSearch(s, w, o).scale.float32();
      expect(dead).toEqual(plain);
      expect([...plain.subarray(2, 4), plain[5]]).toEqual([1, 1, 1]);
      expect(plain[4]).toBeGreaterThan(0.04);
    });
    it('takes the weights of each expert', async () => {
      using s = new Scope(device());
      const [n, k] = [4, 64];
      const w = s.from('f32', [2, n, k], weights(1, 2 * n, k));
      const weight = s.from('f32', [2, k], noise(3, 2 * k).map(Math.abs));
      const o = { low: -8, high: 7, group: 32, points: 28, from: 0.55, to: 1.06, freeSign: true };
      const both = await scaleSearch(s, w, { ...o, weight }).scale.float32();
      const alone = await scaleSearch(s, w.at(1), { ...o, weight: weight.at(1) }).scale.float32();
      expect(both.subarray(n * 2)).toEqual(alone);
      expect(alone).not.toEqual(await scaleSearch(s, w.at(1), { ...o, weight: weight.at(0) }).scale.float32());
    });
  });

  describe('quantize and dequantize', () => {
    it('round half to even, clamp, take negative scales and fractional zeros', async () => {
      using s = new Scope(device());
      const w = s.from(
        'f32',
        [2, 8],
        Float32Array.of(0.25, 0.75, 1.25, -0.25, -0.75, 100, -100, NaN, 1, 2, 3, 4, 5, 6, 7, 8),
      );
      const grid: Grid = {
        scale: s.from('f32', [2, 2], Float32Array.of(0.5, 0.5, -1, 2)),
        zero: s.from('f32', [2, 2], Float32Array.of(0, 0, 0.75, -3)),
        low: -8,
        high: 7,
        group: 4,
      };
      const codes = quantize(s, w, grid);
      expect([...(await codes.int8())]).toEqual([0, 2, 2, 0, -2, 7, -8, -8, 0, -1, -2, -3, 0, 0, 0, 1]);
      expect([...(await dequantize(s, codes, grid).float32())]).toEqual([
        0, 1, 1, 0, -1, 3.5, -4, -4, 0.75, 1.75, 2.75, 3.75, 6, 6, 6, 8,
      ]);
      const half = dequantize(s, codes, grid, 'bf16');
      expect([...new Uint16Array((await half.bytesOut()).buffer)].slice(0, 3)).toEqual([0, 0x3f80, 0x3f80]);
    });
    it('follow column_group', async () => {
      using s = new Scope(device());
      const [n, k] = [3, 50];
      const w = s.from('f32', [n, k], weights(2, n, k));
      const columnGroup = Int32Array.from({ length: k }, (_, j) => (j * 3) % 4);
      const scale = noise(2, n * 4).map((v) => v / 9000);
      const grid: Grid = {
        scale: s.from('f32', [n, 4], scale),
        low: -8,
        high: 7,
        group: 13,
        columnGroup: s.from('i32', [k], columnGroup),
      };
      const codes = quantize(s, w, grid);
      const back = await dequantize(s, codes, grid).float32();
      (await codes.int8()).forEach((code, i) => {
        expect(back[i]).toBe(Math.fround(code * scale[Math.floor(i / k) * 4 + columnGroup[i % k]!]!));
      });
    });
  });

  describe('scale_refit and code_descent', () => {
    const [n, k, group] = [6, 100, 24];
    const setup = (s: Scope) => ({
      w: s.from('f32', [n, k], weights(50001, n, k)),
      h: s.from('f32', [k, k], Float32Array.from(gram(activations(50000, 2 * k, k), k))),
      codes: s.from('i8', [n, k], expected.i8('refit.codes')),
      grid: {
        scale: s.from('f32', [n, 5], expected.f32('refit.scale')),
        zero: s.from('f32', [n, 5], expected.f32('refit.zero')),
        low: -8,
        high: 7,
        group,
      } satisfies Grid,
    });
    it('the scales are those of numpy.linalg.lstsq', async () => {
      using s = new Scope(device());
      const { w, h, codes, grid } = setup(s);
      const fitted = await scaleRefit(s, codes, w, h, grid, { damp: 0 }).float32();
      expect(nmse(fitted, expected.f32('refit.fitted'))).toBeLessThan(1e-9);
      expect(await grid.scale.float32()).toEqual(expected.f32('refit.scale'));
    });
    it('the codes are those of a plain descent', async () => {
      using s = new Scope(device());
      const { w, h, codes, grid } = setup(s);
      const { changed } = codeDescent(s, codes, w, h, grid);
      expect(await codes.int8()).toEqual(expected.i8('refit.descended'));
      expect(await changed.int32()).toEqual(expected.i32('refit.changed'));
      expect((await changed.int32()).every((v) => v > 0)).toBe(true);
    });

    // Independent of the ops: all in float64, a row at a time.
    interface Shape {
      n: number;
      k: number;
      group: number;
      zeros?: boolean;
      shuffled?: boolean;
    }
    const made = (s: Scope, { n, k, group, zeros, shuffled }: Shape) => {
      const groups = Math.ceil(k / group);
      const full = gram(activations(70000, 2 * k, k), k);
      for (let i = 0; i < k * k; i++) full[i] = Math.fround(full[i]!);
      const values = weights(70001, n, k);
      const scale = noise(70002, n * groups).map((v) => (v < 0 ? -1 : 1) * (0.015 + Math.abs(v) / 60000));
      const zero = zeros ? noise(70003, n * groups).map((v) => (v % 4) - 1) : undefined;
      const groupOf = Int32Array.from({ length: k }, (_, j) => (shuffled ? (j * 7) % groups : Math.floor(j / group)));
      const grid: Grid = {
        scale: s.from('f32', [n, groups], scale),
        zero: zero && s.from('f32', [n, groups], zero),
        low: -8,
        high: 7,
        group,
        columnGroup: shuffled ? s.from('i32', [k], groupOf) : undefined,
      };
      const w = s.from('f32', [n, k], values);
      const h = s.from('f32', [k, k], Float32Array.from(full));
      const z = (r: number, g: number) => zero?.[r * groups + g] ?? 0;
      const differences = (codes: ArrayLike<number>, scales: ArrayLike<number>) =>
        Float64Array.from({ length: n * k }, (_, i) => {
          const [r, g] = [Math.floor(i / k), groupOf[i % k]!];
          return values[i]! - (codes[i]! - z(r, g)) * scales[r * groups + g]!;
        });
      const product = (d: Float64Array) => {
        const out = new Float64Array(n * k);
        for (let r = 0; r < n; r++)
          for (let i = 0; i < k; i++) for (let j = 0; j < k; j++) out[r * k + j]! += d[r * k + i]! * full[i * k + j]!;
        return out;
      };
      const errors = (d: Float64Array) => {
        const g = product(d);
        return Float64Array.from({ length: n }, (_, r) => {
          let sum = 0;
          for (let j = 0; j < k; j++) sum += d[r * k + j]! * g[r * k + j]!;
          return sum;
        });
      };
      return { w, h, grid, scale, codes: quantize(s, w, grid), groups, groupOf, z, differences, product, errors };
    };
    const shapes: Record<string, Shape> = {
      'groups of 128': { n: 150, k: 384, group: 128 },
      'groups of 128 with zeros': { n: 67, k: 256, group: 128, zeros: true },
      'other groups': { n: 67, k: 200, group: 48 },
      'columns in another order': { n: 67, k: 256, group: 128, zeros: true, shuffled: true },
    };
    for (const [name, shape] of Object.entries(shapes)) {
      it(`with the gradient given, ${name}: scales solve the normal equations, the gain is the fall of the error`, async () => {
        using s = new Scope(device());
        const { n, k } = shape;
        const { w, h, grid, scale, codes, groups, groupOf, z, differences, product, errors } = made(s, shape);
        const before = await codes.int8();
        const d = differences(before, scale);
        const gradient = () => s.from('f32', [n, k], Float32Array.from(product(d)));
        const fitted = await scaleRefit(s, codes, w, h, grid, { damp: 0, gradient: gradient() }).float32();
        // D'H (w - D scale) = 0 for every row and group, beside what it was.
        const [was, rest] = [product(d), product(differences(before, fitted))];
        const sums = (g: Float64Array) => {
          const out = new Float64Array(n * groups);
          g.forEach((v, i) => {
            const [r, q] = [Math.floor(i / k), groupOf[i % k]!];
            out[r * groups + q]! += (before[i]! - z(r, q)) * v;
          });
          return out;
        };
        const squares = (x: Float64Array) => x.reduce((sum, v) => sum + v * v, 0);
        expect(squares(sums(rest)) / squares(sums(was))).toBeLessThan(1e-6);
        expect(nmse(fitted, await scaleRefit(s, codes, w, h, grid, { damp: 0 }).float32())).toBeLessThan(1e-9);

        const alone = cast(s, codes, 'i8');
        codeDescent(s, alone, w, h, grid, { passes: 3 });
        const { changed, gain } = codeDescent(s, codes, w, h, grid, { passes: 3, gradient: gradient() });
        const after = await codes.int8();
        // A tie that rounds the other way turns about 80 more codes of its row: rows count, and what they cost.
        const other = await alone.int8();
        const apart = new Set<number>();
        after.forEach((code, i) => code !== other[i] && apart.add(Math.floor(i / k)));
        expect(apart.size / n).toBeLessThan(0.08);
        const counts = new Int32Array(n);
        after.forEach((code, i) => (counts[Math.floor(i / k)]! += +(code !== before[i])));
        expect(await changed.int32()).toEqual(counts);
        const [from, to] = [errors(d), errors(differences(after, scale))];
        const fallen = from.map((error, r) => error - to[r]!);
        expect(fallen.every((v) => v > 0)).toBe(true);
        const sum = (x: Float64Array) => x.reduce((total, v) => total + v, 0);
        expect(Math.abs(sum(errors(differences(other, scale))) / sum(to) - 1)).toBeLessThan(3e-3);
        expect(nmse(await gain.float32(), fallen)).toBeLessThan(1e-9);
      });
    }
    it('groups whose codes are all zero, zero columns and weights that are not finite keep their scales', async () => {
      using s = new Scope(device());
      const { h, grid } = setup(s);
      const values = weights(50001, n, k);
      values[k + 3] = NaN;
      const codes = expected.i8('refit.codes');
      codes.fill(0, 0, group);
      const w = s.from('f32', [n, k], values);
      const symmetric = { scale: grid.scale, low: -8, high: 7, group };
      const stored = s.from('i8', [n, k], codes);
      const fitted = await scaleRefit(s, stored, w, h, symmetric).float32();
      const scale = expected.f32('refit.scale');
      expect(fitted[0]).toBe(scale[0]);
      expect(fitted.subarray(5, 10)).toEqual(scale.subarray(5, 10));
      expect(fitted[1]).not.toBe(scale[1]);
      const zero = s.from('f32', [k, k], new Float32Array(k * k));
      expect(await scaleRefit(s, stored, w, zero, symmetric).float32()).toEqual(scale);
      expect([...(await codeDescent(s, stored, w, zero, symmetric).changed.int32())]).toEqual([0, 0, 0, 0, 0, 0]);
      expect(await stored.int8()).toEqual(codes);
      codeDescent(s, stored, w, h, symmetric);
      expect((await stored.int8()).every((v) => v >= -8 && v <= 7)).toBe(true);
    });
    it('takes experts', async () => {
      using s = new Scope(device());
      const { w, h, codes, grid } = setup(s);
      const twice = async (t: Tensor) => Uint8Array.from([...(await t.bytesOut()), ...(await t.bytesOut())]);
      const pair: Grid = {
        ...grid,
        scale: s.from('f32', [2, n, 5], await twice(grid.scale)),
        zero: s.from('f32', [2, n, 5], await twice(grid.zero)),
      };
      const w2 = s.from('f32', [2, n, k], await twice(w));
      const h2 = s.from('f32', [2, k, k], await twice(h));
      const codes2 = s.from('i8', [2, n, k], await twice(codes));
      const one = await scaleRefit(s, codes, w, h, grid).float32();
      expect(await scaleRefit(s, codes2, w2, h2, pair).at(1).float32()).toEqual(one);
      codeDescent(s, codes2, w2, h2, pair);
      expect(await codes2.at(1).int8()).toEqual(expected.i8('refit.descended'));
    });
  });
});
