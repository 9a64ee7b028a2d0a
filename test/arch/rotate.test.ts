import { readdirSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { hadamardFactors, hadamardOrder, rotateOutputs, rotateRows } from '../../src/arch/hadamard.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { rotated } from '../../src/arch/rotate.js';
import { Scope } from '../../src/tensor/tensor.js';
import { refusal } from '../support/refusal.js';
import { archCase, expected, fixture, relativeError, testEnv } from './support.js';

const env = testEnv();

/** Product of Kronecker factors. */
const kronecker = (factors: readonly number[][][]): number[][] =>
  factors.reduce((a, b) => a.flatMap((row) => b.map((other) => row.flatMap((x) => other.map((y) => x * y)))), [[1]]);

describe('Hadamard matrices', () => {
  it.each([1, 2, 4, 12, 20, 28, 36, 44, 52, 60, 96, 104, 128])('of order %d are orthogonal', (order) => {
    const factors = hadamardFactors(order)!;
    if (order === 52) return expect(factors).toBeUndefined(); // neither Paley's nor a product
    const h = kronecker(factors);
    expect(h).toHaveLength(order);
    expect(h.flat().every((x) => Math.abs(x) === 1)).toBe(true);
    for (let i = 0; i < order; i++) {
      for (let j = 0; j <= i; j++)
        expect(h[i]!.reduce((sum, x, c) => sum + x * h[j]![c]!, 0)).toBe(i === j ? order : 0);
    }
  });

  it('are as large as the width allows', () => {
    const widths = [256, 896, 1536, 2560, 3584, 4096, 5120, 6656, 7168, 8192];
    for (const width of widths) expect(hadamardOrder(width)).toBe(width);
    expect([hadamardOrder(96), hadamardOrder(208), hadamardOrder(7), hadamardOrder(40)]).toEqual([96, 208, 1, 40]);
    expect(hadamardOrder(24 * 7)).toBe(168);
    expect(hadamardOrder(26)).toBe(2);
  });

  it.each([24, 128, 224])('spread each of %d channels over all of them', async (size) => {
    using scope = new Scope(env.device);
    const identity = Float32Array.from({ length: size * size }, (_, i) => Number(i % (size + 1) === 0));
    const q = scope.from('f32', [size, size], identity);
    rotateRows(q, { size, order: size, seed: 5, stream: 0 });
    for (const value of await q.float32()) expect(Math.abs(value) * Math.sqrt(size)).toBeCloseTo(1, 5);
  });

  it('turn rows on the right, and parts of columns on the left, by one orthogonal matrix', async () => {
    using scope = new Scope(env.device);
    const rotation = { size: 26, order: 2, seed: 3, stream: 1 };
    const identity = Float32Array.from({ length: 26 * 26 }, (_, i) => Number(i % 27 === 0));
    const q = scope.from('f32', [26, 26], identity);
    rotateRows(q, rotation);
    const values = await q.float32();
    const w = scope.from(
      'f32',
      [2 * 30, 1],
      Float32Array.from({ length: 60 }, (_, i) => Math.sin(i)),
    );
    rotateOutputs(w, { rotation, width: 30, from: 3 });
    const turned = await w.float32();
    for (let i = 0; i < 60; i++) {
      const [part, row] = [Math.floor(i / 30), (i % 30) - 3];
      let want = Math.sin(i);
      if (row >= 0 && row < 26) {
        want = 0;
        for (let j = 0; j < 26; j++) want += values[j * 26 + row]! * Math.sin(part * 30 + 3 + j);
      }
      expect(turned[i]).toBeCloseTo(want, 5);
    }
  });
});

describe.each(readdirSync(fixture('arch'), { withFileTypes: true }).filter((e) => e.isDirectory()).map(({ name }) => name))('%s', (name) => {
  const refused: Record<string, RegExp> = {
    deepseek_v4: /several hidden states side by side/,
    deepseek_vl: /only carried along/,
    deepseek_vl_hybrid: /only carried along/,
    deepseek_ocr2: /only carried along/,
  };

  it('gives the same logits when it is rotated, or is refused', async () => {
    const plain = await openModel(archCase(name));
    const why = refused[name];
    if (why) {
      expect((await refusal(rotated(plain, 1))).message).toMatch(why);
      return await plain.close();
    }
    const turned = await rotated(plain, 1);
    const { tokens, lengths } = expected(fixture('arch', name, 'expected.safetensors'));
    const [batch] = tokens!.shape as [number];
    const results: Float32Array[] = [];
    const states: Float32Array[] = [];
    for (const open of [plain, turned]) {
      using resident = await ResidentModel.load(open, env, 'f32');
      using scope = new Scope(env.device);
      const x = resident.hidden(scope, tokens!.i32, batch, lengths && { lengths: [...lengths.i32] });
      states.push(await x.float32());
      results.push(await resident.logits(scope, x).float32());
    }
    expect(relativeError(results[1]!, results[0]!)).toBeLessThan(1e-4);
    // Not because nothing has happened.
    expect(relativeError(states[1]!, states[0]!)).toBeGreaterThan(0.1);
    await plain.close();
  });
}); // prettier-ignore
