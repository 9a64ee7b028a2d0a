// Every op on the GPU against its CPU twin, on fresh random data with poisoned outputs; each case twice on the GPU,
// which must give the same bytes.
import type { Device } from '../../src/backend/device.js';
import { openDevice } from '../../src/backend/load.js';
import { cast } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { cases, Inputs, type Case } from './cases.js';

const integers = new Set(['i8', 'u8', 'i16', 'u16', 'i32', 'u32', 'i64', 'u64', 'bool']);

interface Output {
  readonly values: Float32Array;
  readonly bytes: Uint8Array;
  readonly exact: boolean;
}

async function outputs(device: Device, test: Case, seed: number): Promise<Output[]> {
  using s = new Scope(device);
  const tensors = await test.run(new Inputs(s, seed));
  return await Promise.all(
    tensors.map(async (t: Tensor) => ({
      values: await cast(s, t, 'f32').float32(),
      bytes: await t.bytesOut(),
      exact: integers.has(t.dtype),
    })),
  );
}

/** Normalised mean squared error; for integers the share that differs. NaN must meet NaN. */
function distance(a: Output, b: Output): number {
  let error = 0;
  let energy = 0;
  for (let i = 0; i < a.values.length; i++) {
    const [x, y] = [a.values[i]!, b.values[i]!];
    if (Number.isNaN(x) !== Number.isNaN(y)) return Infinity;
    if (Number.isNaN(x) || x === y) {
      energy += Number.isFinite(x) ? x * x : 0;
      continue;
    }
    error += a.exact ? 1 : (x - y) ** 2;
    energy += x * x;
  }
  return a.exact ? error / Math.max(1, a.values.length) : error / (energy || 1);
}

export async function compareAll(filter: string, seed: number): Promise<{ passed: number; failed: number }> {
  const cpu = openDevice({ kind: 'cpu', poison: true });
  const gpu = openDevice({ kind: 'cuda', poison: true });
  const byOp = new Map<string, { cases: number; worst: number; failed: number }>();
  const failures: string[] = [];
  for (const [k, test] of cases.entries()) {
    if (!test.name.includes(filter)) continue;
    const op = test.name.split(/[ ,]/)[0]!;
    const row = byOp.get(op) ?? { cases: 0, worst: 0, failed: 0 };
    byOp.set(op, row);
    row.cases++;
    try {
      const expected = await outputs(cpu, test, seed + k);
      const got = await outputs(gpu, test, seed + k);
      const again = await outputs(gpu, test, seed + k);
      expected.forEach((e, i) => {
        const d = distance(e, got[i]!);
        if (!(d > row.worst)) row.worst = Math.max(row.worst, d);
        else row.worst = d;
        if (!(d <= test.bound)) throw new Error(`output ${i}: distance ${d.toExponential(2)} > ${test.bound}`);
        if (Buffer.compare(got[i]!.bytes, again[i]!.bytes) !== 0)
          throw new Error(`output ${i} differs between two runs`);
      });
    } catch (error) {
      row.failed++;
      failures.push(`${test.name}: ${error instanceof Error ? error.message.slice(0, 300) : String(error)}`);
    }
  }
  console.log(`\nCUDA against CPU, seed ${seed}\n${'op'.padEnd(20)}  cases  failed  worst NMSE`);
  for (const [op, row] of byOp)
    console.log(
      `${op.padEnd(20)}  ${String(row.cases).padStart(5)}  ${String(row.failed).padStart(6)}  ${row.worst.toExponential(1)}`,
    );
  for (const failure of failures) console.log(`FAILED ${failure}`);
  const failed = failures.length;
  const passed = [...byOp.values()].reduce((n, row) => n + row.cases, 0) - failed;
  console.log(`compared: ${passed} passed, ${failed} failed; buffers left ${gpu.memory().buffers}`);
  cpu.close();
  gpu.close();
  return { passed, failed };
}
