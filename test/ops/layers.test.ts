import { expect, test } from 'vitest';
import type { FloatDType } from '../../src/base/dtype.js';
import {
  binary, cast, crossEntropy, crossEntropyBackward, klBackward, klRows, layernorm, normAdd, reduce, rmsnorm, rmsnormBackward, rope,
  softmax, softmaxBackward, swiglu, swigluBackward, unary, type UnaryKind,
} from '../../src/tensor/ops.js'; // prettier-ignore
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { fixture } from './quant-cases.js';
import { bytesOf, expectClose, expectSame, floatDTypes, onDevices, rounded, strided, tensor, valuesOf, type Values } from './support.js'; // prettier-ignore

const known = fixture('layers');
const load = (s: Scope, name: string): Tensor => tensor(s, 'f32', known.shape(name), known.f32(name));

/** Relative error of every value, with an absolute floor; infinities must agree. */
async function expectEach(t: Tensor, expected: ArrayLike<number>, relative: number, floor = 1e-37): Promise<void> {
  const got = await valuesOf(t);
  for (let i = 0; i < got.length; i++) {
    const [g, e] = [got[i]!, expected[i]!];
    if (g !== e && !(Math.abs(g - e) <= relative * Math.abs(e) + floor)) expect.fail(`[${i}]: got ${g}, expected ${e}`);
  }
}

onDevices('unary', (device, rng) => {
  const kinds = ['exp', 'sigmoid', 'silu', 'gelu', 'tanh', 'softplus', 'gelu_tanh', 'relu', 'relu2', 'softcap', 'abs', 'neg', 'square'] as const; // prettier-ignore
  test.each(kinds)('%s as PyTorch', async (kind) => {
    using s = new Scope(device());
    const x = load(s, 'unary/x');
    // gelu in fp32 loses digits where 1 + erf(x) or 1 + tanh cancels; PyTorch's does too.
    const floor = kind.startsWith('gelu') ? 3e-7 : 1e-37;
    await expectEach(unary(s, kind, x, 5), known.f32(`unary/${kind}/y`), 4e-7, floor);
  });

  test('log, square roots and reciprocals of positive numbers', async () => {
    using s = new Scope(device());
    const x = load(s, 'unary/positive/x');
    for (const kind of ['log', 'sqrt', 'rsqrt', 'reciprocal'] as const)
      await expectEach(unary(s, kind, x), known.f32(`unary/positive/${kind}`), 3e-7, kind === 'log' ? 1e-7 : 0);
  });

  test('special values', async () => {
    using s = new Scope(device());
    const x = tensor(s, 'f32', [8], [0, -0, Infinity, -Infinity, NaN, 1e-42, 88.7, -103]);
    const of = async (kind: UnaryKind, a = 0, b = 0) => Array.from(await valuesOf(unary(s, kind, x, a, b)));
    expect(await of('is_nonfinite')).toEqual([0, 0, 1, 1, 1, 0, 0, 0]);
    const e = await of('exp');
    expect(e.slice(0, 6)).toEqual([1, 1, Infinity, 0, NaN, 1]);
    expect(Math.abs(e[6]! / Math.exp(88.69999694824219) - 1)).toBeLessThan(4e-7);
    expect(e[7]).toBe(Math.fround(Math.exp(-103)));
    expect(await of('neg')).toEqual([-0, 0, -Infinity, Infinity, NaN, expect.closeTo(-1e-42, 44), expect.anything(), 103]); // prettier-ignore
    expect((await of('sigmoid')).slice(0, 5)).toEqual([0.5, 0.5, 1, 0, NaN]);
    expect((await of('relu')).slice(0, 5)).toEqual([0, -0, Infinity, 0, NaN]);
    expect((await of('clamp', -2, 50)).slice(2)).toEqual([50, -2, NaN, expect.anything(), 50, -2]);
    expect(await of('affine', 2, 1)).toEqual([
      1,
      1,
      Infinity,
      -Infinity,
      NaN,
      1,
      Math.fround(178.39999389648438),
      -205,
    ]);
    expect((await of('tanh')).slice(0, 5)).toEqual([0, -0, 1, -1, NaN]);
  });

  test('any dtypes, strides and lengths', async () => {
    using s = new Scope(device());
    for (const n of [1, 3, 8, 17, 1025]) {
      for (const dtype of floatDTypes) {
        const x = rounded(dtype, rng.normals(2 * n * 3));
        const t = tensor(s, dtype, [2, n, 3], x, { order: [2, 0, 1], pad: 1 });
        const y = strided(s, 'f32', [2, n, 3], { order: [1, 2, 0], pad: 2 });
        unary(s, 'silu', t, 0, 0, y);
        await expectClose(y, x.map((v) => v / (1 + Math.exp(-v)))); // prettier-ignore
      }
    }
    expect(unary(s, 'exp', s.empty('f32', [0, 4])).count).toBe(0);
  });
});

