import { describe, expect, test } from 'vitest';
import { forwardContext } from '../../src/arch/context.js';
import { openModel, type OpenModel } from '../../src/arch/open.js';
import { WeightReader } from '../../src/arch/weights.js';
import { Random } from '../../src/base/rng.js';
import type { Weights } from '../../src/nn/calls.js';
import { run } from '../../src/nn/run.js';
import { dequantize, fakeQuant, matmulT, unary, binary, cast } from '../../src/tensor/ops.js';
import { Tape } from '../../src/tensor/tape.js';
import { Scope, Tensor } from '../../src/tensor/tensor.js';
import { archCase, testEnv } from '../arch/support.js';

const env = testEnv();
const random = new Random(7);
const normals = (n: number, deviation = 1): Float32Array =>
  Float32Array.from({ length: n }, () => deviation * Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform())); // prettier-ignore
const dot = (a: ArrayLike<number>, b: ArrayLike<number>): number =>
  Array.from(a).reduce((sum, v, i) => sum + v * b[i]!, 0);

/** All of a tensor's memory, flat: experts of one kind lie in one. */
const whole = (t: Tensor): Tensor => new Tensor(t.storage, 0, t.dtype, [t.storage.bytes / 4], [1]);
const leavesOf = (names: readonly string[], weights: Weights): Tensor[] => [
  ...new Map(names.map((name) => [weights.get(name).storage, whole(weights.get(name))])).values(),
];

/**
 * The derivative of a forward pass along a random direction in all of its inputs and weights, by differences and by
 * the tape, each for several directions: relative difference of the two vectors.
 */
async function compare(leaves: Tensor[], forward: (scope: Scope) => Tensor): Promise<number> {
  using scope = new Scope(env.device);
  const values = await Promise.all(leaves.map((leaf) => leaf.float32()));
  let weight: Float32Array | undefined;
  const f = async () => {
    using inner = new Scope(env.device);
    const y = await forward(inner).float32();
    weight ??= normals(y.length);
    return dot(y, weight);
  };
  await f();
  using tape = new Tape(env.device);
  const grads = leaves.map((leaf) => scope.zeros('f32', leaf.shape));
  leaves.forEach((leaf, i) => tape.leaf(leaf, grads[i]));
  const y = tape.record(() => forward(tape.scope));
  tape.seed(y, scope.from('f32', y.shape, weight!));
  tape.backward();
  const got = await Promise.all(grads.map((grad) => grad.float32()));

  const put = (i: number, data: Float32Array) =>
    env.device.upload(leaves[i]!.buffer, 0, new Uint8Array(data.buffer, data.byteOffset, data.byteLength));
  let [error, energy] = [0, 0];
  // Each leaf on its own: a wrong gradient of a small one must show.
  for (let i = 0; i < leaves.length; i++) {
    const size = Math.sqrt(dot(values[i]!, values[i]!) / values[i]!.length) || 1;
    const at = async (direction: Float32Array, d: number) => {
      put(i, values[i]!.map((v, j) => v + d * direction[j]!)); // prettier-ignore
      return f();
    };
    const along = async (direction: Float32Array, step: number) =>
      ((await at(direction, step)) - (await at(direction, -step))) / (2 * step);
    let [slope, half, tries] = [0, 1, 0];
    let direction: Float32Array = new Float32Array();
    // Two steps that disagree have crossed a place where a router's choice changes.
    for (; Math.abs(slope - half) > 0.02 * Math.abs(slope) && tries < 20; tries++) {
      direction = normals(values[i]!.length, size);
      [slope, half] = [await along(direction, 2e-3), await along(direction, 1e-3)];
    }
    put(i, values[i]!);
    const tapes = dot(got[i]!, direction);
    const own = Math.abs(slope - tapes) / Math.max(Math.abs(slope), Math.abs(tapes), 1e-3 * size);
    expect(own, `leaf ${i} [${leaves[i]!.shape.join(', ')}]: ${slope} by differences, ${tapes} by the tape`).toBeLessThan(0.03); // prettier-ignore
    error += (slope - tapes) ** 2;
    energy += slope ** 2;
  }
  return Math.sqrt(error / energy);
}

