import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { Random } from '../../../src/base/rng.js';
import { balanceLoad } from '../../../src/moe/balance.js';
import { choose, scoresOf } from '../../../src/moe/choose.js';
import { bestWithin, groupExperts, limitedGradient } from '../../../src/moe/groups.js';
import { judgeRouter, loadOf } from '../../../src/moe/judge.js';
import { RouterFitter } from '../../../src/moe/router.js';
import type { Choice } from '../../../src/moe/shape.js';
import { storeRouter } from '../../../src/moe/store-router.js';
import { choiceGradient, gather, matmulT, random, route } from '../../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../../src/tensor/tensor.js';
import { fixture, testEnv } from '../../arch/support.js';

const env = testEnv();
const expected = JSON.parse(readFileSync(fixture('moe/groups.json'), 'utf8')) as {
  readonly x: number[][];
  readonly weight: number[][];
  readonly bias: number[];
  readonly active: number;
  readonly groups: number;
  readonly topGroups: number;
  readonly limited: number[][];
  readonly free: number[][];
};
const limit = { groups: expected.groups, topGroups: expected.topGroups };

const matrix = (s: Scope, rows: readonly (readonly number[])[]) =>
  s.from('f32', [rows.length, rows[0]!.length], Float32Array.from(rows.flat()));
const normal = (s: Scope, seed: number, ...dims: number[]): Tensor => {
  const x = s.empty('f32', dims);
  random(x, 'normal', seed, 0, 1);
  return x;
};
/** The chosen experts of each token, ascending. */
async function sets(idx: Tensor): Promise<number[][]> {
  const [all, k] = [[...(await idx.int32())], idx.dim(1)];
  return Array.from({ length: idx.dim(0) }, (_, t) => all.slice(t * k, (t + 1) * k).sort((a, b) => a - b));
}