onDevices('binary', (device, rng) => {
  const plain = {
    add: (a: number, b: number) => a + b,
    sub: (a: number, b: number) => a - b,
    mul: (a: number, b: number) => a * b,
    div: (a: number, b: number) => a / b,
    max: Math.max,
    min: Math.min,
    equal: (a: number, b: number) => +(a === b),
  };
  test.each(Object.keys(plain) as (keyof typeof plain)[])('%s with broadcasts and alpha', async (kind) => {
    using s = new Scope(device());
    for (const dtype of floatDTypes) {
      const a = rounded(
        dtype,
        Array.from({ length: 4 * 5 * 37 }, () => rng.integer(-9, 9)),
      );
      const b = rounded(
        dtype,
        Array.from({ length: 5 }, () => rng.integer(1, 9)),
      );
      const x = tensor(s, dtype, [4, 5, 37], a, { order: [1, 0, 2], pad: 3 });
      const y = tensor(s, dtype, [5, 1], b);
      const expected = a.map((v, i) => plain[kind](v, 2 * b[Math.floor(i / 37) % 5]!));
      await expectClose(binary(s, kind, x, y, { alpha: 2, out: s.empty('f32', [4, 5, 37]) }), expected);
      await expectClose(binary(s, kind, x, y, { alpha: 2 }), expected);
    }
  });

  test('NaN wins over numbers; in place; 32-bit integers are exact', async () => {
    using s = new Scope(device());
    const a = tensor(s, 'f32', [4], [NaN, 1, NaN, 2]);
    const b = tensor(s, 'f32', [4], [1, NaN, NaN, 3]);
    await expectSame(binary(s, 'max', a, b), [NaN, NaN, NaN, 3]);
    await expectSame(binary(s, 'min', a, b), [NaN, NaN, NaN, 2]);
    const x = tensor(s, 'f32', [3], [1, 2, 3]);
    binary(s, 'add', x, x, { out: x });
    await expectSame(x, [2, 4, 6]);
    const i = tensor(s, 'i32', [2], [2 ** 30 + 1, -7]);
    await expectSame(binary(s, 'add', i, tensor(s, 'i32', [1], [1])), [2 ** 30 + 2, -6]);
  });
});

