import { expect, test } from 'vitest';
import { openDevice } from '../../src/backend/load.js';
import { gemm, groupedGemm, matmulT } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { bytesOf, expectClose, floatDTypes, onDevices, rounded, strided, tensor, type Values } from './support.js';

const product = (a: Values, b: Values, m: number, n: number, k: number, transposed = false): Values => {
  const c = new Float64Array(m * n);
  for (let i = 0; i < m; i++)
    for (let j = 0; j < n; j++) {
      let sum = 0;
      for (let p = 0; p < k; p++) sum += a[i * k + p]! * b[transposed ? j * k + p : p * n + j]!;
      c[i * n + j] = sum;
    }
  return c;
};

onDevices('gemm', (device, random) => {
  // Around the edges of the micro-kernels (6 or 14 rows; 8, 16 or 32 columns) and of the blocks (256 deep).
  const shapes: [number, number, number][] = [
    [1, 1, 1], [1, 5, 300], [2, 33, 7], [3, 17, 257], [4, 64, 64], [5, 31, 100], [7, 16, 8], [13, 15, 255], [14, 32, 256], [29, 65, 513], [150, 97, 40],
  ]; // prettier-ignore
  for (const dtype of floatDTypes) {
    for (const [m, n, k] of shapes) {
      test(`${dtype} ${m} x ${n} x ${k}, every layout`, async () => {
        using s = new Scope(device());
        const a = rounded(dtype, random.normals(m * k));
        const b = rounded(dtype, random.normals(k * n));
        const expected = product(a, b, m, n, k);
        for (const orderA of [
          [0, 1],
          [1, 0],
        ]) {
          for (const orderB of [
            [0, 1],
            [1, 0],
          ]) {
            const x = tensor(s, dtype, [m, k], a, { order: orderA, pad: 3 });
            const y = tensor(s, dtype, [k, n], b, { order: orderB, pad: 1 });
            await expectClose(gemm(s, x, y), expected);
            await expectClose(gemm(s, x, y, { dtype: 'f32' }), expected);
            const out = strided(s, 'f32', [m, n], { order: orderA, pad: 2 });
            await expectClose(gemm(s, x, y, { out }), expected);
          }
        }
      });
    }
  }

  test('alpha, beta and bias, mixed dtypes', async () => {
    using s = new Scope(device());
    const [m, n, k] = [37, 50, 300];
    const a = rounded('bf16', random.normals(m * k));
    const b = rounded('f16', random.normals(k * n));
    const bias = rounded('f32', random.normals(n));
    const before = rounded('bf16', random.normals(m * n, 20));
    const ab = product(a, b, m, n, k);
    for (const [alpha, beta] of [
      [1, 0],
      [1, 1],
      [-0.5, 2],
      [0, 1],
    ] as const) {
      for (const dtype of floatDTypes) {
        const out = tensor(s, dtype, [m, n], before, { pad: 5 });
        gemm(s, tensor(s, 'bf16', [m, k], a), tensor(s, 'f16', [k, n], b), { out, alpha, beta, bias: tensor(s, 'f32', [n], bias) }); // prettier-ignore
        await expectClose(out, ab.map((v, i) => alpha * v + beta * before[i]! + bias[i % n]!)); // prettier-ignore
      }
    }
  });

  for (const [m, n, k] of [
    [9, 512, 512],
    [45, 530, 601],
    [33, 70, 131],
  ] as const)
    test(`three products of bf16 parts, ${m} x ${n} x ${k}: within 2^-16 of the terms`, async () => {
      using s = new Scope(device());
      const a = rounded('f32', random.normals(m * k));
      const b = rounded('f32', random.normals(k * n));
      const before = rounded('f32', random.normals(m * n));
      const expected = product(a, b, m, n, k);
      const terms = product(a.map(Math.abs), b.map(Math.abs), m, n, k);
      for (const orderA of [[0, 1], [1, 0]])
        for (const orderB of [[0, 1], [1, 0]]) {
          const x = tensor(s, 'f32', [m, k], a, { order: orderA, pad: 3 });
          const y = tensor(s, 'f32', [k, n], b, { order: orderB, pad: 1 });
          const plain = await gemm(s, x, y, { fast: 'split' }).float32();
          const out = gemm(s, x, y, { fast: 'split', alpha: -0.5, beta: 2, out: tensor(s, 'f32', [m, n], before) });
          const scaled = await out.float32();
          let worst = 0; // error by its bound
          for (let i = 0; i < m * n; i++) {
            const want = 2 * before[i]! - 0.5 * expected[i]!;
            const errors = [
              Math.abs(plain[i]! - expected[i]!) / terms[i]!,
              Math.abs(scaled[i]! - want) / (terms[i]! + Math.abs(before[i]!)),
            ].map((e) => (Number.isNaN(e) ? Infinity : e));
            worst = Math.max(worst, ...errors);
          }
          expect(worst).toBeLessThan(2 ** -16);
        }
    }); // prettier-ignore

  test('batches, shared operands, empty dimensions', async () => {
    using s = new Scope(device());
    const [e, m, n, k] = [5, 9, 21, 30];
    const a = rounded('f32', random.normals(e * m * k));
    const b = rounded('f32', random.normals(k * n));
    const expected = new Float64Array(e * m * n);
    for (let i = 0; i < e; i++) expected.set(product(a.subarray(i * m * k, (i + 1) * m * k), b, m, n, k), i * m * n);
    const c = gemm(s, tensor(s, 'f32', [e, m, k], a), tensor(s, 'f32', [1, k, n], b));
    await expectClose(c, expected);
    const none = gemm(s, s.empty('f32', [3, 0]), s.empty('f32', [0, 4]), { bias: tensor(s, 'f32', [4], [1, 2, 3, 4]) });
    await expectClose(none, [1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4]);
    expect(gemm(s, s.empty('f32', [0, 5]), s.empty('f32', [5, 4])).shape).toEqual([0, 4]);
    await device().sync();
  });

  test('sizes beyond one block; the same bytes twice', async () => {
    using s = new Scope(device());
    for (const [m, n, k] of [
      [1030, 20, 330],
      [9, 4200, 33],
    ] as const) {
      const a = rounded('bf16', random.normals(m * k));
      const b = rounded('bf16', random.normals(k * n));
      const [x, w] = [tensor(s, 'bf16', [m, k], a), tensor(s, 'bf16', [k, n], b, { order: [1, 0] })];
      const y = gemm(s, x, w, { dtype: 'f32' });
      const z = matmulT(s, x, w.transpose());
      const expected = product(a, b, m, n, k);
      await expectClose(y, expected);
      await expectClose(z, expected);
      expect(await bytesOf(gemm(s, x, w, { dtype: 'f32' }))).toEqual(await bytesOf(y));
    }
  });

  // So long that k is cut; either operand with fewer lines.
  for (const [m, n, k] of [
    [70, 45, 9000],
    [45, 70, 9000],
  ] as const)
    test(`bf16 ${m} x ${n} x ${k}: the same bytes with any number of threads, and for any number of rows`, async () => {
      if (device().kind !== 'cpu') return;
      const a = rounded('bf16', random.normals(m * k));
      const b = rounded('bf16', random.normals(n * k));
      // All rows, then the last 20 of them.
      const run = async (threads: number): Promise<Buffer[]> => {
        const one = openDevice({ kind: 'cpu', threads });
        try {
          using s = new Scope(one);
          const [x, w] = [tensor(s, 'bf16', [m, k], a), tensor(s, 'bf16', [n, k], b).transpose()];
          const bytes = [];
          for (const dtype of floatDTypes) {
            const y = gemm(s, x, w, { dtype });
            bytes.push(await bytesOf(y), await bytesOf(gemm(s, x.slice(0, m - 20, m), w, { dtype })));
            if (threads === 1 && dtype === 'bf16') await expectClose(y, product(a, b, m, n, k, true));
          }
          return bytes;
        } finally {
          one.close();
        }
      };
      const bytes = await run(1);
      for (let i = 0; i < bytes.length; i += 2) expect(bytes[i]!.subarray(-bytes[i + 1]!.length)).toEqual(bytes[i + 1]);
      expect(await run(3)).toEqual(bytes);
    });

  test('grouped: rows sorted by expert, some experts without rows', async () => {
    using s = new Scope(device());
    const [n, k] = [19, 45];
    const offsets = [0, 0, 7, 8, 8, 40];
    const e = offsets.length - 1;
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, random.normals(40 * k));
      const w = rounded(dtype, random.normals(e * n * k));
      const expected = new Float64Array(40 * n);
      for (let g = 0; g < e; g++)
        for (let r = offsets[g]!; r < offsets[g + 1]!; r++)
          for (let j = 0; j < n; j++)
            for (let p = 0; p < k; p++) expected[r * n + j]! += x[r * k + p]! * w[(g * n + j) * k + p]!;
      const y = groupedGemm(s, tensor(s, dtype, [40, k], x), tensor(s, dtype, [e, n, k], w), tensor(s, 'i32', [e + 1], offsets)); // prettier-ignore
      await expectClose(y, expected);
    }
  });
});
