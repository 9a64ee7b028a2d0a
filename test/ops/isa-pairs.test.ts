// The tests of ops that use AVX-512's pair products of bf16 once more on their kernels, with the instruction emulated: not
// every processor has it.
import { expect, test } from 'vitest';
import { openDevice } from '../../src/backend/load.js';

process.env.DEEPSEEK_CONVERT_ISA = 'pairs';
await import('./gemm.test.js');
await import('./attention.test.js');
await import('./linalg.test.js');

test.runIf(process.arch === 'x64')('the emulated pair products are in use', () => {
  const device = openDevice({ kind: 'cpu' });
  expect(device.info().isa).toBe('avx2+pairs');
  device.close();
});