onDevices('reduce and norm_add', (device, rng) => {
  const fold: Record<string, (x: Values) => number> = {
    sum: (x) => x.reduce((a, b) => a + b, 0),
    mean: (x) => x.reduce((a, b) => a + b, 0) / x.length,
    max: (x) => Math.max(...x),
    min: (x) => Math.min(...x),
    absmax: (x) => Math.max(...x.map(Math.abs)),
    sumsq: (x) => x.reduce((a, b) => a + b * b, 0),
    argmax: (x) => x.indexOf(Math.max(...x)),
    argmin: (x) => x.indexOf(Math.min(...x)),
  };
  test.each(Object.keys(fold))('%s along every axis', async (kind) => {
    using s = new Scope(device());
    for (const dtype of floatDTypes) {
      const shape = [5, 300, 7];
      const values = rounded(
        dtype,
        Array.from({ length: 5 * 300 * 7 }, () => rng.integer(-60, 60) / 8 + 1),
      ); // many ties
      const t = tensor(s, dtype, shape, values);
      for (const axis of [0, 1, 2]) {
        const outer = shape.slice(0, axis).reduce((a, b) => a * b, 1);
        const inner = shape.slice(axis + 1).reduce((a, b) => a * b, 1);
        const n = shape[axis]!;
        const expected = Array.from({ length: outer * inner }, (_, i) =>
          fold[kind]!(
            Float64Array.from({ length: n }, (_, j) => values[(Math.floor(i / inner) * n + j) * inner + (i % inner)]!),
          ),
        );
        const y = reduce(s, kind as 'sum', t, axis);
        expect(y.shape).toEqual(shape.toSpliced(axis, 1));
        if (y.dtype === 'i32') await expectSame(y, expected);
        else await expectClose(y, expected);
      }
    }
  });

  test('a NaN wins; a million small terms keep their sum', async () => {
    using s = new Scope(device());
    const t = tensor(s, 'f32', [2, 4], [1, NaN, 5, NaN, -1, -2, -3, -4]);
    await expectSame(reduce(s, 'max', t, 1), [NaN, -1]);
    await expectSame(reduce(s, 'argmin', t, 1), [1, 3]);
    await expectSame(reduce(s, 'absmax', t, 0), [1, NaN, 5, NaN]);
    const long = tensor(s, 'f32', [1, 1_000_003], new Float32Array(1_000_003).fill(0.1));
    const sum = (await reduce(s, 'sum', long, 1).float32())[0]!;
    expect(Math.abs(sum / (1_000_003 * Math.fround(0.1)) - 1)).toBeLessThan(1e-6);
  });

  test('norm_add sums squares of what is finite and counts the rest', async () => {
    using s = new Scope(device());
    const out = tensor(s, 'f32', [2], [10, 1]);
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, rng.normals(3 * 50_000));
      x[7] = NaN;
      x[100_000] = -Infinity;
      const before = (await out.float32())[0]!;
      normAdd(out, tensor(s, dtype, [3, 50_000], x, { pad: 5 }));
      const [sum, bad] = await out.float32();
      const expected = before + x.reduce((a, v) => a + (Number.isFinite(v) ? v * v : 0), 0);
      expect(Math.abs(sum! / expected - 1)).toBeLessThan(1e-6);
      expect(bad).toBe(1 + 2 * (floatDTypes.indexOf(dtype) + 1));
    }
    normAdd(out, s.empty('f32', [0]));
  });
});

onDevices('norms', (device, rng) => {
  for (const offset of [0, 1]) {
    test(`rmsnorm and its gradients as PyTorch, offset ${offset}`, async () => {
      using s = new Scope(device());
      const at = (name: string) => load(s, `rmsnorm/${offset}/${name}`);
      const expected = (name: string) => known.f32(`rmsnorm/${offset}/${name}`);
      const rstd = s.empty('f32', [7]);
      await expectClose(rmsnorm(s, at('x'), at('w'), 1e-5, { offset, rstd }), expected('y'));
      await expectClose(rstd, expected('rstd'));
      const dw = tensor(s, 'f32', [45], new Array(45).fill(3));
      await expectClose(rmsnormBackward(s, at('dy'), at('x'), at('w'), rstd, { offset, dw }), expected('dx'));
      await expectClose(dw, expected('dw').map((v) => v + 3)); // prettier-ignore
    });
  }

  test('layernorm as PyTorch', async () => {
    using s = new Scope(device());
    const at = (name: string) => load(s, `layernorm/${name}`);
    await expectClose(layernorm(s, at('x'), at('w'), at('b'), 1e-5), known.f32('layernorm/y'));
    await expectClose(layernorm(s, at('x'), undefined, undefined, 1e-5), known.f32('layernorm/plain'));
  });

  test('rmsnorm of every dtype, of strided rows, of tiny and of huge values', async () => {
    using s = new Scope(device());
    const [t, c] = [6, 517];
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, rng.normals(t * c));
      const w = rounded('bf16', rng.normals(c));
      const norm = (i: number) => Math.sqrt(x.subarray(i * c, i * c + c).reduce((a, v) => a + v * v, 0) / c + 1e-6);
      const norms = Array.from({ length: t }, (_, i) => norm(i));
      const y = rmsnorm(s, tensor(s, dtype, [t, c], x, { pad: 7 }), tensor(s, 'bf16', [c], w), 1e-6);
      await expectClose(y, x.map((v, i) => (v / norms[Math.floor(i / c)]!) * w[i % c]!)); // prettier-ignore
    }
    const extreme = tensor(s, 'f32', [3, 4], [1e-30, 0, 0, 0, 1e18, 1e18, -1e18, 0, 0, 0, 0, 0]);
    const y = await valuesOf(rmsnorm(s, extreme, undefined, 1e-30));
    expect(y.every(Number.isFinite)).toBe(true);
    expect(y[4]).toBeCloseTo(2 / Math.sqrt(3), 5);
  });
});

