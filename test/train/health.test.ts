import { describe, expect, test } from 'vitest';
import { GradientHealth } from '../../src/tune/health.js';
import { cosine } from '../../src/tune/schedule.js';

const step = (norm: number, blocks: number[] = [norm, norm], more: { clipped?: boolean; nonFinite?: number } = {}) => ({
  ...{ norm, clipped: false, nonFinite: 0, ...more },
  blocks: new Map(blocks.map((value, i) => [i, value])),
});
const kinds = (health: GradientHealth) => health.alarms.map(({ kind, block }) => (block === undefined ? kind : `${kind} ${block}`)); // prettier-ignore

describe('gradient health', () => {
  test('healthy runs raise nothing', () => {
    const health = new GradientHealth();
    for (let i = 0; i < 50; i++) health.observe(step(1 + (i % 5), [1, 3, 9, 5], { clipped: i % 5 === 0 }));
    expect(kinds(health)).toEqual([]);
    expect(health.summary()).toMatchObject({ steps: 50, clippedShare: 0.2, medianNorm: 3, largestNorm: 5 });
  });
  test('a norm above ten times its median so far', () => {
    const health = new GradientHealth();
    for (const norm of [1, 2, 1.5, 14]) expect(health.observe(step(norm))).toEqual([]);
    expect(health.observe(step(21))).toEqual([expect.objectContaining({ kind: 'exploding', step: 5 })]);
  });
  test('adjacent blocks more than a factor of ten apart: the one out of line is named, once', () => {
    const small = new GradientHealth();
    for (let i = 0; i < 9; i++) small.observe(step(2, [1, 1.5, 0.09, 1]));
    expect(kinds(small)).toEqual(['vanishing 2']);
    const large = new GradientHealth();
    for (let i = 0; i < 9; i++) large.observe(step(20, [1, 17, 1, 1.1]));
    expect(kinds(large)).toEqual(['exploding 1']);
    const outside = new GradientHealth();
    for (let i = 0; i < 9; i++) outside.observe({ ...step(2), blocks: new Map([[-1, 100], [0, 1], [1, 2]]) }); // prettier-ignore
    expect(kinds(outside)).toEqual([]);
  });
  test('more than 30% of the steps clipped', () => {
    const health = new GradientHealth();
    for (let i = 0; i < 20; i++) health.observe(step(1, [1, 1], { clipped: i % 3 === 0 }));
    expect(kinds(health)).toEqual(['clipped']);
  });
  test('values that are not finite', () => {
    const health = new GradientHealth();
    health.observe(step(NaN, [NaN, 1], { nonFinite: 3 }));
    health.observe(step(1));
    expect(kinds(health)).toEqual(['non-finite']);
    expect(health.summary()).toMatchObject({ steps: 1, skipped: 1, nonFinite: 3, medianNorm: 1 });
  });
  test('gradients of zero, and a held-out loss that runs away', () => {
    const still = new GradientHealth();
    still.observe(step(0, [0, 0]));
    expect(kinds(still)).toEqual(['vanishing']);
    const dead = new GradientHealth();
    for (const norm of [2, 0]) dead.observe(step(norm));
    expect(kinds(dead)).toEqual(['exploding']);
    const away = new GradientHealth();
    expect(away.judge(2)).toEqual([]);
    expect(away.judge(2.9)).toEqual([]);
    expect(away.judge(3.1)).toHaveLength(1);
    expect(kinds(away)).toEqual(['exploding']);
    const broken = new GradientHealth();
    broken.judge(1);
    expect(broken.judge(NaN)).toHaveLength(1);
  });
  test('goes on from what was stored', () => {
    const whole = new GradientHealth();
    const first = new GradientHealth();
    for (let i = 0; i < 6; i++) for (const one of [whole, first]) one.observe(step(1 + i, [1, i]));
    const second = new GradientHealth(JSON.parse(JSON.stringify(first.state())) as ReturnType<GradientHealth['state']>);
    for (const one of [whole, second]) one.observe(step(90, [1, 2], { clipped: true }));
    expect(second.summary()).toEqual(whole.summary());
    expect(kinds(second)).toContain('exploding');
  });
});

test('the schedule rises, turns, falls to its end', () => {
  const rates = Array.from({ length: 11 }, (_, i) => cosine(i, 10, 2, 0.1));
  expect(rates[0]).toBe(0.5);
  expect(rates[1]).toBe(1);
  expect(rates[2]).toBe(1);
  expect(rates[6]).toBeCloseTo(0.1 + 0.9 * 0.5, 12);
  expect(rates[10]).toBeCloseTo(0.1, 12);
});
