// GPU rates on Llama-3-8B shapes, each beside its ceiling measured in the same run. Wall time around many enqueued ops
// and one sync; the median of several rounds.
import { performance } from 'node:perf_hooks';
import { readFileSync } from 'node:fs';
import { openDevice } from '../../src/backend/load.js';
import * as ops from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';

const device = openDevice({ kind: 'cuda' });

async function seconds(repeat: number, body: (i: number) => void, rounds = 5): Promise<number> {
  const times: number[] = [];
  for (let round = 0; round <= rounds; round++) {
    await device.sync();
    const start = performance.now();
    for (let i = 0; i < repeat; i++) body(i);
    await device.sync();
    times.push((performance.now() - start) / 1e3 / repeat);
  }
  return times.slice(1).sort((a, b) => a - b)[Math.floor(rounds / 2)]!; // the first round warms up
}
const rows: string[] = [];
const row = (name: string, time: number, rate: string, share = ''): void => {
  const line = `${name.padEnd(52)} ${(time * 1e3).toFixed(3).padStart(10)} ms  ${rate.padStart(16)}  ${share}`;
  rows.push(line);
  console.log(line);
};
const percent = (x: number): string => `${(100 * x).toFixed(0)}%`;
const random = (s: Scope, shape: number[], deviation = 1): Tensor => {
  const t = s.empty('bf16', shape);
  ops.random(
    t,
    'normal',
    shape.reduce((a, b) => a * 31 + b, 7),
    0,
    deviation,
  );
  return t;
};

// --- ceilings ---
let ceiling = 0;
{
  using s = new Scope(device);
  const [a, b] = [random(s, [8192, 8192]), random(s, [8192, 8192])];
  const out = s.empty('bf16', [8192, 8192]);
  const t = await seconds(10, () => void ops.gemm(s, a, b, { out }));
  ceiling = (2 * 8192 ** 3) / t;
  row('gemm bf16 8192^3 (ceiling of products)', t, `${(ceiling / 1e12).toFixed(0)} TFLOP/s`);
}
let bandwidth = 0;
{
  using s = new Scope(device);
  const [a, b] = [s.zeros('u8', [2 ** 31]), s.zeros('u8', [2 ** 31])];
  const t = await seconds(5, () => ops.copyInto(a, b));
  bandwidth = 2 ** 32 / t;
  row('copy 2 GB (ceiling of memory)', t, `${(bandwidth / 1e12).toFixed(2)} TB/s`);
}

// --- attention ---
{
  using s = new Scope(device);
  const [q, k, v] = [random(s, [4, 2048, 32, 128]), random(s, [4, 2048, 8, 128]), random(s, [4, 2048, 8, 128])];
  const scale = 128 ** -0.5;
  let t = await seconds(10, () => {
    using inner = new Scope(device);
    ops.attention(inner, q, k, v, { scale });
  });
  const product = 4 * 32 * 2048 ** 2 * 128; // one of [S, D] by [D, S], the causal half
  row('attention causal 4 x 2048, 32/8 heads of 128', t, `${((2 * product) / t / 1e12).toFixed(0)} TFLOP/s`, percent((2 * product) / t / ceiling));
  const lse = s.empty('f32', [4, 32, 2048]);
  const [o, d] = [ops.attention(s, q, k, v, { scale, lse }), random(s, [4, 2048, 32, 128])];
  t = await seconds(10, () => {
    using inner = new Scope(device);
    ops.attentionBackward(inner, d, { o, q, k, v, lse }, { scale });
  });
  row('attention_backward, the same (of its five products)', t, `${((5 * product) / t / 1e12).toFixed(0)} TFLOP/s`, percent((5 * product) / t / ceiling));
} // prettier-ignore
{
  using s = new Scope(device);
  const [q, k] = [random(s, [8, 2048, 32, 128]), random(s, [8, 2048, 8, 128])]; // two unrelated models
  const [x, y] = [0, 4].map((i) => ({ q: q.slice(0, i, i + 4), k: k.slice(0, i, i + 4), scale: 128 ** -0.5 }));
  const t = await seconds(10, () => {
    using inner = new Scope(device);
    ops.attentionCompare(inner, x!, y!);
  });
  const flop = 2 * 2 * 2 * 128 * 32 * 2 * 2048 ** 2; // two models, two sweeps
  row('attention_compare 4 x 2048, 32/8 heads of 128', t, `${(flop / t / 1e12).toFixed(0)} TFLOP/s`, percent(flop / t / ceiling));
} // prettier-ignore

