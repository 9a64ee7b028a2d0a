import { expect, test } from 'vitest';
import { dtypeCode, type DType } from '../../src/base/dtype.js';
import {
  cast,
  copyInto,
  decode,
  encodings,
  fill,
  gather,
  random,
  scatterAdd,
  type EncodingName,
} from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { fixture } from './quant-cases.js';
import {
  bytesOf,
  expectClose,
  expectSame,
  floatDTypes,
  onDevices,
  rounded,
  strided,
  tensor,
  valuesOf,
} from './support.js';

const known = fixture('layers');
const bits = async (t: Tensor): Promise<Uint32Array> => new Uint32Array((await t.float32()).buffer);

onDevices('copy', (device, rng) => {
  test('rounds as PyTorch and ml_dtypes do', async () => {
    using s = new Scope(device());
    const x = known.f32('copy/x');
    const source = tensor(s, 'f32', [x.length], x);
    for (const dtype of ['bf16', 'f16', 'f8_e4m3', 'f8_e5m2'] as const) {
      const back = cast(s, cast(s, source, dtype), 'f32');
      expect(await bits(back), dtype).toEqual(new Uint32Array(known.f32(`copy/${dtype}`).buffer));
    }
  });

  test('every bf16, f16 and f8 value survives the way through f32', async () => {
    using s = new Scope(device());
    const all = Uint16Array.from({ length: 65536 }, (_, i) => i);
    const nan = { bf16: (i: number) => (i & 0x7fff) > 0x7f80, f16: (i: number) => (i & 0x7fff) > 0x7c00 };
    for (const dtype of ['bf16', 'f16'] as const) {
      const t = s.from(dtype, [65536], all);
      const back = new Uint16Array((await cast(s, cast(s, t, 'f32'), dtype).bytesOut()).buffer);
      const wrong = Array.from(back).filter((b, i) => (nan[dtype](i) ? !nan[dtype](b) : b !== i));
      expect(wrong, dtype).toEqual([]);
      expect(await valuesOf(cast(s, t, 'f32'))).toEqual(await valuesOf(t));
    }
    for (const dtype of ['f8_e4m3', 'f8_e5m2'] as const) {
      const t = s.from(dtype, [256], new Uint8Array(all.slice(0, 256)));
      for (const through of ['f32', 'f64', 'f16'] as const) {
        const back = await cast(s, cast(s, t, through), dtype).bytesOut();
        const special = (i: number) => (i & 0x7f) > (dtype === 'f8_e4m3' ? 0x7e : 0x7c);
        expect(
          Array.from(back).filter((b, i) => (special(i) ? !special(b) : b !== i)),
          dtype,
        ).toEqual([]);
      }
    }
  });

  test('one rounding only, also from doubles and 64-bit integers', async () => {
    using s = new Scope(device());
    // Just above the middle between two bf16 (f16): rounding to fp32 first would end at the middle, and then at 1.
    const doubles = tensor(s, 'f64', [3], [1 + 2 ** -8 + 2 ** -40, 1 + 2 ** -11 + 2 ** -40, -1 - 2 ** -8 - 2 ** -45]);
    await expectSame(cast(s, doubles, 'bf16'), [1 + 2 ** -7, 1, -1 - 2 ** -7]);
    await expectSame(cast(s, doubles, 'f16'), [1 + 2 ** -8, 1 + 2 ** -10, -1 - 2 ** -8]);
    const big = s.from(
      'i64',
      [3],
      BigInt64Array.of(2n ** 62n + 2n ** 38n + 1n, -(2n ** 62n) - 2n ** 38n - 1n, 2n ** 63n - 1n),
    );
    await expectSame(cast(s, big, 'f32'), [2 ** 62 + 2 ** 39, -(2 ** 62) - 2 ** 39, 2 ** 63]);
    const out = cast(s, big, 'i64');
    expect(new BigInt64Array((await out.bytesOut()).buffer)[2]).toBe(2n ** 63n - 1n);
  });

  test('integers saturate, halves go to even, and what happened is counted', async () => {
    using s = new Scope(device());
    const counts = s.zeros('i64', [2]);
    const values = [0.5, 1.5, 2.5, -0.5, -1.5, 200, -200, 1e30, NaN, Infinity, -Infinity, 126.5];
    const t = tensor(s, 'f32', [values.length], values);
    await expectSame(cast(s, t, 'i8', counts), [0, 2, 2, 0, -2, 127, -128, 127, 0, 127, -128, 126]);
    await expectSame(counts, [3, 3]);
    await expectSame(cast(s, t, 'u8', counts), [0, 2, 2, 0, 0, 200, 0, 255, 0, 255, 0, 126]);
    await expectSame(counts, [3 + 3, 6]); // -1.5, -200, 1e30
    await expectSame(cast(s, t, 'bool'), values.map((v) => +(v !== 0))); // prettier-ignore
    const wide = tensor(s, 'i32', [4], [300, -300, 7, -1]);
    await expectSame(cast(s, wide, 'u8'), [255, 0, 7, 0]);
    await expectSame(cast(s, wide, 'i16'), [300, -300, 7, -1]);
    const more = s.zeros('i64', [2]);
    const large = tensor(s, 'f32', [5], [1e5, 65504, -7e4, Infinity, 3]);
    await expectSame(cast(s, large, 'f16', more), [Infinity, 65504, -Infinity, Infinity, 3]);
    await expectSame(more, [2, 1]);
    cast(s, large, 'f8_e5m2', more);
    await expectSame(more, [2 + 3, 2]);
    cast(s, tensor(s, 'f32', [6], [448, 460, 464, 465, NaN, -1e4]), 'f8_e4m3', more);
    await expectSame(more, [5 + 2, 3]);
    cast(s, tensor(s, 'bf16', [2], [NaN, 1]), 'bf16', more);
    await expectSame(more, [7, 4]);
  });

  test('any strides: transposes, permutations, broadcasts, padded rows', async () => {
    using s = new Scope(device());
    const shapes: [number[], number[][]][] = [
      [[130, 77], [[0, 1], [1, 0]]],
      [[5, 70, 66], [[0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]]],
      [[3, 4, 5, 6], [[0, 1, 2, 3], [3, 1, 0, 2], [2, 0, 3, 1], [0, 2, 1, 3]]],
      [[1, 9, 1, 2], [[3, 2, 1, 0]]],
    ]; // prettier-ignore
    for (const [shape, orders] of shapes) {
      const n = shape.reduce((a, b) => a * b);
      for (const [from, to] of [
        ['f32', 'f32'],
        ['bf16', 'f32'],
        ['f32', 'f16'],
        ['i8', 'i8'],
        ['i64', 'i32'],
        ['u8', 'f32'],
      ] as [DType, DType][]) {
        const values = Array.from({ length: n }, () => rng.integer(0, 100));
        for (const a of orders)
          for (const b of [orders[0]!, orders.at(-1)!]) {
            const dst = strided(s, to, shape, { order: b, pad: 2 });
            copyInto(dst, tensor(s, from, shape, values, { order: a, pad: 1 }));
            await expectSame(dst, values);
          }
      }
    }
    const row = tensor(s, 'f32', [1, 3], [1, 2, 3]);
    await expectSame(cast(s, row.expand(2, 4, 3), 'bf16'), new Array(8).fill([1, 2, 3]).flat());
    copyInto(s.empty('f32', [0, 3]), s.empty('bf16', [0, 3]));
    await device().sync();
  });

  test('nothing outside the view is written', async () => {
    using s = new Scope(device());
    const dst = strided(s, 'f32', [6, 5], { order: [1, 0], pad: 3 });
    copyInto(dst, tensor(s, 'f32', [6, 5], rng.normals(30)));
    const raw = new Uint8Array(dst.storage.bytes);
    await device().download(dst.buffer, 0, raw);
    const outside = Array.from(new Uint32Array(raw.buffer)).filter((u) => u === 0xffffffff).length;
    expect(outside).toBe(raw.length / 4 - 30);
  });
});

