import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import type { Device } from '../../src/backend/device.js';
import type { Group } from '../../src/backend/group.js';
import { joinDevices, openDevice } from '../../src/backend/load.js';
import type { DeviceKind } from '../../src/backend/types.js';
import { allGather, allReduce, cast, gather, partOf, reduceScatter } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { bytesOf, expectClose, expectSame, Random, valuesOf } from './support.js';

const dtypes = ['f32', 'bf16'] as const;
/** Also fewer elements than ranks, and last parts that are shorter or empty. */
const sizes = [1, 2, 3, 7, 64, 4097, 100_003];

/** The second GPU of this machine and those behind it, as long as there are any, up to four in all. */
function gpus(): Device[] {
  const found: Device[] = [];
  try {
    while (found.length < 4) found.push(openDevice({ kind: 'cuda', index: found.length, poison: true }));
  } catch {
    // no more
  }
  return found;
}

function suite(kind: DeviceKind, devices: readonly Device[]): void {
  describe(`collectives of ${devices.length} devices on ${kind}`, () => {
    const random = new Random();
    let group: Group;
    beforeAll(() => void (group = joinDevices(devices)));
    const scopes = devices.map((device) => new Scope(device));
    afterAll(() => {
      for (const scope of scopes) scope[Symbol.dispose]();
      for (const device of devices) device.close();
    });
    const ranks = devices.length;
    const drawn = (n: number) => scopes.map(() => Float32Array.from(random.normals(n)));
    /** Every rank's tensors from its values, in memory that held NaN. */
    const uploaded = (values: readonly (readonly Float32Array[])[], dtype: (typeof dtypes)[number]): Tensor[][] =>
      values.map((own, r) => own.map((v) => cast(scopes[r]!, scopes[r]!.from('f32', [v.length], v), dtype)));
    /** All sizes at once: rank -> size -> tensor, and the sums of their stored values in fp32, in the order of ranks. */
    const some = async (dtype: (typeof dtypes)[number]) => {
      const bySize = sizes.map(drawn);
      const x = uploaded(scopes.map((_, r) => bySize.map((values) => values[r]!)), dtype); // prettier-ignore
      const stored = await Promise.all(x.map((own) => Promise.all(own.map(valuesOf))));
      const sums = sizes.map((n, k) => Float32Array.from({ length: n }, (_, i) => stored.reduce((sum, own) => Math.fround(sum + own[k]![i]!), 0))); // prettier-ignore
      return { x, stored, sums };
    };
    /** Exact where sums are made in one order; NCCL may take another, and rounds bf16 at each rank. */
    const check = async (actual: Tensor, expected: Float32Array) => {
      if (kind === 'cuda') return expectClose(actual, expected, ranks ** 2);
      const rounded = cast(scopes[0]!, scopes[0]!.from('f32', [expected.length], expected), actual.dtype);
      return expectSame(actual, await valuesOf(rounded));
    };

    test.each(dtypes)('all_reduce gives every rank the sum: %s', async (dtype) => {
      const { x, sums } = await some(dtype);
      allReduce(group, x);
      for (const own of x) for (const [k, t] of own.entries()) await check(t, sums[k]!);
    });

    test.each(dtypes)('reduce_scatter gives every rank its part of the sum: %s', async (dtype) => {
      const { x, sums } = await some(dtype);
      reduceScatter(group, x);
      for (const [r, own] of x.entries()) {
        for (const [k, t] of own.entries()) {
          const [from, to] = partOf(t.count, r, ranks);
          if (to > from) await check(t.slice(0, from, to), sums[k]!.slice(from, to));
        }
      }
    });

    test.each(dtypes)('all_gather gives every part to all: %s', async (dtype) => {
      const whole = sizes.map((n) => Float32Array.from(random.normals(n)));
      const own = scopes.map((_, r) => whole.map((v) => v.map((x, i) => { const [from, to] = partOf(v.length, r, ranks); return i >= from && i < to ? x : NaN; }))); // prettier-ignore
      const x = uploaded(own, dtype);
      const [expected] = uploaded([whole], dtype);
      allGather(group, x);
      for (const tensors of x) {
        for (const [k, t] of tensors.entries()) {
          expect((await bytesOf(t)).equals(await bytesOf(expected![k]!)), `${t.count} elements`).toBe(true);
        }
      }
    });

    test('the same bytes twice', async () => {
      const values = drawn(100_003);
      const twice = await Promise.all(
        [0, 1].map(async () => {
          const x = uploaded(values.map((v) => [v]), 'f32'); // prettier-ignore
          allReduce(group, x);
          return Promise.all(x.map(([t]) => bytesOf(t!)));
        }),
      );
      for (const bytes of twice.flat()) expect(bytes.equals(twice[0]![0]!)).toBe(true);
    });
  });
}

