import { expect, test } from 'vitest';
import { forwardContext } from '../../src/arch/context.js';
import { openModel } from '../../src/arch/open.js';
import { WeightReader } from '../../src/arch/weights.js';
import type { Call } from '../../src/nn/calls.js';
import { run } from '../../src/nn/run.js';
import { hessianAdd } from '../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../src/tensor/tensor.js';
import { expected, fixture, relativeError, testEnv } from './support.js';

const env = testEnv();

/** softmax of head `h`'s causal scores, row by row, in double precision. */
function attentionRows(
  q: Float32Array,
  k: Float32Array,
  h: number,
  heads: number,
  kvHeads: number,
  s: number,
): number[] {
  const d = q.length / s / heads;
  const kv = Math.floor(h / (heads / kvHeads));
  const rows: number[] = [];
  for (let i = 0; i < s; i++) {
    const scores = Array.from({ length: i + 1 }, (_, j) => {
      let dot = 0;
      for (let c = 0; c < d; c++) dot += q[(i * heads + h) * d + c]! * k[(j * kvHeads + kv) * d + c]!;
      return dot * d ** -0.5;
    });
    const max = Math.max(...scores);
    const sum = scores.reduce((a, x) => a + Math.exp(x - max), 0);
    for (let j = 0; j < s; j++) rows.push(j <= i ? Math.exp(scores[j]! - max) / sum : 0);
  }
  return rows;
}

test('calls show what transformers has there: inputs of linears, queries and keys of attention', async () => {
  const want = expected(fixture('arch', 'dense-6m.capture.safetensors'));
  const { i32: tokens } = expected(fixture('arch', 'dense-6m.expected.safetensors')).tokens!;
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  const { model } = open;
  using scope = new Scope(env.device);
  const reader = new WeightReader(open, env.device, 'f32');
  const s = tokens.length;
  const hessians = new Map<string, Tensor>();
  const attention = new Map<number, [q: Promise<Float32Array>, k: Promise<Float32Array>]>();
  const watch = (call: Call): undefined => {
    if (call.kind === 'linear') {
      const h = scope.zeros('f32', [call.x.dim(1), call.x.dim(1)]);
      hessianAdd(h, call.x);
      for (const { name } of call.linears) hessians.set(name, h);
    } else if (call.kind === 'attention') {
      attention.set(call.layer, [call.q.float32(), call.k.float32()]);
    }
    return undefined;
  };
  const outer = await reader.outer(scope);
  let x = model.embed(scope.from('i32', [1, s], tokens), forwardContext(scope, model, outer, 1, s));
  for (const [i, block] of model.blocks.entries()) {
    const ctx = forwardContext(scope, model, await reader.block(i, scope), 1, s);
    x = run(block.forward(x, ctx), ctx, watch);
  }

  const names = Object.keys(want).filter((key) => key.startsWith('h.'));
  expect(names).toHaveLength(16);
  for (const key of names) {
    const h = hessians.get(key.slice(2))!;
    const k = h.dim(0);
    const diagonal = (await h.float32()).filter((_, i) => i % (k + 1) === 0);
    expect(relativeError(diagonal, want[key]!.f32), key).toBeLessThan(1e-4);
  }
  const gate = hessians.get('model.layers.2.mlp.gate_proj')!;
  expect(gate).toBe(hessians.get('model.layers.2.mlp.up_proj'));
  const full = await gate.float32();
  const lower = (v: Float32Array, n: number) =>
    Array.from({ length: 48 * 48 }, (_, i) => [Math.floor(i / 48), i % 48] as const)
      .filter(([r, c]) => c <= r)
      .map(([r, c]) => v[r * n + c]!);
  expect(relativeError(lower(full, 256), lower(want.corner!.f32, 48))).toBeLessThan(1e-4);
  for (const layer of [0, 3]) {
    const [q, k] = await Promise.all(attention.get(layer)!);
    const rows = [0, 2].flatMap((h) => attentionRows(q, k, h, model.heads, model.kvHeads, s).slice(-16 * s));
    expect(relativeError(rows, want[`attention.${layer}`]!.f32), `layer ${layer}`).toBeLessThan(1e-5);
  }
  await open.close();
});

test('what a linear was given is freed when it has answered, before the block is through', async () => {
  const open = await openModel(fixture('v1.0', 'v1.0_checkpoint.bin'));
  using scope = new Scope(env.device);
  const weights = await new WeightReader(open, env.device, 'f32').block(0, scope);
  const ctx = forwardContext(scope, open.model, weights, 1, 8);
  const x = scope.zeros('f32', [8, open.model.hidden]);
  const given: [name: string, x: Tensor][] = [];
  const seen: Record<string, boolean[]> = {};
  run(open.model.blocks[0]!.forward(x, ctx), ctx, (call): undefined => {
    if (call.kind === 'linear') given.push([call.linears[0]!.name.split('.').at(-1)!, call.x]);
    const last = given.at(-1);
    if (call.kind === 'attention' || last?.[0] === 'down_proj') {
      seen[call.kind === 'attention' ? 'attention' : last![0]] = given.map(([, one]) => one.storage.freed);
    }
  });
  expect(given.map(([name]) => name)).toEqual(['q_proj', 'o_proj', 'gate_proj', 'down_proj']);
  expect(seen).toEqual({ attention: [true], down_proj: [true, true, true, false] });
  expect(given.every(([, one]) => one.storage.freed)).toBe(true);
  await open.close();
});