onDevices('fill and random', (device) => {
  test('fill of every dtype and stride', async () => {
    using s = new Scope(device());
    for (const dtype of Object.keys(dtypeCode) as DType[]) {
      const t = strided(s, dtype, [3, 7], { order: [1, 0], pad: 2 });
      fill(t, 1);
      await expectSame(dtype.startsWith('f8') ? cast(s, t, 'f32') : t, new Array(21).fill(1));
    }
    const t = s.empty('i8', [2]);
    fill(t, 1000);
    await expectSame(t, [127, 127]);
  });

  test('Philox4x32-10: known answers, uniform', async () => {
    using s = new Scope(device());
    // Random123's test vectors for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    const t = s.empty('f32', [6]);
    random(t, 'uniform', 0, 0, 1);
    const words = [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8];
    expect(Array.from(await t.float32()).slice(0, 4)).toEqual(words.map((w) => (w >>> 8) / 2 ** 24));
    const long = s.empty('f32', [3, 1001]);
    random(long, 'uniform', 2 ** 40 + 17, -2, 3);
    const view = strided(s, 'f32', [3, 1001], { order: [1, 0] });
    random(view, 'uniform', 2 ** 40 + 17, -2, 3);
    const values = await valuesOf(long);
    expect(await valuesOf(view)).toEqual(values);
    expect(Math.min(...values)).toBeGreaterThanOrEqual(-2);
    expect(Math.max(...values)).toBeLessThanOrEqual(3);
    expect(new Set(values).size).toBeGreaterThan(2990);
    random(long, 'uniform', 17, -2, 3);
    expect(await valuesOf(long)).not.toEqual(values);
  });

  test('normal numbers have the moments asked for', async () => {
    using s = new Scope(device());
    const n = 100_000;
    const t = s.empty('f32', [n]);
    random(t, 'normal', 5, 3, 2);
    const x = await t.float32();
    const mean = x.reduce((a, b) => a + b, 0) / n;
    const moment = (k: number) => x.reduce((a, b) => a + ((b - mean) / 2) ** k, 0) / n;
    expect(Math.abs(mean - 3)).toBeLessThan(5 * (2 / Math.sqrt(n)));
    expect(Math.abs(moment(2) - 1)).toBeLessThan(0.03);
    expect(Math.abs(moment(3))).toBeLessThan(0.05);
    expect(Math.abs(moment(4) - 3)).toBeLessThan(0.15);
    const half = s.empty('bf16', [1001]);
    random(half, 'normal', 5, 3, 2);
    expect(await valuesOf(half)).toEqual(rounded('bf16', x.subarray(0, 1001)));
  });
});

