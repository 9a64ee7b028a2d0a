// All op tests once more with the kernels that any processor can run: the ones written for newer processors hide them.
import { expect, test } from 'vitest';
import { openDevice } from '../../src/backend/load.js';

process.env.DEEPSEEK_CONVERT_ISA = 'base';
await import('./move.test.js');
await import('./gemm.test.js');
await import('./layers.test.js');
await import('./attention.test.js');
await import('./experts.test.js');
await import('./linalg.test.js');
await import('./quant.test.js');
await import('./pack.test.js');
await import('./encode.test.js');
await import('./train.test.js');

test('the plain kernels are in use', () => {
  const device = openDevice({ kind: 'cpu' });
  expect(device.info().isa).toBe('base');
  device.close();
});