describe('group-limited routing', () => {
  const { x, weight, bias, active, limited, free } = expected;

  it("is transformers' (Glm4MoeTopkRouter) on scores, and on the router that is stored", async () => {
    using s = new Scope(env.device);
    const router = { weight: matrix(s, weight), bias: s.from('f32', [bias.length], Float32Array.from(bias)) };
    const hidden = matrix(s, x);
    const scores = scoresOf(s, hidden, router);
    expect(await sets(choose(s, scores, { active, limit }))).toEqual(limited);
    expect(await sets(choose(s, scores, { active }))).toEqual(free);
    expect(limited).not.toEqual(free);
    const stored = await storeRouter(s, router, hidden, { scoring: 'sigmoid', selectionBias: true });
    const logits = matmulT(s, hidden, stored.weight);
    const container = { topK: active, scoring: 'sigmoid', bias: stored.bias!, groupScore: 'top2', ...limit } as const;
    expect(await sets(route(s, logits, container).idx)).toEqual(limited);
  });

  it('does not depend on what the scores of a token have in common', async () => {
    using s = new Scope(env.device);
    const scores = normal(s, 4, 64, 16);
    const shifted = s.from(
      'f32',
      [64, 16],
      (await scores.float32()).map((v, i) => v + 300 * Math.sin(i >> 4)),
    );
    const choice = { active: 5, limit: { groups: 4, topGroups: 2 } };
    expect(await sets(choose(s, shifted, choice))).toEqual(await sets(choose(s, scores, choice)));
  });

  it('learns among the experts of open groups, and which groups to open', async () => {
    using s = new Scope(env.device);
    const [tokens, experts, size, k] = [64, 12, 3, 4];
    const [scores, worth] = [normal(s, 1, tokens, experts), normal(s, 2, tokens, experts)];
    const soft = { active: k, temperature: 0.5, scale: 1 };
    const got = await limitedGradient(s, scores, worth, { ...soft, limit: { groups: 4, topGroups: 2 } }).float32();
    const values = await scores.float32();
    let [seen, moved] = [0, 0];
    for (let t = 0; t < tokens; t++) {
      const row = [...values.subarray(t * experts, (t + 1) * experts)];
      const groups = [0, 1, 2, 3].map((g) => {
        const members = [0, 1, 2].map((i) => g * size + i).sort((a, b) => row[b]! - row[a]!);
        return { members, score: row[members[0]!]! + row[members[1]!]! };
      });
      const ranked = groups.toSorted((a, b) => b.score - a.score);
      const open = ranked.slice(0, 2).flatMap(({ members }) => members);
      const idx = s.from('i32', [6], Int32Array.from(open));
      const part = (of: Tensor) => gather(s, of.slice(0, t, t + 1), idx, 1);
      const alone = await choiceGradient(s, part(scores), part(worth), soft).float32();
      const gradient = (e: number) => got[t * experts + e]!;
      // Beside the experts' own part the two best of a group have its part, the same for both; over all groups it sums to 0.
      const own = (e: number) => (open.includes(e) ? alone[open.indexOf(e)]! : 0);
      let sum = 0;
      for (const { members } of groups) {
        const [first, second, third] = members.map((e) => gradient(e) - own(e));
        expect(third).toBeCloseTo(0, 5);
        expect(second).toBeCloseTo(first!, 5);
        sum += first!;
        moved += Math.abs(first!);
        seen++;
      }
      expect(sum).toBeCloseTo(0, 5);
    }
    expect(moved / seen).toBeGreaterThan(0.01);
  });

  it('a trained router keeps more of what is left under the limit than one that does not know of it', async () => {
    using s = new Scope(env.device);
    const [tokens, c, experts] = [3072, 16, 12];
    const random = new Random(5);
    const gauss = () => Math.sqrt(-2 * Math.log(1 - random.uniform())) * Math.cos(2 * Math.PI * random.uniform());
    const directions = Array.from({ length: experts * c }, gauss);
    const states = Float32Array.from({ length: 2 * tokens * c }, gauss);
    const energies = new Float32Array(2 * tokens * experts);
    for (let i = 0; i < energies.length; i++) {
      const [t, e] = [Math.floor(i / experts), i % experts];
      let dot = 0;
      for (let j = 0; j < c; j++) dot += states[t * c + j]! * directions[e * c + j]!;
      energies[i] = (1 + (e % 3)) * Math.max(dot, 0) ** 4;
    }
    const x = s.from('f32', [2 * tokens, c], states);
    const energy = s.from('f32', [2 * tokens, experts], energies);
    const half = (of: Tensor, part: 0 | 1) => of.slice(0, part * tokens, (part + 1) * tokens);
    for (const [active, margin] of [
      [3, 0.004],
      [2, 0],
    ] as const) {
      // prettier-ignore
      const choice = { active, limit: { groups: 4, topGroups: 1 } };
      const kept = async (fitted: Choice) => {
        const fitter = await RouterFitter.make(s, half(x, 0), { intercept: true, lambda: 1e-3, seed: 1, ...fitted });
        const router = await fitter.train(s, await fitter.ridge(s, half(energy, 0)), half(energy, 0), 120);
        return (await judgeRouter(half(x, 1), half(energy, 1), router, choice)).kept;
      };
      expect(await kept(choice)).toBeGreaterThan((await kept({ active: choice.active })) + margin);
    }
  });

  it('puts experts that are chosen together into one group', async () => {
    using s = new Scope(env.device);
    const [tokens, experts, groups] = [512, 12, 4];
    const random = new Random(9);
    // Each token likes the experts of one residue class.
    const x = new Float32Array(tokens * groups);
    for (let t = 0; t < tokens; t++) x[t * groups + random.below(groups)] = 1;
    const likes = Float32Array.from({ length: experts * groups }, (_, i) => +(Math.floor(i / groups) % groups === i % groups)); // prettier-ignore
    const router = { weight: s.from('f32', [experts, groups], likes), bias: s.zeros('f32', [experts]) };
    const expertOf = Int32Array.from({ length: 60 }, (_, n) => n % experts);
    const choice = { active: 3, limit: { groups, topGroups: 1 } };
    const placed = await groupExperts(expertOf, s.from('f32', [tokens, groups], x), router, choice, 0);
    expect([...new Set(placed)].sort((a, b) => a - b)).toEqual(Array.from({ length: experts }, (_, e) => e));
    for (let n = 0; n < 60; n++) {
      for (let m = 0; m < n; m++) {
        expect(placed[n] === placed[m], `${n}, ${m}`).toBe(expertOf[n] === expertOf[m]);
        const together = expertOf[n]! % groups === expertOf[m]! % groups;
        expect(Math.floor(placed[n]! / 3) === Math.floor(placed[m]! / 3)).toBe(together);
      }
    }
  });

  it('the best choice within the limit is nearly the best of all choices of groups, and never beyond', () => {
    const [tokens, experts, size, active] = [200, 16, 4, 5];
    const random = new Random(1);
    const values = Float32Array.from({ length: tokens * experts }, () => random.uniform() ** 3);
    const best = bestWithin(values, experts, { active, limit: { groups: 4, topGroups: 2 } });
    let [got, most, exact] = [0, 0, 0];
    for (let t = 0; t < tokens; t++) {
      const row = values.subarray(t * experts, (t + 1) * experts);
      const sum = (list: readonly number[]) => list.reduce((total, v) => total + v, 0);
      let whole = 0;
      for (let a = 0; a < 4; a++) {
        for (let b = 0; b < a; b++) {
          const open = [a, b].flatMap((g) => [...row.subarray(g * size, (g + 1) * size)]);
          whole = Math.max(whole, sum(open.sort((p, q) => q - p).slice(0, active)));
        }
      }
      const chosen = [...best.subarray(t * active, (t + 1) * active)];
      expect(new Set(chosen).size).toBe(active);
      expect(new Set(chosen.map((e) => Math.floor(e / size))).size).toBeLessThanOrEqual(2);
      const kept = sum(chosen.map((e) => row[e]!));
      expect(kept).toBeLessThan(whole + 1e-6);
      exact += +(kept > whole - 1e-6);
      got += kept;
      most += whole;
    }
    expect(got / most).toBeGreaterThan(0.995);
    expect(exact / tokens).toBeGreaterThan(0.8);
  });
});

