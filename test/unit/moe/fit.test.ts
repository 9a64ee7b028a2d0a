import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/base/rng.js';
import type { Site } from '../../../src/arch/stream.js';
import { clusterNeurons } from '../../../src/moe/cluster.js';
import { bestExperts, judgeRouter } from '../../../src/moe/judge.js';
import { applyMask, routingMask } from '../../../src/moe/masks.js';
import { Activations, mixtureOutput } from '../../../src/moe/mixture.js';
import { refitDown } from '../../../src/moe/refit.js';
import { RouterFitter } from '../../../src/moe/router.js';
import { heldOut, neurons } from '../../../src/moe/sample.js';
import { cut } from '../../../src/moe/split.js';
import { matmulT, random } from '../../../src/tensor/ops.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { fixture, testEnv } from '../../arch/support.js';

const env = testEnv();

interface Ridge {
  readonly x: number[][];
  readonly t: number[][];
  readonly lambda: number;
  readonly weight: number[][];
  readonly bias: number[];
}
interface Refit extends Record<'x' | 'gate' | 'up' | 'down' | 'router' | 'refit', number[][]> {
  readonly lambda: number;
  readonly before: number;
  readonly after: number;
}
const expected = JSON.parse(readFileSync(fixture('moe/expected.json'), 'utf8')) as {
  ridge: Record<'intercept' | 'plain', Ridge>;
  refit: Refit;
};

const matrix = (s: Scope, rows: readonly (readonly number[])[]) =>
  s.from('f32', [rows.length, rows[0]!.length], Float32Array.from(rows.flat()));

const worst = (got: Float32Array, want: readonly number[]): number =>
  got.reduce((max, value, i) => Math.max(max, Math.abs(value - want[i]!)), 0);

describe('ridge router', () => {
  it.each(['intercept', 'plain'] as const)('equals numpy, %s', async (kind) => {
    const { x, t, lambda, weight, bias } = expected.ridge[kind];
    using s = new Scope(env.device);
    const options = { intercept: kind === 'intercept', lambda, active: 2, seed: 0 };
    const fitter = await RouterFitter.make(s, matrix(s, x), options);
    const router = await fitter.ridge(s, matrix(s, t));
    expect(worst(await router.weight.float32(), weight.flat())).toBeLessThan(2e-5);
    expect(worst(await router.bias.float32(), bias)).toBeLessThan(2e-5);
  });
});

describe('trained router', () => {
  it.each([true, false])(
    'keeps more energy of unseen tokens than the ridge router (intercept %s)',
    async (intercept) => {
      const [tokens, c, experts, active] = [3072, 16, 8, 3];
      const random = new Random(5);
      const normal = () => Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform());
      const directions = Array.from({ length: experts * c }, normal);
      const [x, energy] = [new Float32Array(2 * tokens * c), new Float32Array(2 * tokens * experts)];
      for (let t = 0; t < 2 * tokens; t++) {
        for (let j = 0; j < c; j++) x[t * c + j] = normal();
        for (let e = 0; e < experts; e++) {
          let dot = 0;
          for (let j = 0; j < c; j++) dot += x[t * c + j]! * directions[e * c + j]!;
          // Like act(gate) up: grows on one side only, and with the square.
          energy[t * experts + e] = (e + 1) * Math.max(dot, 0) ** 4 + 0.1 * normal() ** 2;
        }
      }
      using s = new Scope(env.device);
      const all = { x: s.from('f32', [2 * tokens, c], x), energy: s.from('f32', [2 * tokens, experts], energy) };
      const fit = { x: all.x.slice(0, 0, tokens), energy: all.energy.slice(0, 0, tokens) };
      const seen = { x: all.x.slice(0, tokens, 2 * tokens), energy: all.energy.slice(0, tokens, 2 * tokens) };
      const fitter = await RouterFitter.make(s, fit.x, { intercept, lambda: 1e-3, active, seed: 1 });
      const ridge = await fitter.ridge(s, fit.energy);
      const trained = await fitter.train(s, ridge, fit.energy, 120);
      const before = await judgeRouter(seen.x, seen.energy, ridge, { active });
      const after = await judgeRouter(seen.x, seen.energy, trained, { active });
      expect(after.kept).toBeGreaterThan(before.kept + 0.002);
      expect(after.kept).toBeLessThan(after.oracleKept);
      if (!intercept) expect([...(await trained.bias.float32())].every((b) => b === 0)).toBe(true);
    },
  );
});