// --- GPTQ: Hessians, factor, grids, sweep ---
const groups = [
  { name: 'q/k/v', n: 6144, k: 4096 },
  { name: 'o', n: 4096, k: 4096 },
  { name: 'gate/up', n: 28672, k: 4096 },
  { name: 'down', n: 4096, k: 14336 },
];
const total = { hessian: 0, factor: 0, search: 0, sweep: 0 };
for (const { name, n, k } of groups) {
  using s = new Scope(device);
  const x = random(s, [8192, k]);
  const h = s.zeros('f32', [k, k]);
  const tokens = 128 * 2048;
  let t = (await seconds(4, () => ops.hessianAdd(h, x, { alpha: 1 / 8192 }))) * (tokens / 8192);
  total.hessian += t;
  const triangle = tokens * k * (k + 1);
  row(`${name}: Hessian ${k}, 262,144 tokens`, t, `${(triangle / t / 1e12).toFixed(0)} TFLOP/s`, `${percent(triangle / t / ceiling)} (triangle)`); // prettier-ignore
  t = await seconds(1, () => {
    using inner = new Scope(device);
    ops.cholesky(inner, h, 0.01, true);
  });
  total.factor += t;
  row(`${name}: Cholesky ${k}`, t, `${(k ** 3 / 3 / t / 1e12).toFixed(1)} TFLOP/s`);
  const { factor } = ops.cholesky(s, h, 0.01, true);
  const w = ops.cast(s, random(s, [n, k], 0.02), 'f32');
  const weight = s.empty('f32', [k]);
  ops.random(weight, 'uniform', 3, 0.5, 1.5);
  const search = { low: -8, high: 7, group: 128, weight, points: 28, from: 0.55, to: 1.06, freeSign: true };
  t = await seconds(1, () => {
    using inner = new Scope(device);
    ops.scaleSearch(inner, w, search);
  });
  total.search += t;
  row(`${name}: scale search ${n} x ${k}`, t, `${((n * k) / t / 1e9).toFixed(0)} Gweight/s`);
  const grid = ops.scaleSearch(s, w, search);
  t = await seconds(1, () => {
    using inner = new Scope(device);
    ops.ldlq(inner, w, factor, grid);
  });
  total.sweep += t;
  row(`${name}: LDLQ sweep ${n} x ${k}`, t, `${((n * k * k) / t / 1e12).toFixed(0)} TFLOP/s`, percent((3 * n * k * k) / t / ceiling)); // prettier-ignore
}
row('32 layers: Hessians', total.hessian * 32, '');
row('32 layers: factor', total.factor * 32, '');
row('32 layers: scale search', total.search * 32, '');
row('32 layers: sweep', total.sweep * 32, '');
row('32 layers (224 linears): factor + sweep', (total.factor + total.sweep) * 32, '');
const peer = process.argv[2];
if (peer) {
  const json = readFileSync(peer, 'utf8');
  const theirs = JSON.parse(json.slice(json.lastIndexOf('\n{') + 1)) as Record<string, number>;
  const ours = (total.factor + total.search + total.sweep) * 1;
  row('plain PyTorch GPTQ, one layer, same run', theirs.gptq_layer_s!, '', `${(theirs.gptq_layer_s! / ours).toFixed(0)} x ours (${(ours * 1e3).toFixed(1)} ms)`); // prettier-ignore
}

// --- DeepSeek-V3-shaped experts: 256 private Hessians of 7168 and of 2048, in batches ---
for (const { name, n, k, e } of [{ name: 'gate/up', n: 4096, k: 7168, e: 8 }, { name: 'down', n: 7168, k: 2048, e: 16 }]) {
  using s = new Scope(device);
  const h = s.zeros('f32', [e, k, k]);
  const x = random(s, [k, k]);
  for (let i = 0; i < e; i++) ops.hessianAdd(h.at(i), x);
  const w = ops.cast(s, random(s, [e, n, k], 0.02), 'f32');
  const grid = ops.scaleSearch(s, w, { low: -8, high: 7, group: 128 });
  const t = await seconds(1, () => {
    using inner = new Scope(device);
    const { factor } = ops.cholesky(inner, h, 0.01, true);
    ops.ldlq(inner, w, factor, grid);
  }, 3);
  row(`V3 experts ${name}: ${e} x (factor ${k} + sweep ${n})`, t, '', `256 experts: ${(t * 256 / e).toFixed(2)} s`);
} // prettier-ignore

// --- decoding: one token through a layer's linears, INT4 beside bf16; weights rotate beyond the cache; enough layers a
// round that its one sync does not count ---
for (const m of [1, 4]) {
  using s = new Scope(device);
  const sets = Array.from({ length: 4 }, () =>
    groups.map(({ n, k }) => ({
      x: random(s, [m, k]),
      w: random(s, [n, k], 0.02),
      words: ops.pack(s, s.zeros('i8', [n, k]), { bits: 4, bias: 8, axis: 1 }),
      scale: random(s, [n, k / 128], 0.02),
      y: s.empty('bf16', [m, n]),
    })),
  );
  for (const set of sets) for (const { words } of set) ops.random(words.view(-1), 'uniform', 1, 0, 2 ** 30);
  const bf16 = await seconds(200, (i) => {
    for (const { x, w, y } of sets[i % 4]!) ops.matmulT(s, x, w, { out: y });
  });
  const int4 = await seconds(200, (i) => {
    for (const { x, words, scale, y } of sets[i % 4]!) ops.int4Matmul(s, x, { words, scale, group: 128 }, { out: y });
  });
  const weights = groups.reduce((sum, { n, k }) => sum + n * k, 0);
  row(`decode M=${m}, one layer, bf16`, bf16, `${((2 * weights) / bf16 / 1e12).toFixed(2)} TB/s`, percent((2 * weights) / bf16 / bandwidth)); // prettier-ignore
  row(`decode M=${m}, one layer, INT4 g128`, int4, `${((0.515625 * weights) / int4 / 1e12).toFixed(2)} TB/s`, `${(int4 / bf16).toFixed(3)} x bf16`); // prettier-ignore
}
device.close();
