// GPTQ of one K x K linear, the Hessian given: factor and sweep on our ops, beside the same in PyTorch, in turns.
//   npm run bench:solve [-- 1024 4096] [-- --threads N] [-- --rounds N]
import { spawn } from 'node:child_process';
import { existsSync } from 'node:fs';
import { availableParallelism, cpus } from 'node:os';
import { resolve } from 'node:path';
import { createInterface } from 'node:readline';
import { pathToFileURL } from 'node:url';
import { parseArgs } from 'node:util';
import { openDevice } from '../../src/backend/load.js';
import {
  cast,
  cholesky,
  codeDescent,
  hessianAdd,
  ldlq,
  random,
  scaleRefit,
  scaleSearch,
  symmetrize,
} from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';

const { values: options, positionals } = parseArgs({
  options: { threads: { type: 'string' }, rounds: { type: 'string', default: '3' } },
  allowPositionals: true,
});
process.env.DEEPSEEK_CONVERT_BUILD ??= resolve('build');
const threads = Number(options.threads ?? availableParallelism());
const sizes = positionals.length > 0 ? positionals.map(Number) : [1024, 4096];
const device = openDevice({ kind: 'cpu', threads });

/** Seconds on the clock and of all processors together: on a busy machine only the second says much. */
type Cost = [wall: number, cpu: number];
const less = (a: Cost, b: Cost): Cost => [Math.min(a[0], b[0]), Math.min(a[1], b[1])];

async function time(repetitions: number, run: (s: Scope) => void): Promise<Cost> {
  let best: Cost = [Infinity, Infinity];
  for (let i = 0; i <= repetitions; i++) {
    using s = new Scope(device);
    await device.sync();
    const [begin, cpu] = [performance.now(), process.cpuUsage()];
    run(s);
    await device.sync();
    const used = process.cpuUsage(cpu);
    if (i > 0) best = less(best, [(performance.now() - begin) / 1e3, (used.user + used.system) / 1e6]); // 0 warms up
  }
  return best;
}

const python = '.venv/bin/python';
const child = existsSync(python) ? spawn(python, ['test/bench/peer-gptq.py', String(threads)]) : undefined;
child?.stderr.pipe(process.stderr);
const answers =
  child && (createInterface({ input: child.stdout })[Symbol.asyncIterator]() as AsyncIterator<string, undefined>);
async function answer<T>(): Promise<T> {
  const next = await answers?.next();
  if (next?.value === undefined) throw new Error('the Python process ended');
  return JSON.parse(next.value) as T;
}

const version = child ? `torch ${await answer<string>()}` : `no ${python}: ours alone`;
const { isa } = device.info() as { isa: string };
const { commit } = (await import(pathToFileURL(resolve('test/bench/commit.mjs')).href)) as { commit: string };
console.log(`commit ${commit}, ${cpus()[0]!.model}, ${threads} threads, kernels ${isa}, ${version}`);
console.log('Best of all rounds, in turns. "CPU": seconds of all processors together.\n');
console.log(`${'case'.padEnd(34)}    wall ms     CPU ms   torch: wall x    CPU x`);

for (const k of sizes) {
  using s = new Scope(device);
  const x = s.empty('f32', [2 * k, k]);
  const w = s.empty('f32', [k, k]);
  random(x, 'normal', 1, 0, 1);
  random(w, 'normal', 2, 0, 0.02);
  const h = s.zeros('f32', [k, k]);
  hessianAdd(h, x);
  symmetrize(h);
  s.free(x);
  const plain = { low: -8, high: 7, group: 128 };
  const searched = { ...plain, points: 28, from: 0.55, to: 1.06, freeSign: true };
  const grid = scaleSearch(s, w, plain);
  const r = cholesky(s, h, 0.01, true).factor;
  const { codes } = ldlq(s, w, r, grid);
  const cases: [string, (t: Scope) => void][] = [
    ['grid, factor, sweep', (t) => void ldlq(t, w, cholesky(t, h, 0.01, true).factor, scaleSearch(t, w, plain))],
    ['  factor', (t) => void cholesky(t, h, 0.01, true)],
    ['  sweep', (t) => void ldlq(t, w, r, grid)],
    ['  searched grid', (t) => void scaleSearch(t, w, searched)],
    ['  scale refit', (t) => void scaleRefit(t, codes, w, h, grid)],
    ['  code descent, 3 passes', (t) => void codeDescent(t, cast(t, codes, 'i8'), w, h, grid, { passes: 3 })],
  ];
  const repetitions = k <= 1024 ? 10 : 1;
  const best = new Map<string, Cost>(cases.map(([name]) => [name, [Infinity, Infinity]]));
  let torch: Cost = [Infinity, Infinity];
  for (let round = 0; round < Number(options.rounds); round++) {
    for (const [name, run] of cases) best.set(name, less(best.get(name)!, await time(repetitions, run)));
    if (child && round < (k <= 1024 ? Infinity : 2)) {
      child.stdin.write(`${k} ${k <= 1024 ? 3 : 1}\n`);
      torch = less(torch, await answer<Cost>());
    }
  }
  const ms = (seconds: number) => (seconds * 1e3).toFixed(1).padStart(10);
  for (const [name, cost] of best) {
    const ratio = (i: 0 | 1) => (name.startsWith(' ') || !child ? '' : (torch[i] / cost[i]).toFixed(1)).padStart(8);
    console.log(
      `${`${k} x ${k} ${name}`.padEnd(34)} ${ms(cost[0])} ${ms(cost[1])} ${ratio(0).padStart(15)} ${ratio(1)}`,
    );
  }
  if (child) console.log(`${`${k} x ${k} torch`.padEnd(34)} ${ms(torch[0])} ${ms(torch[1])}`);
}
child?.stdin.end();
device.close();