onDevices('swiglu', (device, rng) => {
  const cases = [['silu', 0], ['silu', 2], ['gelu', 0], ['gelu_tanh', 0], ['relu2', 0]] as const; // prettier-ignore
  test.each(cases)('%s with limit %d and its gradients as PyTorch', async (kind, limit) => {
    using s = new Scope(device());
    const at = (name: string) => load(s, `swiglu/${kind}/${limit}/${name}`);
    const expected = (name: string) => known.f32(`swiglu/${kind}/${limit}/${name}`);
    await expectClose(swiglu(s, at('gate'), at('up'), kind, limit), expected('y'));
    const { dgate, dup } = swigluBackward(s, at('dy'), at('gate'), at('up'), kind, limit);
    await expectClose(dgate, expected('dgate'));
    await expectClose(dup, expected('dup'));
  });

  test('halves of one stacked tensor, every dtype', async () => {
    using s = new Scope(device());
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, rng.normals(4 * 2 * 1100));
      const both = tensor(s, dtype, [4, 2200], x);
      const y = swiglu(s, both.slice(1, 0, 1100), both.slice(1, 1100, 2200));
      const at = (r: number, c: number) => x[r * 2200 + c]!;
      await expectClose(y, Array.from({ length: 4400 }, (_, i) => {
        const [r, c] = [Math.floor(i / 1100), i % 1100];
        return (at(r, c) / (1 + Math.exp(-at(r, c)))) * at(r, c + 1100);
      })); // prettier-ignore
    }
  });

  const activations = ['sigmoid', 'silu', 'gelu', 'tanh', 'softplus', 'gelu_tanh', 'relu', 'relu2', 'exp', 'square', 'abs', 'neg'] as const; // prettier-ignore
  test.each(activations)('the slope of %s as PyTorch', async (kind) => {
    using s = new Scope(device());
    const x = load(s, 'unary/x');
    const ones = tensor(s, 'f32', x.shape, new Array(x.count).fill(1));
    const { dgate } = swigluBackward(s, ones, x, ones, kind);
    await expectEach(dgate, known.f32(`unary/${kind}/slope`), 2e-6, 2e-6);
  });
});