for (const ranks of [2, 3]) {
  suite('cpu', Array.from({ length: ranks }, () => openDevice({ kind: 'cpu', threads: 2, poison: true })));
} // prettier-ignore
if (process.env.DEEPSEEK_CONVERT_TEST_CUDA === '1') {
  const found = gpus();
  if (found.length > 1) suite('cuda', found);
  else {
    console.log('skipped: collectives of several devices on cuda (there is one GPU)');
    for (const device of found) device.close();
  }
}

describe('a group of devices on cpu', () => {
  const pair = (): { devices: [Device, Device]; group: Group } => {
    const devices: [Device, Device] = [
      openDevice({ kind: 'cpu', threads: 1 }),
      openDevice({ kind: 'cpu', threads: 1 }),
    ];
    return { devices, group: joinDevices(devices) };
  };
  const ones = (device: Device): { scope: Scope; x: Tensor } => {
    const scope = new Scope(device);
    return { scope, x: scope.from('f32', [4], Float32Array.of(1, 1, 1, 1)) };
  };

  test("one rank's failure is every rank's", async () => {
    const { devices, group } = pair();
    const [a, b] = [ones(devices[0]), ones(devices[1])];
    gather(b.scope, b.x.view(4, 1), b.scope.from('i32', [1], Int32Array.of(9)));
    allReduce(group, [[a.x], [b.x]]);
    await expect(devices[0].sync()).rejects.toThrow(/all_reduce: rank 1 failed: gather/);
    await expect(devices[1].sync()).rejects.toThrow(/gather/);
    // Reported, it is over.
    allReduce(group, [[a.x], [b.x]]);
    expect(await a.x.float32()).toEqual(Float32Array.of(2, 2, 2, 2));
    for (const device of devices) device.close();
  });

  test('closing a device ends what waits for it', async () => {
    const { devices } = pair();
    const { x } = ones(devices[0]);
    devices[0].collective('all_reduce', [x]);
    const waits = devices[0].sync();
    devices[1].close();
    await expect(waits).rejects.toThrow(/a device of the group was closed/);
    devices[0].close();
  });

  test('different operations are refused', async () => {
    const { devices } = pair();
    const [a, b] = [ones(devices[0]), ones(devices[1])];
    devices[0].collective('all_reduce', [a.x]);
    devices[1].collective('all_gather', [b.x]);
    for (const device of devices) await expect(device.sync()).rejects.toThrow(/different operations/);
    for (const device of devices) device.close();
  });

  test('tensors of other sizes or devices are refused', () => {
    const { devices, group } = pair();
    const [a, b] = [ones(devices[0]), ones(devices[1])];
    expect(() => allReduce(group, [[a.x], [b.x.slice(0, 0, 2)]])).toThrow(/the same size/);
    expect(() => allReduce(group, [[b.x], [a.x]])).toThrow(/another device/);
    expect(() => allReduce(group, [[a.x]])).toThrow(/tensors of 1 ranks/);
    for (const device of devices) device.close();
  });

  test('a device is in one group', () => {
    const { devices } = pair();
    expect(() => joinDevices(devices)).toThrow(/cannot work together.*in no group yet/s);
    for (const device of devices) device.close();
  });
});