describe('balanced loads', () => {
  it.each([undefined, { groups: 4, topGroups: 2 }])('reach the bound on the tokens they are balanced on, limit %o', async (within) => {
    using s = new Scope(env.device);
    const [tokens, experts, active] = [4096, 16, 5];
    const x = normal(s, 1, tokens, 8);
    const skew = Float32Array.from({ length: experts }, (_, e) => (e === 3 ? 2 : e === 7 ? -3 : 0.3 * Math.sin(e)));
    const router = { weight: normal(s, 2, experts, 8), bias: s.from('f32', [experts], skew) };
    const choice = { active, limit: within };
    const load = async (r: typeof router) => loadOf(await choose(s, scoresOf(s, x, r), choice).int32(), active, experts); // prettier-ignore
    const before = await load(router);
    for (const bound of [0.5, 0.05]) {
      const balanced = await balanceLoad(s, x, router, choice, bound);
      const after = await load(balanced.router);
      expect(balanced.maxVio[0]).toBeCloseTo(before.maxVio, 5);
      expect(balanced.maxVio[1]).toBeCloseTo(after.maxVio, 5);
      expect(before.maxVio).toBeGreaterThan(0.6);
      expect(after.maxVio).toBeLessThanOrEqual(bound);
      expect(balanced.steps).toBeLessThan(120);
      // Biases are only lowered, and only of experts that would get too much: loads below the bound cost nothing.
      const moved = (await balanced.router.bias.float32()).map((b, e) => b - skew[e]!);
      expect(moved.every((m) => m <= 0)).toBe(true);
      expect(moved[7]).toBe(0);
      expect(moved[3]).toBeLessThan(-0.1);
      const mean = active / experts;
      after.share.forEach((share, e) => expect(moved[e] === 0 || share > mean * (1 + 0.6 * bound), `${e}`).toBe(true));
      expect(await balanced.router.weight.float32()).toEqual(await router.weight.float32());
    }
    expect((await balanceLoad(s, x, router, choice, 100)).steps).toBe(0);
  }); // prettier-ignore
});