it('the best experts of each token, ties to the lower index', async () => {
  using s = new Scope(env.device);
  const energy = s.from('f32', [3, 4], Float32Array.from([1, 3e4, 3e4, 2e4, 0, 0, 0, 0, 1e-9, 4e-9, 3e-9, 9e-9]));
  expect([...(await (await bestExperts(s, energy, { active: 2 })).int32())]).toEqual([1, 2, 0, 1, 3, 1]);
});

describe('clusters', () => {
  it('finds groups of neurons that fire together', async () => {
    const [tokens, groups, each] = [400, 5, 6];
    const random = new Random(2);
    const z = new Float32Array(tokens * groups * each);
    for (let t = 0; t < tokens; t++) {
      const firing = random.below(groups);
      for (let n = 0; n < groups * each; n++) {
        z[t * groups * each + n] = (n % groups === firing ? 1 : 0.02) * random.uniform() * (1 + n);
      }
    }
    using s = new Scope(env.device);
    const capacities = new Int32Array(groups).fill(each);
    const found = await clusterNeurons(env.device, s.from('f32', [tokens, groups * each], z), capacities, 0);
    const names = new Set<string>();
    found.forEach((expert, n) => names.add(`${expert}:${n % groups}`));
    expect(names.size).toBe(groups);
  });
});

describe('refit of down_proj', () => {
  it('equals numpy, with the penalty that judges best', async () => {
    const r = expected.refit;
    using s = new Scope(env.device);
    const spec = { name: '', inFeatures: 5, outFeatures: 8, role: 'mlp' } as const;
    const ffn = { gate: spec, up: spec, down: spec, activation: 'silu' } as const;
    const x = matrix(s, r.x);
    const w = { gate: matrix(s, r.gate), up: matrix(s, r.up), down: matrix(s, r.down) };
    const router = { weight: matrix(s, r.router), bias: s.zeros('f32', [4]) };
    const shape = { routed: 4, active: 2, shared: 0, width: 2, ffn: 8 };
    const batch = 160;
    const site = {
      tokens: r.x.length,
      each: async (handle: (call: { x: typeof x }, batch: number) => void | Promise<void>) => {
        for (let b = 0; b * batch < r.x.length; b++) await handle({ x: x.slice(0, b * batch, (b + 1) * batch) }, b);
      },
    } as unknown as Site;
    const kept = Int32Array.from(r.x.keys()).filter(heldOut);
    const rows = s.from('i32', [kept.length], kept);
    const held = s.empty('f32', [rows.dim(0), 5]);
    env.device.run('gather', [held, x, rows], [0], []);
    const whole = neurons(s, held, w, ffn);
    const masked = applyMask(s, whole, routingMask(s, held, router, shape), shape);
    const activations = new Activations(s, w, router, shape, ffn.activation);
    const refit = await refitDown(
      s,
      site,
      activations,
      w.down,
      { masked, target: matmulT(s, whole, w.down) },
      heldOut,
      true,
    );
    expect(refit?.lambda).toBe(r.lambda);
    expect(worst(await refit!.down.float32(), r.refit.flat())).toBeLessThan(1e-4);
    expect(r.after).toBeLessThan(r.before);
  });
});

describe('a layer as routed', () => {
  it.each([0, 1])('is the same by experts and by mask, %i shared', async (shared) => {
    const shape = { routed: 6, active: 4, shared, width: 3, ffn: 3 * (6 + shared) };
    using s = new Scope(env.device);
    const normal = (seed: number, ...dims: number[]) => {
      const x = s.empty('f32', dims);
      random(x, 'normal', seed, 0, 1);
      return x;
    };
    const w = { gate: normal(1, shape.ffn, 5), up: normal(2, shape.ffn, 5), down: normal(3, 5, shape.ffn) };
    const router = { weight: normal(4, 6, 5), bias: normal(5, 6) };
    const x = normal(6, 40, 5);
    const experts = cut(s, shape, w, { routedDown: 1, sharedDown: 1, normalized: false }, 'f32');
    const byExpert = await mixtureOutput(s, x, router, experts, shape, 'silu').float32();
    const activations = new Activations(s, w, router, shape, 'silu');
    const byMask = await matmulT(s, activations.take(s, x), w.down).float32();
    expect(worst(byMask, [...byExpert])).toBeLessThan(1e-4);

    // What is kept comes back once, the same as what is computed.
    let kept: number;
    {
      using pass = new Scope(env.device);
      const { masked } = activations.of(pass, x);
      activations.keep(x, masked, pass);
      kept = masked.buffer;
    }
    const [first, second] = [activations.take(s, x), activations.take(s, x)];
    expect(first.buffer).toBe(kept);
    expect(second.buffer).not.toBe(kept);
    expect(await first.float32()).toEqual(await second.float32());
  });
});