onDevices('softmax and losses', (device, rng) => {
  test('softmax and its gradient as PyTorch', async () => {
    using s = new Scope(device());
    const y = softmax(s, load(s, 'softmax/x'), 0.7);
    await expectClose(y, known.f32('softmax/y'));
    await expectClose(softmaxBackward(s, load(s, 'softmax/dy'), y, 0.7), known.f32('softmax/dx'));
  });

  test('softmax of masked and of enormous scores, every dtype', async () => {
    using s = new Scope(device());
    await expectSame(softmax(s, tensor(s, 'f32', [2, 3], [-Infinity, 1e30, -Infinity, 7, 7, -Infinity])), [0, 1, 0, 0.5, 0.5, 0]); // prettier-ignore
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, rng.normals(3 * 1030, 3));
      const sums = [0, 1, 2].map((r) => x.subarray(r * 1030, (r + 1) * 1030).reduce((a, v) => a + Math.exp(v), 0));
      await expectClose(softmax(s, tensor(s, dtype, [3, 1030], x)), x.map((v, i) => Math.exp(v) / sums[Math.floor(i / 1030)]!)); // prettier-ignore
    }
  });

  test('cross-entropy and its gradient as PyTorch', async () => {
    using s = new Scope(device());
    const logits = load(s, 'cross_entropy/x');
    const targets = tensor(s, 'i32', [6], known.i32('cross_entropy/targets'));
    const [lse, top] = [s.empty('f32', [6]), s.empty('i32', [6])];
    await expectClose(crossEntropy(s, logits, targets, { lse, top }), known.f32('cross_entropy/loss'));
    await expectClose(lse, known.f32('cross_entropy/lse'));
    await expectSame(top, known.i32('cross_entropy/top'));
    await expectClose(crossEntropyBackward(s, logits, targets, lse, 0.25), known.f32('cross_entropy/dx'));
  });

  test('a certain prediction costs nothing, an impossible one is infinite; ties go to the lower index', async () => {
    using s = new Scope(device());
    const logits = tensor(s, 'f32', [3, 3], [1e4, 0, 0, -Infinity, 2, 2, 5, 5, 5]);
    const top = s.empty('i32', [3]);
    const loss = await valuesOf(crossEntropy(s, logits, tensor(s, 'i32', [3], [0, 0, 2]), { top }));
    expect([loss[0], loss[1]]).toEqual([0, Infinity]);
    expect(loss[2]).toBeCloseTo(Math.log(3), 6);
    await expectSame(top, [0, 1, 0]);
    crossEntropy(s, logits, tensor(s, 'i32', [3], [0, 3, 2]));
    if (device().kind === 'cpu') await expect(device().sync()).rejects.toThrow('targets[1] = 3 of 3');
    else
      await device()
        .sync()
        .catch(() => undefined);
  });

  test('KL divergence and its gradient as PyTorch, exactly 0 for equal rows', async () => {
    using s = new Scope(device());
    const [p, q] = [load(s, 'kl/p'), load(s, 'kl/q')];
    const { kl, same } = klRows(s, p, q);
    await expectClose(kl, known.f32('kl/kl'));
    await expectSame(same, known.f32('kl/same'));
    expect((await kl.float32())[2]).toBe(0);
    await expectClose(klBackward(s, p, q, 3), known.f32('kl/dq'));
  });

  test('losses of bf16 logits over a wide vocabulary', async () => {
    using s = new Scope(device());
    const [t, v] = [3, 9001];
    for (const dtype of floatDTypes) {
      const [p, q] = [rounded(dtype, rng.normals(t * v, 3)), rounded(dtype, rng.normals(t * v, 3))];
      const row = (x: Values, r: number) => x.subarray(r * v, r * v + v);
      const lse = (x: Values) => Math.log(x.reduce((a, b) => a + Math.exp(b), 0));
      const kl = [0, 1, 2].map((r) => {
        const [a, b] = [row(p, r), row(q, r)];
        const [la, lb] = [lse(a), lse(b)];
        return a.reduce((sum, x, i) => sum + Math.exp(x - la) * (x - la - b[i]! + lb), 0);
      });
      const [x, y] = [tensor(s, dtype, [t, v], p, { pad: 3 }), tensor(s, dtype, [t, v], q)];
      await expectClose(klRows(s, x, y).kl, kl);
      const loss = crossEntropy(s, x, tensor(s, 'i32', [t], [5, 0, v - 1]));
      await expectClose(loss, [5, 0, v - 1].map((i, r) => lse(row(p, r)) - p[r * v + i]!)); // prettier-ignore
      expect(await bytesOf(klRows(s, x, y).kl)).toEqual(await bytesOf(klRows(s, x, y).kl));
    }
  });
});

