import { readFileSync } from 'node:fs';
import { afterAll, describe, expect, it } from 'vitest';
import { forwardContext } from '../../../src/arch/context.js';
import { openModel } from '../../../src/arch/open.js';
import { WeightReader } from '../../../src/arch/weights.js';
import { ward } from '../../../src/moe/surgery/cluster.js';
import { importance, keepLargest, measureUse } from '../../../src/moe/surgery/importance.js';
import { keptOn } from '../../../src/moe/surgery/judge.js';
import { chooseExperts, routedOutput, routedWeights, type RoutedWeights } from '../../../src/moe/surgery/layer.js'; // prettier-ignore
import { mergeNetworks, mergeRows } from '../../../src/moe/surgery/merge.js';
import { searchExperts } from '../../../src/moe/surgery/search.js';
import { run } from '../../../src/nn/run.js';
import type { MoeLayerSpec } from '../../../src/nn/moe.js';
import { cast, fill, gather, matmulT, random } from '../../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../../src/tensor/tensor.js';
import { archCase, fixture, relativeError, testEnv } from '../../arch/support.js';

const env = testEnv();
const scope = new Scope(env.device);
afterAll(() => scope[Symbol.dispose]());

type Sums = Record<'counts' | 'activations' | 'norms' | 'energies', number[]>;
/** From transformers and numpy: fixtures/moe/make_surgery.py. */
const expected = JSON.parse(readFileSync(fixture('moe/surgery.json'), 'utf8')) as {
  use: Record<string, Sums>;
  ward: { points: number[][]; masses: number[]; clusters: number[][] }[];
};

/** Each mixture layer of a model with what its router sees of some tokens. */
async function layersOf(path: string, rows: number, length: number) {
  const open = await openModel(path);
  const { model } = open;
  const reader = new WeightReader(open, env.device, 'f32');
  const ids = Int32Array.from({ length: rows * length }, (_, i) => (i * 1237 + 11) % model.vocab);
  const outer = await reader.outer(scope);
  let state = model.embed(scope.from('i32', [rows, length], ids), forwardContext(scope, model, outer, rows, length));
  const layers: { index: number; m: MoeLayerSpec; weights: RoutedWeights; x: Tensor }[] = [];
  for (const [i, block] of model.blocks.entries()) {
    const weights = await reader.block(i, scope);
    const ctx = forwardContext(scope, model, weights, rows, length, { tokens: ids });
    state = run(block.forward(state, ctx), ctx, (call) => {
      if (call.kind !== 'linear' || call.linears[0]!.name !== block.moe?.router.name) return undefined;
      const { layer } = block.moe;
      layers.push({ index: i, m: layer, weights: routedWeights(layer, weights), x: cast(scope, call.x, 'f32') });
      return undefined;
    });
  }
  await open.close();
  return layers;
}

describe('what experts do', () => {
  it('is what transformers counts and sums (moe-6m)', async () => {
    const layers = await layersOf(fixture('moe-6m'), 8, 64);
    expect(layers.map(({ index }) => String(index))).toEqual(Object.keys(expected.use));
    for (const { index, m, weights, x } of layers) {
      const [use, want] = [await measureUse(m, weights, x), expected.use[index]!];
      expect([...use.counts]).toEqual(want.counts);
      for (const key of ['activations', 'norms', 'energies'] as const) {
        expect(relativeError(use[key], want[key]), `layer ${index}, ${key}`).toBeLessThan(1e-5);
      }
      const ratio = (sums: number[]) => sums.map((sum, e) => sum / want.counts[e]!);
      expect(relativeError(importance(use, 'reap', 0), ratio(want.norms))).toBeLessThan(1e-5);
      expect(relativeError(importance(use, 'activation', 0), ratio(want.activations))).toBeLessThan(1e-5);
      expect(importance(use, 'frequency', 0)).toEqual(use.counts);
    }
  });

  it('is nothing where no token comes', () => {
    const none = Float64Array.of(0, 0);
    const use = { counts: none, activations: none, norms: none, energies: none, tokens: 5 };
    expect([...importance(use, 'reap', 0)]).toEqual([0, 0]);
    expect(importance(use, 'random', 1)).not.toEqual(importance(use, 'random', 2));
  });
});

describe('the largest', () => {
  it('are kept, ties to the lower index, as many in each group', () => {
    expect(keepLargest([3, 1, 3, 9, 2, 2], 3, 1)).toEqual([0, 2, 3]);
    expect(keepLargest([3, 1, 4, 9, 2, 2], 4, 2)).toEqual([0, 2, 3, 4]);
    expect(keepLargest([9, 8, 7, 1, 2, 3], 2, 2)).toEqual([0, 5]);
  });
});