describe.each([
  'llama',
  'llama-tied-bias',
  'mistral',
  'qwen2',
  'qwen3',
  'mixtral',
  'olmoe',
  'qwen2_moe',
  'qwen3_moe',
  'glm4_moe',
  'deepseek',
  'deepseek_v2',
  'deepseek_v2-group',
  'deepseek_v3',
  'deepseek_v3-plain',
])('%s', (name) => {
  const inputs = async (body: (open: OpenModel, reader: WeightReader, scope: Scope) => Promise<void>) => {
    const open = await openModel(archCase(name));
    using scope = new Scope(env.device);
    await body(open, new WeightReader(open, env.device, 'f32'), scope);
    await open.close();
  };

  test('gradients of its blocks are those of differences', async () => {
    await inputs(async (open, reader, scope) => {
      const { model } = open;
      // The first block, and the first with experts.
      const indices = new Set([0, Math.max(0, model.blocks.findIndex((block) => block.moe))]); // prettier-ignore
      for (const index of indices) {
        const block = model.blocks[index]!;
        const weights = await reader.block(index, scope);
        const x = scope.from('f32', [2 * 5, model.hidden], normals(10 * model.hidden));
        // The selection bias of a router steers the choice alone.
        const names = block.tensors.filter(({ name, f32, optional }) => !(f32 ?? optional) && weights.has(name)).map((t) => t.name); // prettier-ignore
        const difference = await compare([x, ...leavesOf(names, weights)], (s) => {
          const ctx = forwardContext(s, model, weights, 2, 5, { lengths: [5, 4] });
          return run(block.forward(x, ctx), ctx);
        });
        expect(difference).toBeLessThan(3e-3);
      }
    });
  });

  test('gradients of its embedding, final norm and head are those of differences', async () => {
    await inputs(async (open, reader, scope) => {
      const { model } = open;
      const weights = await reader.outer(scope);
      const names = model.outer.map((spec) => spec.name).filter((key) => weights.has(key));
      const difference = await compare(leavesOf(names, weights), (s) => {
        const ctx = forwardContext(s, model, weights, 1, 4);
        const x = model.embed(s.from('i32', [1, 4], Int32Array.of(1, 3, 3, 0)), ctx);
        return run(model.logits(x, ctx), ctx);
      });
      expect(difference).toBeLessThan(3e-3);
    });
  });
});

describe('weights that are made of parameters', () => {
  test('low-rank additions, in place operations, broadcasts, views', async () => {
    using scope = new Scope(env.device);
    const [a, b, w] = [scope.from('f32', [6, 2], normals(12)), scope.from('f32', [2, 8], normals(16)), scope.from('f32', [6, 8], normals(48))]; // prettier-ignore
    const row = scope.from('f32', [8], normals(8));
    const factor = scope.from('f32', [3, 1], normals(3));
    const x = scope.from('f32', [3, 8], normals(24));
    const difference = await compare([a, b, w, row, factor, x], (s) => {
      const delta = matmulT(s, a, b.transpose());
      const sum = binary(s, 'add', w, delta, { alpha: 0.5 });
      const y = matmulT(s, binary(s, 'mul', x, row), sum);
      unary(s, 'sigmoid', y.slice(1, 0, 3), 0, 0, y.slice(1, 0, 3));
      unary(s, 'clamp', y, -1.5, 1.5, y);
      binary(s, 'mul', y, factor, { out: y });
      return binary(s, 'sub', y, unary(s, 'square', y), { alpha: 2 });
    });
    expect(difference).toBeLessThan(3e-3);
  });

  test('learned scales of fixed codes', async () => {
    using scope = new Scope(env.device);
    const codes = scope.from(
      'i8',
      [4, 8],
      Int8Array.from({ length: 32 }, (_, i) => (i % 16) - 8),
    );
    const scale = scope.from('f32', [4, 2], normals(8));
    const x = scope.from('f32', [3, 8], normals(24));
    const difference = await compare([scale, x], (s) =>
      matmulT(s, x, dequantize(s, codes, { scale, low: -8, high: 7, group: 4 })),
    );
    expect(difference).toBeLessThan(3e-3);
  });

  test('fake quantization in bf16 compute: fp32 gradients of weights and scales, summed over passes', async () => {
    using scope = new Scope(env.device);
    const w = scope.from('f32', [6, 8], normals(48));
    const scale = scope.from('f32', [6, 1], new Float32Array(6).fill(0.4));
    const x = cast(scope, scope.from('f32', [5, 8], normals(40)), 'bf16');
    const [dw, ds] = [scope.zeros('f32', [6, 8]), scope.zeros('f32', [6, 1])];
    const seed = cast(scope, scope.from('f32', [5, 6], new Float32Array(30).fill(1)), 'bf16');
    const once = async () => {
      using tape = new Tape(env.device);
      tape.leaf(w, dw);
      tape.leaf(scale, ds);
      const y = tape.record(() => matmulT(tape.scope, x, fakeQuant(tape.scope, w, { scale, low: -8, high: 7, group: 8 }, 'bf16'))); // prettier-ignore
      tape.seed(y, seed);
      tape.backward();
      return dw.float32();
    };
    const first = await once();
    const twice = await once();
    const columns = await cast(scope, x, 'f32').float32();
    // With a gradient of ones, every row of dw is the sum of x over tokens.
    const want = Array.from({ length: 8 }, (_, j) => [0, 1, 2, 3, 4].reduce((sum, t) => sum + columns[t * 8 + j]!, 0));
    for (let j = 0; j < 8; j++) expect(first[j]).toBeCloseTo(want[j]!, 4);
    for (let i = 0; i < 48; i++) expect(twice[i]).toBe(2 * first[i]!);
    expect((await ds.float32()).some((v) => v !== 0)).toBe(true);
  });
});