onDevices('rope', (device, rng) => {
  test('halves as Llama, pairs as DeepSeek; inverse turns back', async () => {
    using s = new Scope(device());
    const [x, cos, sin] = [load(s, 'rope/x'), load(s, 'rope/cos'), load(s, 'rope/sin')];
    const positions = tensor(s, 'i32', [2, 5], known.i32('rope/positions'));
    for (const interleaved of [false, true]) {
      const y = rope(s, x, cos, sin, positions, { interleaved });
      await expectClose(y, known.f32(interleaved ? 'rope/pairs' : 'rope/halves'));
      await expectClose(rope(s, y, cos, sin, positions, { interleaved, inverse: true }), known.f32('rope/x'));
    }
  });

  test('part of the channels, first or last, every dtype, strided', async () => {
    using s = new Scope(device());
    const [b, n, h, d, r] = [2, 3, 2, 20, 8];
    const angle = (p: number, i: number) => (p + 1) / (i + 1);
    const table = (f: (x: number) => number) => Array.from({ length: 7 * (r / 2) }, (_, i) => f(angle(Math.floor(i / (r / 2)), i % (r / 2)))); // prettier-ignore
    const [cos, sin] = [rounded('f32', table(Math.cos)), rounded('f32', table(Math.sin))];
    const positions = Array.from({ length: b * n }, () => rng.integer(0, 6));
    for (const dtype of floatDTypes) {
      const x = rounded(dtype, rng.normals(b * n * h * d));
      for (const fromEnd of [false, true])
        for (const interleaved of [false, true]) {
          const expected = Float64Array.from(x);
          for (let row = 0; row < b * n * h; row++)
            for (let i = 0; i < r / 2; i++) {
              const at = row * d + (fromEnd ? d - r : 0);
              const [j, k] = interleaved ? [at + 2 * i, at + 2 * i + 1] : [at + i, at + i + r / 2];
              const e = positions[Math.floor(row / h)]! * (r / 2) + i;
              expected[j] = x[j]! * cos[e]! - x[k]! * sin[e]!;
              expected[k] = x[k]! * cos[e]! + x[j]! * sin[e]!;
            }
          const t = tensor(s, dtype, [b, n, h, d], x, { order: [0, 2, 1, 3], pad: 4 });
          const [c, z] = [tensor(s, 'f32', [7, r / 2], cos), tensor(s, 'f32', [7, r / 2], sin)];
          await expectClose(rope(s, t, c, z, tensor(s, 'i32', [b, n], positions), { fromEnd, interleaved }), expected);
        }
    }
  });
});