/** |y' - y|^2 with some of the experts, by leaving out rows of router and networks. */
async function lossOf(m: MoeLayerSpec, w: RoutedWeights, x: Tensor, kept: number[]): Promise<number> {
  using s = new Scope(env.device);
  const idx = s.from('i32', [kept.length], Int32Array.from(kept));
  const rows = (t: Tensor) => gather(s, t.view(t.dim(0), -1), idx).view(kept.length, ...t.shape.slice(1));
  const less = { router: rows(w.router), bias: w.bias && rows(w.bias.view(-1, 1)).view(-1), gate: rows(w.gate), up: rows(w.up), down: rows(w.down) }; // prettier-ignore
  const [a, b] = [await routedOutput(s, { ...m, experts: kept.map((e) => m.experts[e]!) }, less, x).float32(), await routedOutput(s, m, w, x).float32()]; // prettier-ignore
  return a.reduce((sum, v, i) => sum + (v - b[i]!) ** 2, 0);
}

describe('the search', () => {
  it.each(['mixtral', 'qwen2_moe', 'olmoe', 'glm4_moe'])('takes the expert that the layer misses least (%s)', async (name) => {
    for (const { m, weights, x } of await layersOf(archCase(name), 2, 32)) {
      const all = m.experts.map((_, e) => e);
      const kept = await searchExperts(m, weights, x, all.length - 1, 1);
      const losses = await Promise.all(all.map((e) => lossOf(m, weights, x, all.filter((other) => other !== e))));
      expect(kept).toEqual(all.filter((e) => e !== losses.indexOf(Math.min(...losses))));
    }
  }); // prettier-ignore

  it('keeps groups equal, and finds the best one of each (deepseek_v3)', async () => {
    const [{ m, weights, x }] = (await layersOf(archCase('deepseek_v3', { config: (c) => Object.assign(c, { n_group: 2, num_experts_per_tok: 2 }) }), 2, 32)) as [Awaited<ReturnType<typeof layersOf>>[0]]; // prettier-ignore
    const kept = await searchExperts(m, weights, x, 6, 2);
    expect(kept.filter((e) => e < 4)).toHaveLength(3);
    const pairs = [0, 1, 2, 3].flatMap((a) => [4, 5, 6, 7].map((b) => [0, 1, 2, 3, 4, 5, 6, 7].filter((e) => e !== a && e !== b))); // prettier-ignore
    const losses = await Promise.all(pairs.map((set) => lossOf(m, weights, x, set)));
    const own = await lossOf(m, weights, x, kept);
    expect(losses.filter((loss) => loss < own).length).toBeLessThanOrEqual(2); // greedy: one of the best three of 16
  });
});

describe('the router beside the best choice', () => {
  /** All sets of k of the numbers below n. */
  const setsOf = (n: number, k: number, from = 0): number[][] =>
    k === 0 ? [[]] : Array.from({ length: n - from }, (_, i) => from + i).flatMap((e) => setsOf(n, k - 1, e + 1).map((rest) => [e, ...rest])); // prettier-ignore
  const silu = (x: number) => x / (1 + Math.exp(-x));

  it.each([
    ['qwen2_moe', {}, 1, 1],
    ['glm4_moe', {}, 1, 1],
    ['deepseek_v3', { n_group: 4, topk_group: 2, num_experts_per_tok: 3 }, 4, 2],
  ] as const)('is what trying every set of experts says (%s)', async (name, change, groups, open) => {
    for (const { m, weights, x } of await layersOf(
      archCase(name, { config: (c) => Object.assign(c, change) }),
      2,
      16,
    )) {
      const [tokens, hidden] = x.shape as [number, number];
      const [experts, active] = [m.experts.length, m.route.topK];
      const [values, gate, up, down] = await Promise.all([x, weights.gate, weights.up, weights.down].map((t) => t.float32())) as [Float32Array, Float32Array, Float32Array, Float32Array]; // prettier-ignore
      const width = weights.gate.dim(1);
      const chosen = await chooseExperts(scope, m, weights, x).idx.int32();
      let [all, kept, best, both] = [0, 0, 0, 0];
      for (let t = 0; t < tokens; t++) {
        const energy = Array.from({ length: experts }, (_, e) => {
          const h = Array.from({ length: width }, (_, i) => {
            let [g, u] = [0, 0];
            for (let c = 0; c < hidden; c++) {
              g += gate[(e * width + i) * hidden + c]! * values[t * hidden + c]!;
              u += up[(e * width + i) * hidden + c]! * values[t * hidden + c]!;
            }
            return silu(g) * u;
          });
          let sum = 0;
          for (let c = 0; c < hidden; c++) sum += h.reduce((y, v, i) => y + v * down[(e * hidden + c) * width + i]!, 0) ** 2; // prettier-ignore
          return sum;
        });
        const total = (set: readonly number[]) => set.reduce((sum, e) => sum + energy[e]!, 0);
        const allowed = setsOf(experts, active).filter((set) => new Set(set.map((e) => Math.floor((e * groups) / experts))).size <= (groups > 1 ? open : 1e9)); // prettier-ignore
        const top = allowed.reduce((a, b) => (total(b) > total(a) ? b : a));
        const own = [...chosen.subarray(t * active, (t + 1) * active)];
        all += total(energy.map((_, e) => e));
        kept += total(own);
        best += total(top);
        both += own.filter((e) => top.includes(e)).length;
      }
      const found = await keptOn(m, weights, x);
      expect(found.overlap).toBeCloseTo(both / (tokens * active), 12);
      expect(found.kept).toBeCloseTo(kept / all, 5);
      expect(found.oracleKept).toBeCloseTo(best / all, groups > 1 ? 2 : 5); // within groups the best are approached
    }
  });
});

