// CPU ops beside OpenBLAS (through our own option), PyTorch and numpy, round by round in the same run.
//   npm run bench:cpu [-- name filter] [-- --threads N]
import { spawn, type ChildProcessWithoutNullStreams } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism, cpus } from 'node:os';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import type { Device } from '../../src/backend/device.js';
import { openDevice } from '../../src/backend/load.js';
import type { FloatDType } from '../../src/base/dtype.js';
import { attention, cast, copyInto, matmulT, random, rmsnorm, softmax, swiglu } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';

const { values: options, positionals } = parseArgs({
  options: { threads: { type: 'string' }, rounds: { type: 'string', default: '5' } },
  allowPositionals: true,
});
process.env.DEEPSEEK_CONVERT_BUILD ??= resolve('build');
const threads = Number(options.threads ?? availableParallelism());
const rounds = Number(options.rounds);

interface Case {
  op: 'linear' | 'attention' | 'rmsnorm' | 'swiglu' | 'softmax' | 'cast' | 'transpose';
  dtype: FloatDType;
  shape: number[];
  /** What a run does, in units of 1e9 (floating-point operations, or bytes moved). */
  work: number;
  unit: 'GFLOP/s' | 'GB/s';
  blas?: boolean;
}
const linear = (dtype: FloatDType, m: number, n: number, k: number, blas = false): Case => ({
  op: 'linear',
  dtype,
  shape: [m, n, k],
  work: (2 * m * n * k) / 1e9,
  unit: 'GFLOP/s',
  blas,
});
const stream = (op: Case['op'], dtype: FloatDType, rows: number, columns: number, touched: number): Case => ({
  op,
  dtype,
  shape: [rows, columns],
  work: (rows * columns * touched) / 1e9,
  unit: 'GB/s',
});
const causal = (dtype: FloatDType, b: number, s: number, h: number, hk: number, d: number): Case => ({
  op: 'attention',
  dtype,
  shape: [b, s, h, hk, d],
  work: (2 * b * h * s * s * d) / 1e9, // two products, half of them masked
  unit: 'GFLOP/s',
});
const cases: Case[] = [
  linear('f32', 1024, 1024, 1024, true),
  linear('f32', 512, 4096, 4096, true),
  linear('f32', 2048, 2048, 2048, true),
  linear('bf16', 1024, 1024, 1024),
  linear('bf16', 512, 4096, 4096),
  linear('f16', 512, 4096, 4096),
  linear('bf16', 1, 4096, 4096),
  linear('bf16', 16, 4096, 4096),
  causal('f32', 1, 1024, 8, 2, 128),
  causal('bf16', 1, 1024, 8, 2, 128),
  causal('bf16', 4, 512, 8, 8, 64),
  stream('rmsnorm', 'bf16', 4096, 4096, 4),
  stream('swiglu', 'bf16', 2048, 8192, 6),
  stream('softmax', 'f32', 1024, 16384, 8),
  stream('cast', 'bf16', 4096, 4096, 6),
  stream('transpose', 'f32', 4096, 4096, 8),
];

/** One round of a case on a device: seconds, the best of `reps`. */
async function measure(device: Device, { op, dtype, shape }: Case, reps: number): Promise<number> {
  using s = new Scope(device);
  const make = (type: FloatDType, ...dims: number[]): Tensor => {
    const t = s.empty(type, dims);
    random(t, 'normal', 1, 0, 1);
    return t;
  };
  const [a, b, c, d, e] = shape as [number, number, number, number, number];
  const run: () => Tensor = {
    linear: () => {
      const [x, w, out] = [make(dtype, a, c), make(dtype, b, c), s.empty(dtype, [a, b])];
      return () => matmulT(s, x, w, { out });
    },
    attention: () => {
      const [q, k, v] = [make(dtype, a, b, c, e), make(dtype, a, b, d, e), make(dtype, a, b, d, e)];
      return () => attention(s, q, k, v, { scale: 1 / Math.sqrt(e) });
    },
    rmsnorm: () => {
      const [x, w] = [make(dtype, a, b), make(dtype, b)];
      return () => rmsnorm(s, x, w, 1e-6);
    },
    swiglu: () => {
      const [x, y] = [make(dtype, a, b), make(dtype, a, b)];
      return () => swiglu(s, x, y);
    },
    softmax: () => {
      const x = make(dtype, a, b);
      return () => softmax(s, x);
    },
    cast: () => {
      const x = make('f32', a, b);
      return () => cast(s, x, dtype);
    },
    transpose: () => {
      const [x, y] = [make(dtype, a, b), s.empty(dtype, [b, a])];
      return () => (copyInto(y, x.transpose()), y);
    },
  }[op]();
  const keep = new Set<Tensor>([]);
  let best = Infinity;
  for (let i = -1; i < reps; i++) {
    await device.sync();
    const begin = performance.now();
    const out = run();
    await device.sync();
    if (i >= 0) best = Math.min(best, (performance.now() - begin) / 1000); // the first one warms up
    if (op === 'linear' || op === 'transpose') keep.add(out);
    else s.free(out);
  }
  return best;
}