// Backward rules against central differences of the forward ops, in fp32 with steps that keep 4 digits.
onDevices('gradients against finite differences', (device, rng) => {
  async function check(
    inputs: { shape: number[]; values: Values }[],
    forward: (s: Scope, ...x: Tensor[]) => Tensor,
    backward: (s: Scope, dy: Tensor, ...x: Tensor[]) => Tensor[],
  ): Promise<void> {
    using s = new Scope(device());
    const upload = (values: Values, shape: number[]) => tensor(s, 'f32', shape, values);
    const tensors = inputs.map((x) => upload(x.values, x.shape));
    const y = forward(s, ...tensors);
    const dy = rounded('f32', rng.normals(y.count));
    const loss = async (t: Tensor) => (await valuesOf(t)).reduce((sum, v, i) => sum + v * dy[i]!, 0);
    const gradients = backward(s, upload(dy, [...y.shape]), ...tensors);
    for (const [k, { shape, values }] of inputs.entries()) {
      if (!gradients[k]) continue;
      const got = await valuesOf(gradients[k]);
      for (let trial = 0; trial < 12; trial++) {
        const i = rng.integer(0, values.length - 1);
        const step = 2 ** -7;
        const at = async (d: number) => {
          const moved = values.with(i, values[i]! + d);
          return loss(forward(s, ...tensors.map((t, j) => (j === k ? upload(moved, shape) : t))));
        };
        // Richardson: the error is of fourth order in the step.
        const [a, b] = [((await at(step)) - (await at(-step))) / (2 * step), ((await at(2 * step)) - (await at(-2 * step))) / (4 * step)]; // prettier-ignore
        expect(Math.abs(got[i]! - (4 * a - b) / 3)).toBeLessThan(2e-3 * (1 + Math.abs(got[i]!)));
      }
    }
  }
  const make = (...shape: number[]) => ({ shape, values: rounded('f32', rng.normals(shape.reduce((a, b) => a * b))) });
  /** No steps across 0, where relu2 has a second derivative that jumps: differences are not of fourth order there. */
  const clear = ({ shape, values }: ReturnType<typeof make>) => ({
    shape,
    values: values.map((x) => (Math.abs(x) < 2 ** -5 ? x + 0.25 : x)),
  });

  test('rmsnorm', () =>
    check(
      [make(4, 19), make(19)],
      (s, x, w) => rmsnorm(s, x, w, 1e-5, { offset: 1 }),
      (s, dy, x, w) => {
        const [rstd, dw] = [s.empty('f32', [4]), s.zeros('f32', [19])];
        rmsnorm(s, x, w, 1e-5, { offset: 1, rstd });
        return [rmsnormBackward(s, dy, x, w, rstd, { offset: 1, dw }), dw];
      },
    ));
  test.each(['silu', 'gelu', 'gelu_tanh', 'relu2'] as const)('swiglu with %s', (kind) =>
    check(
      [clear(make(3, 11)), make(3, 11)],
      (s, g, u) => swiglu(s, g, u, kind),
      (s, dy, g, u) => Object.values(swigluBackward(s, dy, g, u, kind)),
    ),
  );
  test('softmax', () =>
    check(
      [make(3, 13)],
      (s, x) => softmax(s, x, 1.3),
      (s, dy, x) => [softmaxBackward(s, dy, softmax(s, x, 1.3), 1.3)],
    ));
  test('rope turns gradients back', () => {
    const tables = (s: Scope) => [rng0(s, Math.cos), rng0(s, Math.sin), s.from('i32', [1, 3], Int32Array.of(0, 2, 1))] as const; // prettier-ignore
    const rng0 = (s: Scope, f: (x: number) => number) => tensor(s, 'f32', [3, 4], Array.from({ length: 12 }, (_, i) => f(i))); // prettier-ignore
    return check(
      [make(1, 3, 2, 8)],
      (s, x) => rope(s, x, ...tables(s)),
      (s, dy) => [rope(s, dy, ...tables(s), { inverse: true })],
    );
  });
});

onDevices('gradients in narrow dtypes', (device, rng) => {
  test.each(['bf16', 'f16'] as FloatDType[])('%s inputs, against the same in fp32', async (dtype) => {
    using s = new Scope(device());
    const make = (...shape: number[]) => {
      const values = rounded(dtype, rng.normals(shape.reduce((a, b) => a * b)));
      return [tensor(s, dtype, shape, values), tensor(s, 'f32', shape, values)] as const;
    };
    const [[x, x32], [dy, dy32], [g, g32]] = [make(5, 70), make(5, 70), make(5, 70)];
    const rstd = s.empty('f32', [5]);
    rmsnorm(s, x32, undefined, 1e-5, { rstd });
    const same = async (a: Tensor, b: Tensor) => expectClose(a, await valuesOf(b));
    await same(rmsnormBackward(s, dy, x, undefined, rstd), rmsnormBackward(s, dy32, x32, undefined, rstd));
    await same(swigluBackward(s, dy, g, x).dgate, swigluBackward(s, dy32, g32, x32).dgate);
    const y = cast(s, softmax(s, x32), dtype);
    await same(softmaxBackward(s, dy, y), softmaxBackward(s, dy32, cast(s, y, 'f32')));
    await same(klBackward(s, x, g, 1, dtype), klBackward(s, x32, g32, 1));
    const [targets, lse] = [tensor(s, 'i32', [5], [1, 2, -1, 0, 69]), s.empty('f32', [5])];
    crossEntropy(s, x32, targets, { lse });
    await same(crossEntropyBackward(s, x, targets, lse, 2), crossEntropyBackward(s, x32, targets, lse, 2));
  });
});