onDevices('gather and scatter_add', (device, rng) => {
  test('rows and columns, -1 gives zeros', async () => {
    using s = new Scope(device());
    for (const dtype of [...floatDTypes, 'i8', 'i32'] as DType[]) {
      const x = Array.from({ length: 9 * 13 }, () => rng.integer(-50, 50));
      for (const order of [
        [0, 1],
        [1, 0],
      ]) {
        const t = tensor(s, dtype, [9, 13], x, { order, pad: 2 });
        const rows = [8, 0, -1, 3, 3];
        const picked = gather(s, t, tensor(s, 'i32', [5], rows), 0, 'f32');
        await expectSame(
          picked,
          rows.flatMap((r) => (r < 0 ? new Array<number>(13).fill(0) : x.slice(r * 13, r * 13 + 13))),
        );
        const columns = [12, -1, 0, 0, 7, 1];
        await expectSame(
          gather(s, t, tensor(s, 'i32', [6], columns), 1),
          x.flatMap((_, i) => (i % 13 ? [] : columns.map((c) => (c < 0 ? 0 : x[i + c]!)))),
        );
      }
    }
    gather(s, s.zeros('f32', [4, 2]), tensor(s, 'i32', [2], [0, 4]));
    if (device().kind === 'cpu') await expect(device().sync()).rejects.toThrow('idx[1] = 4');
    else await device().sync();
  });

  test('scatter_add sums duplicates in fp32 and rounds once', async () => {
    using s = new Scope(device());
    const [rows, columns, n] = [7, 19, 40];
    for (const dtype of floatDTypes) {
      const before = rounded(dtype, rng.normals(rows * columns));
      const src = rounded('bf16', rng.normals(n * columns));
      const w = rounded('f32', rng.normals(n));
      const idx = Array.from({ length: n }, () => rng.integer(-1, rows - 2)); // the last row is never hit
      const expected = Float64Array.from(before);
      idx.forEach((r, j) => {
        if (r >= 0) for (let c = 0; c < columns; c++) expected[r * columns + c]! += w[j]! * src[j * columns + c]!;
      });
      const dst = tensor(s, dtype, [rows, columns], before, { pad: 1 });
      scatterAdd(
        dst,
        tensor(s, 'bf16', [n, columns], src, { order: [1, 0] }),
        tensor(s, 'i32', [n], idx),
        tensor(s, 'f32', [n], w),
      );
      await expectClose(dst, expected);
      const plain = tensor(s, dtype, [2, 2], [1, 2, 3, 4]);
      scatterAdd(plain, tensor(s, dtype, [3, 2], [1, 1, 2, 2, 4, 4]), tensor(s, 'i32', [3], [1, -1, 1]));
      await expectSame(plain, [1, 2, 8, 9]);
    }
  });
});

