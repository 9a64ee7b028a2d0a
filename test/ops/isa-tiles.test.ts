// The tests of ops that use AMX once more on its kernels, with the tile instructions emulated: few processors have them.
import { expect, test } from 'vitest';
import { openDevice } from '../../src/backend/load.js';

process.env.DEEPSEEK_CONVERT_ISA = 'tiles';
await import('./gemm.test.js');
await import('./attention.test.js');
await import('./linalg.test.js');
await import('./quant.test.js');

test.runIf(process.arch === 'x64')('the emulated tiles are in use', () => {
  const device = openDevice({ kind: 'cpu' });
  expect(device.info().isa).toBe('avx2+tiles');
  device.close();
});
