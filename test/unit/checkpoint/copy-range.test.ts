import { closeSync, mkdtempSync, openSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, expect, it } from 'vitest';
import { openDevice } from '../../../src/backend/load.js';
import type { DType } from '../../../src/base/dtype.js';

const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
const device = openDevice({ kind: 'cpu' });
afterAll(() => {
  device.close();
  rmSync(folder, { recursive: true, force: true });
});

const nothing: Record<string, number[]> = {
  bf16: [0x7f80, 0xff80, 0x7fc1], // infinite, negative infinite, not a number
  f16: [0x7c00, 0xfc00, 0x7e01],
};

it.each(['bf16', 'f16'] as const)('copies any span of bytes, and counts what is not finite in %s', async (dtype) => {
  const values = Uint16Array.from({ length: 200_001 }, (_, i) => (i * 7) % 0x7b00);
  const odd = [3, 4095, 4096, 131072, 200_000].map((at, i) => ((values[at] = nothing[dtype]![i % 3]!), at));
  const [path, out] = [join(folder, `${dtype}-in`), join(folder, `${dtype}-out`)];
  writeFileSync(path, Buffer.concat([Buffer.from('head'), Buffer.from(values.buffer), Buffer.from('tail')]));
  writeFileSync(out, '');
  const [from, to] = [openSync(path, 'r'), openSync(out, 'r+')];
  const copy = (first: number, count: number, as: DType = dtype) =>
    device.copyRange({ fd: from, position: 4 + 2 * first }, { fd: to, position: 10 + 2 * first }, 2 * count, as);
  expect(await copy(0, values.length)).toBe(odd.length);
  expect(await copy(4, 4092)).toBe(1);
  expect(await copy(5, 1000)).toBe(0);
  expect(await copy(0, 200_000, 'u16')).toBe(0);
  expect(readFileSync(out).subarray(10).equals(Buffer.from(values.buffer))).toBe(true);
  await expect(copy(0, 300_000)).rejects.toThrow(/file ended before the tensor did/);
  closeSync(from);
  closeSync(to);
});

it('counts what is not finite in f32', async () => {
  const values = Float32Array.of(1, Infinity, 3e38, NaN, -Infinity, 1e-45);
  const path = join(folder, 'f32');
  writeFileSync(path, new Uint8Array(values.buffer));
  const fd = openSync(path, 'r+');
  expect(await device.copyRange({ fd, position: 0 }, { fd, position: 100 }, 24, 'f32')).toBe(3);
  closeSync(fd);
});