onDevices('decode', (device) => {
  const blocks = (Object.keys(encodings) as EncodingName[]).filter((name) => !name.startsWith('f'));
  test.each(blocks)('%s: the bits of gguf-py', async (name) => {
    using s = new Scope(device());
    const [rows, width] = known.shape(`decode/${name}/y`) as [number, number];
    const stored = s.from('u8', [known.u8(`decode/${name}/src`).length], known.u8(`decode/${name}/src`));
    const expected = new Uint32Array(known.f32(`decode/${name}/y`).buffer);
    expect(await bits(decode(s, stored, name, [rows, width], 'f32'))).toEqual(expected);
    const half = decode(s, stored, name, [rows, width], 'bf16');
    await expectSame(half, rounded('bf16', known.f32(`decode/${name}/y`)));
  });

  test('FP8 with scales per block of rows and columns', async () => {
    using s = new Scope(device());
    const stored = s.from('u8', [8 * 37], known.u8('decode/f8_e4m3/src'));
    await expectSame(decode(s, stored, 'f8_e4m3', [8, 37], 'f32'), known.f32('decode/f8_e4m3/plain'));
    const scale = tensor(s, 'f32', [3, 5], known.f32('decode/f8_e4m3/scale'));
    await expectSame(
      decode(s, stored, 'f8_e4m3', [8, 37], 'f32', { scale, block: [3, 8] }),
      known.f32('decode/f8_e4m3/y'),
    );
  });

  test('FP4 with E8M0 scales per row and 32 columns', async () => {
    using s = new Scope(device());
    const stored = s.from('u8', [3 * 48], known.u8('decode/f4_e2m1/src'));
    const scale = s.from('u8', [3, 3], known.u8('decode/f4_e2m1/scale'));
    await expectSame(
      decode(s, stored, 'f4_e2m1', [3, 96], 'f32', { scale, block: [1, 32] }),
      known.f32('decode/f4_e2m1/y'),
    );
  });

  test('refuses sizes that do not fit', async () => {
    using s = new Scope(device());
    decode(s, s.zeros('u8', [17]), 'q4_0', [1, 32], 'f32');
    if (device().kind === 'cpu') await expect(device().sync()).rejects.toThrow('17 bytes');
    else
      await device()
        .sync()
        .catch(() => undefined);
  });

  test('the same bytes twice', async () => {
    using s = new Scope(device());
    const stored = s.from('u8', [known.u8('decode/q4_k/src').length], known.u8('decode/q4_k/src'));
    const [rows, width] = known.shape('decode/q4_k/y') as [number, number];
    const a = decode(s, stored, 'q4_k', [rows, width], 'f16');
    expect(await bytesOf(decode(s, stored, 'q4_k', [rows, width], 'f16'))).toEqual(await bytesOf(a));
  });
});
