import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { cast, sample, type SampleOptions } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { floatDTypes, onDevices, rounded, tensor, type Values } from './support.js';

interface Case extends Required<SampleOptions> {
  readonly rows: number;
  readonly vocab: number;
  readonly u: readonly number[];
  readonly tokens: readonly number[];
  readonly logprobs: readonly number[];
}
const cases = JSON.parse(readFileSync(new URL('../../fixtures/ops/sample.json', import.meta.url), 'utf8')) as Case[];

/** As in fixtures/ops/make_sample.py. */
const logitsOf = (count: number): Float32Array =>
  Float32Array.from({ length: count }, (_, i) => {
    const x = Number((BigInt(i) * 2654435761n) % 2n ** 32n) / 2 ** 31 - 1;
    return 9 * x * x * x;
  });
const numbers = (s: Scope, u: ArrayLike<number>): Tensor => s.from('f64', [u.length], Float64Array.from(u));
const evenly = (n: number): Float64Array => Float64Array.from({ length: n }, (_, i) => (i + 0.5) / n);

onDevices('sample', (device, rng) => {
  test.each(cases)('as transformers: $vocab tokens, temperature $temperature, top-k $topK, top-p $topP, min-p $minP', async ({ rows, vocab, u, tokens, logprobs, ...how }) => {
    using s = new Scope(device());
    const logprob = s.empty('f32', [rows]);
    const x = s.from('f32', [rows, vocab], logitsOf(rows * vocab));
    const drawn = sample(s, x, numbers(s, u), how, { logprob });
    expect([...(await drawn.int32())]).toEqual(tokens);
    (await logprob.float32()).forEach((value, i) => expect(value).toBeCloseTo(logprobs[i]!, 5));
  }); // prettier-ignore

  /** Every row of `x` once for each u: tokens, and how often each was drawn. */
  const draws = async (s: Scope, x: Tensor, u: ArrayLike<number>, how: SampleOptions = {}) => {
    const many = x.view(1, -1).expand(u.length, x.count);
    const tokens = [...(await sample(s, many, numbers(s, u), how).int32())];
    const counts = new Array<number>(x.count).fill(0);
    for (const token of tokens) counts[token]!++;
    return { tokens, counts };
  };
  const softmax = (x: ArrayLike<number>, temperature = 1): number[] => {
    const e = Array.from(x, (v) => Math.exp(v / temperature));
    const sum = e.reduce((a, b) => a + b, 0);
    return e.map((v) => v / sum);
  };
  /** A statistic of 40 cells that exceeds 86 once in 20,000 runs. */
  const chiSquare = (counts: readonly number[], p: readonly number[], n: number): number =>
    counts.reduce(
      (sum, count, i) => sum + (p[i]! > 0 ? (count - n * p[i]!) ** 2 / (n * p[i]!) : count * Infinity || 0),
      0,
    );

  test.each(floatDTypes)('%s: frequencies are the probabilities (chi-square)', async (dtype) => {
    using s = new Scope(device());
    const values: Values = rounded(dtype, rng.normals(40));
    const x = tensor(s, dtype, [40], values);
    const u = Float64Array.from({ length: 20_000 }, () => rng.uniform());
    for (const temperature of [1, 2.5]) {
      const { counts } = await draws(s, x, u, { temperature });
      expect(chiSquare(counts, softmax(values, temperature), u.length)).toBeLessThan(86);
    }
    // Truncated: what is left, renormalised.
    const order = Array.from(values.keys()).sort((a, b) => values[b]! - values[a]! || a - b);
    const p = softmax(values);
    const kept = new Set(order.slice(0, 12));
    const whole = order.slice(0, 12).reduce((sum, i) => sum + p[i]!, 0);
    const { counts } = await draws(s, x, u, { topK: 12 });
    expect(chiSquare(counts, p.map((v, i) => (kept.has(i) ? v / whole : 0)), u.length)).toBeLessThan(86); // prettier-ignore
  });

  test('ties: the lower ids stay, in all that truncates', async () => {
    using s = new Scope(device());
    const x = tensor(s, 'f32', [7], [1, 3, -2, 3, 3, -Infinity, 2]);
    const drawn = async (how: SampleOptions) => [...new Set((await draws(s, x, evenly(200), how)).tokens)];
    expect(await drawn({ topK: 2 })).toEqual([1, 3]);
    expect(await drawn({ topK: 4 })).toEqual([1, 3, 4, 6]);
    // Probabilities 0.28, 0.28, 0.28, 0.10, 0.04.
    expect(await drawn({ topP: 0.5 })).toEqual([1, 3]);
    expect(await drawn({ topP: 0.6 })).toEqual([1, 3, 4]);
    expect(await drawn({ topP: 0.5, topK: 3 })).toEqual([1, 3]);
    expect(await drawn({ topP: 0.9, topK: 2 })).toEqual([1, 3]);
    expect(await drawn({ topP: 0 })).toEqual([1]);
    expect(await drawn({ topK: 1 })).toEqual([1]);
    expect(await drawn({ minP: 1 })).toEqual([1, 3, 4]);
    expect(await drawn({ minP: 0.3 })).toEqual([1, 3, 4, 6]);
    expect(await drawn({ temperature: 0 })).toEqual([1]);
    expect(await drawn({ topP: 1, topK: 7 })).toEqual([0, 1, 3, 4, 6]);
    // Many equal ones, over all stretches of a row.
    const flat = s.zeros('f32', [5000]);
    expect((await draws(s, flat, evenly(10), { topK: 5000 })).tokens).toEqual(Array.from({ length: 10 }, (_, i) => 500 * i + 250)); // prettier-ignore
    expect((await draws(s, flat, evenly(10), { topP: 0.5 })).tokens).toEqual(Array.from({ length: 10 }, (_, i) => 250 * i + 125)); // prettier-ignore
    expect((await draws(s, flat, evenly(10), { topK: 10 })).tokens).toEqual([0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
  });

  test('ends of the unit interval, tokens that cannot be, temperatures near zero', async () => {
    using s = new Scope(device());
    const ends = [0, 1 - 2 ** -53];
    const x = tensor(s, 'f32', [5], [-Infinity, 1, 0, -200, -Infinity]);
    expect((await draws(s, x, ends)).tokens).toEqual([1, 2]);
    expect((await draws(s, x, ends, { topK: 4, topP: 0.9999 })).tokens).toEqual([1, 2]);
    expect((await draws(s, x, evenly(50), { temperature: 1e-4 })).counts).toEqual([0, 50, 0, 0, 0]);
    const wide = s.from('f32', [1, 20_000], logitsOf(20_000));
    const { tokens } = await draws(s, wide, evenly(400), { temperature: 3 });
    expect(tokens).toEqual([...tokens].sort((a, b) => a - b));
    // One token has all of the probability, wherever it stands.
    for (const at of [0, 31, 32, 4096, 19_999]) {
      const one = Float32Array.from({ length: 20_000 }, (_, i) => (i === at ? 0 : -Infinity));
      const row = s.from('f32', [20_000], one);
      for (const how of [{}, { topK: 5 }, { topP: 0.5 }, { minP: 0.1 }, { temperature: 0 }])
        expect((await draws(s, row, ends, how)).tokens).toEqual([at, at]);
    }
  });

  test('rows that are no logits give -1, and leave others alone', async () => {
    using s = new Scope(device());
    for (const odd of [NaN, Infinity]) {
      const x = s.from(
        'f32',
        [3, 6000],
        Float32Array.from({ length: 18_000 }, (_, i) => (i === 11_000 ? odd : 0)),
      );
      for (const how of [{}, { temperature: 0 }, { topK: 3 }, { topP: 0.5 }]) {
        const logprob = s.empty('f32', [3]);
        const drawn = await sample(s, x, numbers(s, [0, 0, 0]), how, { logprob }).int32();
        expect([...drawn]).toEqual([0, -1, 0]);
        const [first, second] = await logprob.float32();
        expect(first).toBeCloseTo(-Math.log(6000), 5);
        expect(second).toBeNaN();
      }
    }
    const none = s.from('f32', [1, 3], new Float32Array(3).fill(-Infinity));
    expect([...(await sample(s, none, numbers(s, [0.5])).int32())]).toEqual([-1]);
  });

  test('the same numbers give the same tokens, in rows of any stride', async () => {
    using s = new Scope(device());
    const [rows, vocab] = [33, 5003];
    const values = rng.normals(rows * vocab, 2);
    const u = numbers(
      s,
      Float64Array.from({ length: rows }, () => rng.uniform()),
    );
    const x = tensor(s, 'bf16', [rows, vocab], values, { pad: 5 });
    const dense = cast(s, x, 'f32');
    for (const how of [{}, { topP: 0.9 }, { topK: 50, topP: 0.7, minP: 0.01, temperature: 0.8 }]) {
      const once = [...(await sample(s, x, u, how).int32())];
      expect([...(await sample(s, x, u, how).int32())]).toEqual(once);
      expect([...(await sample(s, dense, u, how).int32())]).toEqual(once);
    }
  });
});
