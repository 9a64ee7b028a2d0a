import { describe, expect, test } from 'vitest';
import { codeTensors } from '../../src/train/blockwise.js';
import { binary, dequantize, quantize, unary } from '../../src/tensor/ops.js';
import { Tape } from '../../src/tensor/tape.js';
import { Scope } from '../../src/tensor/tensor.js';
import { defaultAdam, Optimizer } from '../../src/tune/parameters.js';
import { QuantizedUnit } from '../../src/tune/weights.js';
import { testEnv } from '../arch/support.js';

const { device } = testEnv();

describe('zero points of a quantized linear', () => {
  test('learn to hold weights that the codes cut off, as whole numbers', async () => {
    using scope = new Scope(device);
    const [n, k, group] = [4, 64, 32];
    // From 0.5 to 5 in cells of 0.5: codes -8..7 reach 3.5 with a zero point of 0, and 5 with one of -3.
    const wanted = Float32Array.from({ length: n * k }, (_, i) => 0.5 + (4.5 * ((i * 37) % 64)) / 63);
    const target = scope.from('f32', [n, k], wanted);
    const grid = {
      scale: scope.from('f32', [n, 2], new Float32Array(2 * n).fill(0.5)),
      zero: scope.zeros('f32', [n, 2]),
      ...{ low: -8, high: 7, group },
    };
    const codes = { names: ['x.weight'], codes: quantize(scope, target, grid), grid, stored: 'f32', stacked: false } as const; // prettier-ignore
    const rates = { weights: 1, scales: 0, lora: 0 };
    const unit = await QuantizedUnit.make(scope, codes, { kind: 'full' }, rates, 0, 0);
    expect(unit.parameters.map(({ name }) => name)).toEqual(['x.weight', 'x.scale', 'x.zero']);
    using optimizer = new Optimizer(device, unit.parameters, { ...defaultAdam, clip: 1e9 });
    const error = async (w = unit.value(scope, 'f32')) =>
      (await binary(scope, 'sub', w, target).float32()).reduce((sum, d) => sum + d * d, 0);
    const before = await error();
    for (let step = 0; step < 80; step++) {
      using tape = new Tape(device);
      optimizer.leaves(tape);
      const w = tape.record(() => unit.value(tape.scope, 'f32'));
      const d = binary(tape.scope, 'sub', w, target);
      unary(tape.scope, 'affine', d, 2, 0, d);
      tape.seed(w, d);
      tape.backward();
      await optimizer.step(0.05);
    }
    const learned = unit.result(scope);
    const zero = await learned.grid.zero!.float32();
    expect([...zero]).toEqual([...zero].map(Math.round));
    expect(Math.max(...zero)).toBeLessThanOrEqual(-2);
    expect(Math.min(...zero)).toBeGreaterThanOrEqual(-8);
    expect(await error()).toBeLessThan(before / 4);
    // What is saved, and stored, is what was judged.
    expect(codeTensors([learned])).toContain(learned.grid.zero);
    expect(await dequantize(scope, learned.codes, learned.grid).float32()).toEqual(await unit.value(scope, 'f32').float32()); // prettier-ignore
  });
});