/** PyTorch and numpy in a process of their own, when the development environment has them. */
class Peer {
  readonly #child: ChildProcessWithoutNullStreams;
  readonly #lines: AsyncIterator<string, undefined>;
  constructor(python: string) {
    this.#child = spawn(python, ['test/bench/peer.py', String(threads)]);
    this.#child.stderr.pipe(process.stderr);
    this.#lines = createInterface({ input: this.#child.stdout })[Symbol.asyncIterator]() as AsyncIterator<
      string,
      undefined
    >;
  }
  async #next<T>(): Promise<T> {
    const { value, done } = await this.#lines.next();
    if (done) throw new Error('the Python process ended');
    return JSON.parse(value) as T;
  }
  versions = (): Promise<{ torch: string; numpy: string }> => this.#next();
  measure(op: string, { dtype, shape }: Case, reps: number): Promise<number> {
    this.#child.stdin.write(JSON.stringify({ op, dtype, shape, reps }) + '\n');
    return this.#next<number>();
  }
  close(): void {
    this.#child.stdin.end();
  }
}

const own = openDevice({ kind: 'cpu', threads, blas: false });
const withBlas = openDevice({ kind: 'cpu', threads });
const { isa, blas } = withBlas.info() as { isa: string; blas: { path: string | null } };
const python = '.venv/bin/python';
const peer = existsSync(python) ? new Peer(python) : undefined;
const versions = await peer?.versions();
const { commit } = (await import(pathToFileURL(resolve('test/bench/commit.mjs')).href)) as { commit: string };
console.log(
  `commit ${commit}, ${cpus()[0]!.model}, ${threads} threads, kernels: ${isa}, OpenBLAS: ${blas.path ?? 'not found'}, ` +
    (versions ? `torch ${versions.torch}, numpy ${versions.numpy}` : `no ${python}: ours alone`),
);
console.log('Best of all rounds; the contestants take turns, so that noise meets all of them.\n');
const columns = ['ours', 'OpenBLAS', 'torch', 'numpy'] as const;
console.log(['case'.padEnd(34), 'unit'.padEnd(8), ...columns.map((c) => c.padStart(9)), 'best of others'].join(' '));

for (const c of cases) {
  const name = `${c.op} ${c.dtype} ${c.shape.join(' x ')}`;
  if (!positionals.every((word) => name.includes(word))) continue;
  const best: Partial<Record<(typeof columns)[number], number>> = {};
  const see = (who: (typeof columns)[number], seconds: number) =>
    (best[who] = Math.min(best[who] ?? Infinity, seconds));
  const reps = Math.max(2, Math.min(30, Math.round(30 / (c.unit === 'GB/s' ? c.work * 50 : Math.max(c.work, 1)))));
  for (let round = 0; round < rounds; round++) {
    see('ours', await measure(own, c, reps));
    if (c.blas && blas.path) see('OpenBLAS', await measure(withBlas, c, reps));
    if (peer) see('torch', await peer.measure(c.op, c, reps));
    if (peer && c.blas) see('numpy', await peer.measure('numpy', c, reps));
  }
  const others = Math.min(...columns.slice(1).map((who) => best[who] ?? Infinity));
  const cells = columns.map((who) => (best[who] === undefined ? '-' : (c.work / best[who]).toFixed(1)).padStart(9));
  console.log(
    [name.padEnd(34), c.unit.padEnd(8), ...cells, `${(others / best.ours!).toFixed(2)} x`.padStart(9)].join(' '),
  );
}
peer?.close();
own.close();
withBlas.close();