describe('clusters', () => {
  it('are those of Ward under masses', () => {
    for (const { points, masses, clusters } of expected.ward) {
      const distances = Float64Array.from(points.flatMap((a) => points.map((b) => a.reduce((sum, v, i) => sum + (v - b[i]!) ** 2, 0)))); // prettier-ignore
      expect(ward(distances, masses, clusters.length, 1)).toEqual(clusters);
    }
  });

  it('do not cross groups; what nobody uses goes where it is near', () => {
    const at = [0, 10, 0.1, 10.1];
    const distances = Float64Array.from(at.flatMap((a) => at.map((b) => (a - b) ** 2)));
    expect(ward(distances, [1, 1, 1, 1], 2, 1)).toEqual([[0, 2], [1, 3]]); // prettier-ignore
    expect(ward(distances, [1, 1, 1, 1], 2, 2)).toEqual([[0, 1], [2, 3]]); // prettier-ignore
    expect(ward(distances, [1, 1, 0, 1], 3, 1)).toEqual([[0, 2], [1], [3]]);
  });
});

describe('merging', () => {
  const [width, hidden] = [24, 16];
  const normal = (shape: number[], seed: number) => {
    const x = scope.empty('f32', shape);
    random(x, 'normal', seed, 0, 1);
    return x;
  };
  const network = (seed: number) => ({ gate: normal([width, hidden], seed), up: normal([width, hidden], seed + 1), down: normal([hidden, width], seed + 2) }); // prettier-ignore

  it('brings neurons into one order first: an expert and its permutation are the expert', async () => {
    const one = network(1);
    const order = scope.from(
      'i32',
      [width],
      Int32Array.from({ length: width }, (_, i) => (i * 7 + 3) % width),
    );
    const other = { gate: gather(scope, one.gate, order), up: gather(scope, one.up, order), down: gather(scope, one.down, order, 1) }; // prettier-ignore
    const merged = await mergeNetworks(scope, [one, other], [3, 1]);
    for (const part of ['gate', 'up', 'down'] as const) {
      expect(relativeError(await merged[part].float32(), await one[part].float32())).toBeLessThan(1e-6);
    }
  });

  it('weighs by mass; equal parts where there is none', async () => {
    const [a, b] = [network(1), network(10)];
    const plain = await mergeNetworks(scope, [a, b], [0, 5]);
    expect(relativeError(await plain.up.float32(), await b.up.float32())).toBeLessThan(1e-6);
    const same = await mergeNetworks(scope, [a, a], [0, 0]);
    expect(relativeError(await same.down.float32(), await a.down.float32())).toBeLessThan(1e-6);
  });

  it("gives a merged expert the log of the sum of its members' exponentials", async () => {
    // A channel of ones can hold the log of two; two equal rows then become their logit plus it.
    const x = normal([400, hidden], 4);
    fill(x.slice(1, 0, 1), 1);
    const router = normal([3, hidden], 5);
    const rows = scope.from('i32', [3], Int32Array.of(0, 0, 2));
    const twins = gather(scope, router, rows);
    const merged = await mergeRows(scope, twins, [[0, 1]], [1, 2, 1], x);
    const [got, plain] = [await matmulT(scope, x, merged).float32(), await matmulT(scope, x, twins.slice(0, 0, 1)).float32()]; // prettier-ignore
    const surplus = got.map((logit, i) => logit - plain[i]!);
    expect(Math.abs(surplus.reduce((a, b) => a + b, 0) / 400 - Math.log(2))).toBeLessThan(0.01);
    expect(Math.max(...surplus) - Math.min(...surplus)).toBeLessThan(0.05);
  });
});
