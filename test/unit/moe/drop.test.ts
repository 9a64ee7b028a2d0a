import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, it, vi } from 'vitest';
import { dropNeurons, droppedNeurons } from '../../../src/moe/drop.js';
import type { MoeOptions } from '../../../src/moe/options.js';
import { previewMoe, runMoe } from '../../../src/moe/run.js';
import type { Experts } from '../../../src/moe/split.js';
import { cast, random } from '../../../src/tensor/ops.js';
import { Scope } from '../../../src/tensor/tensor.js';
import { fixture, testEnv } from '../../arch/support.js';

vi.setConfig({ testTimeout: 120_000 });
const env = testEnv();
const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

const [count, width, hidden] = [3, 400, 64];
const parts = ['gate', 'up', 'down'] as const;
/** Mean and deviation of each matrix. */
const statistics = { gate: [0.5, 2], up: [-1, 0.25], down: [0, 0.02] } as const;

/** Copies of one network in bf16. */
function copies(s: Scope): Experts {
  const of = (part: (typeof parts)[number], shape: number[], seed: number) => {
    const one = s.empty('f32', [1, ...shape]);
    const [mean, deviation] = statistics[part];
    random(one, 'normal', seed, mean, deviation);
    return cast(s, one.expand(count, ...shape), 'bf16');
  };
  return { gate: of('gate', [width, hidden], 1), up: of('up', [width, hidden], 2), down: of('down', [hidden, width], 3), shared: undefined }; // prettier-ignore
}

/** Bits and values by [part][expert][neuron][channel]. */
async function read(s: Scope, experts: Experts) {
  const of = async (part: (typeof parts)[number]) => {
    const rows = part === 'down' ? experts.down.transpose() : experts[part];
    const values = await cast(s, rows, 'f32').float32();
    const row = (e: number, n: number) => values.subarray((e * width + n) * hidden, (e * width + n + 1) * hidden);
    return Array.from({ length: count }, (_, e) => Array.from({ length: width }, (_, n) => row(e, n)));
  };
  return { gate: await of('gate'), up: await of('up'), down: await of('down') };
}

async function dropped(ratio: number, seed = 7, layer = 0) {
  using s = new Scope(env.device);
  const before = copies(s);
  const after = await dropNeurons(s, before, ratio, seed, layer);
  return { before: await read(s, before), after: await read(s, after) };
}

const equal = (a: Float32Array, b: Float32Array) => a.every((x, i) => x === b[i]);

describe('neurons drawn anew', () => {
  it('are as many as asked for, whole, others in each expert; the rest is untouched to the bit', async () => {
    const { before, after } = await dropped(0.25);
    const lost = Array.from({ length: count }, (_, e) =>
      Array.from({ length: width }, (_, n) => n).filter((n) => !equal(before.gate[e]![n]!, after.gate[e]![n]!)),
    );
    for (let e = 0; e < count; e++) {
      expect(lost[e]).toHaveLength(100);
      for (let n = 0; n < width; n++) {
        const is = lost[e]!.includes(n);
        for (const part of parts)
          expect(equal(before[part][e]![n]!, after[part][e]![n]!), `${part} ${e} ${n}`).toBe(!is);
      }
    }
    expect(lost[0]).not.toEqual(lost[1]);
  });

  it('have mean and deviation of those that they take the place of, in each matrix', async () => {
    const { before, after } = await dropped(0.5);
    for (const part of parts) {
      for (let e = 0; e < count; e++) {
        const [old, fresh] = [before, after].map((all) =>
          all[part][e]!.filter((_, n) => !equal(before[part][e]![n]!, after[part][e]![n]!)).flatMap((row) => [...row]),
        ) as [number[], number[]];
        const [a, b] = [moments(old), moments(fresh)];
        // Five standard errors of 200 x 64 draws.
        expect(Math.abs(b.mean - a.mean)).toBeLessThan((5 * a.deviation) / Math.sqrt(fresh.length));
        expect(Math.abs(b.deviation / a.deviation - 1)).toBeLessThan(5 / Math.sqrt(2 * fresh.length));
        expect(fresh).not.toEqual(old);
      }
    }
  });

  it('are the same for the same seed and layer, and others for others', async () => {
    const [a, b, seed, layer] = await Promise.all([dropped(0.5), dropped(0.5), dropped(0.5, 8), dropped(0.5, 7, 1)]);
    const flat = ({ after }: typeof a) => JSON.stringify(after.up.map((rows) => rows.map((row) => [...row])));
    expect(flat(b)).toBe(flat(a));
    expect(flat(seed)).not.toBe(flat(a));
    expect(flat(layer)).not.toBe(flat(a));
  });

  it('are never none and never all', () => {
    expect([0.001, 0.5, 0.999].map((ratio) => droppedNeurons(10, ratio))).toEqual([1, 5, 9]);
  });
});

function moments(values: readonly number[]) {
  const mean = values.reduce((a, b) => a + b, 0) / values.length;
  return { mean, deviation: Math.sqrt(values.reduce((sum, x) => sum + (x - mean) ** 2, 0) / values.length) };
}

describe('--method drop', () => {
  const job = (more: Partial<MoeOptions>): MoeOptions => ({
    ...{ input: fixture('v1.0/v1.0_checkpoint.bin'), out: join(folder, 'out'), method: 'drop', experts: 2, active: 1 },
    container: 'glm4_moe',
    tool: { name: 'deepseek-convert', version: '0' },
    commandLine: 'deepseek-convert moe',
    ...more,
  });

  it.each(['glm4_moe', 'qwen2_moe'] as const)('is the dense model but for the neurons drawn anew (%s)', async (container) => {
    const report = await runMoe(job({ container, out: join(folder, container), dropRatio: 0.1 }), env);
    expect(report.exactness!.split.relative).toBeLessThan(1e-5);
    expect(report.exactness!.output.relative).toBeGreaterThan(1e-2);
    expect(report.notices.join()).toContain('102 of 1024 neurons are drawn anew');
  }); // prettier-ignore

  it.each([0, 1, -0.5, NaN])('refuses the share %f', async (dropRatio) => {
    await expect(previewMoe(job({ dropRatio }))).rejects.toThrow('must leave neurons and draw neurons anew');
  });

  it('refuses all experts active', async () => {
    await expect(previewMoe(job({ active: 2 }))).rejects.toThrow('only multiplies the work');
  });
});
