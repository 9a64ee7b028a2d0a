import { describe, expect, it } from 'vitest';
import { cholesky, choleskySolve, hessianAdd, symmetrize } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { activations, gram, nmse, noise } from './quant-cases.js';
import { onDevices, rounded, tensor } from './support.js';

onDevices('linear algebra', (device, random) => {
  const lower = (h: ArrayLike<number>, k: number, fill = 0) =>
    Float64Array.from(h, (v, i) => (i % k <= Math.floor(i / k) ? v : fill));
  const toBf16 = (x: Float32Array) => Uint16Array.from(new Uint32Array(Float32Array.from(x).buffer), (u) => u >>> 16);

  describe('hessian_add', () => {
    for (const [t, k] of [
      [1, 1],
      [3, 5],
      [70, 33],
      [300, 130],
      [1025, 64],
      [40, 257],
    ] as const) {
      it(`adds alpha X'X to the lower triangle, X [${t}, ${k}]`, async () => {
        using s = new Scope(device());
        const x = activations(t + k, t, k);
        const start = noise(5, k * k);
        const h = s.from('f32', [k, k], start);
        hessianAdd(h, s.from('f32', [t, k], x), { alpha: 0.5 });
        const expected = lower(
          gram(x, k).map((v, i) => 0.5 * v + start[i]!),
          k,
        );
        const got = await h.float32();
        expect(nmse(lower(got, k), expected)).toBeLessThan(1e-12);
      });
    }
    for (const [t, k] of [
      [1, 3],
      [31, 33],
      [4400, 70],
      [45, 300],
      [130, 530],
    ] as const) {
      it(`takes bf16 rows of a wider matrix, X [${t}, ${k}]`, async () => {
        using s = new Scope(device());
        const x = rounded('bf16', random.normals(t * k));
        const start = random.normals(k * k);
        const h = s.from('f32', [k, k], Float32Array.from(start));
        hessianAdd(h, tensor(s, 'bf16', [t, k], x, { pad: 5 }), { alpha: 0.5 });
        const got = await h.float32();
        const expected = gram(Float32Array.from(x), k).map((v, i) => 0.5 * v + Math.fround(start[i]!));
        expect(nmse(lower(got, k), lower(expected, k))).toBeLessThan(1e-12);
      });
    }
    it('takes bf16, row weights, and rows of a wider matrix', async () => {
      using s = new Scope(device());
      const [t, k] = [90, 40];
      const x = activations(3, t, k).map((v) => Math.sign(v) * Math.min(Math.abs(v), 127)); // exact in bf16
      const weight = noise(9, t).map((v) => Math.abs(v) / 512);
      const wide = new Float32Array(t * (k + 7));
      x.forEach((v, i) => (wide[Math.floor(i / k) * (k + 7) + 3 + (i % k)] = v));
      const view = s.from('bf16', [t, k + 7], toBf16(wide)).slice(1, 3, 3 + k);
      const h = s.from('f32', [k, k], new Float32Array(k * k));
      hessianAdd(h, view, { rowWeight: s.from('f32', [t], weight) });
      const scaled = x.map((v, i) => v * Math.sqrt(weight[Math.floor(i / k)]!));
      expect(nmse(lower(await h.float32(), k), lower(gram(scaled, k), k))).toBeLessThan(1e-12);
    });
    for (const dtype of ['f32', 'bf16'] as const)
      it(`keeps experts apart, also those without rows, ${dtype}`, async () => {
        using s = new Scope(device());
        const [t, k, offsets] = [100, 24, Int32Array.of(0, 37, 37, 38, 100)];
        const x = Float32Array.from(rounded(dtype, activations(4, t, k)));
        const h = s.from('f32', [4, k, k], new Float32Array(4 * k * k));
        hessianAdd(h, tensor(s, dtype, [t, k], x), { offsets: s.from('i32', [5], offsets) });
        const got = await h.float32();
        for (let e = 0; e < 4; e++) {
          const expected = lower(gram(x.subarray(offsets[e]! * k, offsets[e + 1]! * k), k), k);
          expect(nmse(lower(got.subarray(e * k * k, (e + 1) * k * k), k), expected)).toBeLessThan(1e-12);
        }
      });
  });

  it('symmetrize mirrors the lower triangle, batched', async () => {
    using s = new Scope(device());
    const k = 77;
    const h = s.from('f32', [2, k, k], noise(1, 2 * k * k));
    symmetrize(h);
    const [got, start] = [await h.float32(), noise(1, 2 * k * k)];
    for (let i = 0; i < got.length; i++) {
      const [e, r, c] = [Math.floor(i / (k * k)), Math.floor(i / k) % k, i % k];
      expect(got[i]).toBe(start[e * k * k + Math.max(r, c) * k + Math.min(r, c)]);
    }
  });

  /** Full damped matrix from a lower triangle, float64. */
  function damped(h: ArrayLike<number>, k: number, damp: number): Float64Array {
    let trace = 0;
    for (let i = 0; i < k; i++) trace += h[i * k + i]!;
    return Float64Array.from({ length: k * k }, (_, i) => {
      const [r, c] = [Math.floor(i / k), i % k];
      return h[Math.max(r, c) * k + Math.min(r, c)]! + (r === c ? (damp * trace) / k : 0);
    });
  }
  function product(f: ArrayLike<number>, k: number): Float64Array {
    const a = new Float64Array(k * k);
    for (let i = 0; i < k; i++)
      for (let j = 0; j < k; j++) for (let p = 0; p < k; p++) a[i * k + j]! += f[i * k + p]! * f[j * k + p]!;
    return a;
  }

  describe('cholesky', () => {
    for (const k of [1, 2, 31, 64, 65, 128, 200, 301]) {
      for (const reversed of [false, true]) {
        it(`A = F F', K = ${k}, ${reversed ? 'reversed (upper)' : 'lower'}`, async () => {
          using s = new Scope(device());
          const h = gram(activations(k, 2 * k, k), k);
          const garbageAbove = Float32Array.from(lower(h, k, NaN));
          const { factor, info } = cholesky(s, s.from('f32', [k, k], garbageAbove), 0.01, reversed);
          expect([...(await info.int32())]).toEqual([0]);
          const f = await factor.float32();
          expect(nmse(product(f, k), damped(h, k, 0.01))).toBeLessThan(1e-11);
          for (let i = 0; i < k * k; i++) {
            const [r, c] = [Math.floor(i / k), i % k];
            if (reversed ? c < r : c > r) expect(f[i]).toBe(0);
            if (r === c) expect(f[i]).toBeGreaterThan(0);
          }
        });
      }
    }
    it('reports the first pivot that is not positive, per matrix of a batch', async () => {
      using s = new Scope(device());
      const k = 100;
      const good = gram(activations(1, 200, k), k);
      const batch = new Float32Array(4 * k * k);
      for (let e = 0; e < 4; e++) batch.set(good, e * k * k);
      batch[k * k + 70 * k + 70] = -1;
      batch[2 * k * k + 3 * k + 3] = NaN;
      const h = s.from('f32', [4, k, k], batch);
      expect([...(await cholesky(s, h, 0).info.int32())]).toEqual([0, 71, 4, 0]);
      expect([...(await cholesky(s, h, 0, true).info.int32())]).toEqual([0, 71, 4, 0]);
      const { factor } = cholesky(s, h, 0);
      expect(nmse(product(await factor.at(3).float32(), k), good)).toBeLessThan(1e-11);
    });
    it('factors a rank-1 matrix once it is damped, and says that it cannot without', async () => {
      using s = new Scope(device());
      const k = 90;
      const h = s.from('f32', [k, k], Float32Array.from(gram(activations(2, 1, k), k)));
      expect((await cholesky(s, h, 0).info.int32())[0]).toBeGreaterThan(0);
      expect([...(await cholesky(s, h, 0.01, true).info.int32())]).toEqual([0]);
      const zero = s.from('f32', [k, k], new Float32Array(k * k));
      expect([...(await cholesky(s, zero, 0.01).info.int32())]).toEqual([1]);
      expect([...(await cholesky(s, zero, 0.01, true).info.int32())]).toEqual([k]);
    });
  });

  describe('cholesky_solve', () => {
    for (const [k, m] of [
      [1, 1],
      [50, 3],
      [130, 70],
      [330, 5],
    ] as const) {
      it(`A X = B, K = ${k}, ${m} columns, from either factor`, async () => {
        using s = new Scope(device());
        const h = gram(activations(k, 2 * k, k), k);
        const a = damped(h, k, 0.1);
        const x = noise(7, k * m);
        const b = new Float32Array(k * m);
        for (let i = 0; i < k; i++)
          for (let j = 0; j < m; j++) {
            let sum = 0;
            for (let p = 0; p < k; p++) sum += a[i * k + p]! * x[p * m + j]!;
            b[i * m + j] = sum;
          }
        for (const reversed of [false, true]) {
          const { factor } = cholesky(s, s.from('f32', [k, k], Float32Array.from(h)), 0.1, reversed);
          const got = await choleskySolve(s, factor, s.from('f32', [k, m], b), reversed).float32();
          expect(nmse(got, x)).toBeLessThan(1e-8);
        }
      });
    }
    for (const reversed of [false, true])
      it(`a large factor, many columns, ${reversed ? 'upper' : 'lower'}`, async () => {
        using s = new Scope(device());
        // The same few columns over and over: their products with F F' are cheap to know.
        const [k, m, few] = [1100, 272, 4];
        const f = new Float32Array(k * k);
        const [x, y, b] = [noise(8, k * few), new Float64Array(k * few), new Float64Array(k * few)];
        const draws = noise(6, k * k);
        const size = Math.hypot(...draws.subarray(0, k));
        for (let i = 0; i < k; i++) {
          const [from, to] = reversed ? [i + 1, k] : [0, i];
          for (let j = from; j < to; j++) f[i * k + j] = draws[i * k + j]! / size / 2;
          f[i * k + i] = 1 + i / k;
        }
        for (let i = 0; i < k * k; i++) {
          const [r, c] = [Math.floor(i / k), i % k];
          if (f[i] !== 0) for (let j = 0; j < few; j++) y[c * few + j]! += f[i]! * x[r * few + j]!;
        }
        for (let i = 0; i < k * k; i++) {
          const [r, c] = [Math.floor(i / k), i % k];
          if (f[i] !== 0) for (let j = 0; j < few; j++) b[r * few + j]! += f[i]! * y[c * few + j]!;
        }
        const spread = (v: ArrayLike<number>) =>
          Float32Array.from({ length: k * m }, (_, i) => v[Math.floor(i / m) * few + (i % few)]!);
        const right = s.from('f32', [k, m], spread(b));
        const got = await choleskySolve(s, s.from('f32', [k, k], f), right, reversed).float32();
        expect(nmse(got, spread(x))).toBeLessThan(1e-9);
      });
    it('of several matrices at once', async () => {
      using s = new Scope(device());
      const [n, k, m] = [3, 70, 9];
      const h = s.zeros('f32', [n, k, k]);
      for (let e = 0; e < n; e++) hessianAdd(h.at(e), s.from('f32', [2 * k, k], activations(e, 2 * k, k)));
      const b = s.from('f32', [n, k, m], noise(7, n * k * m));
      const { factor } = cholesky(s, h, 0.1);
      const all = await choleskySolve(s, factor, b).float32();
      for (let e = 0; e < n; e++) {
        const one = await choleskySolve(s, factor.at(e), b.at(e)).float32();
        expect([...all.subarray(e * k * m, (e + 1) * k * m)]).toEqual([...one]);
      }
    });
  });
});
