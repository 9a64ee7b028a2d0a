import { openDevice } from '../../src/backend/load.js';
import type { DType } from '../../src/base/dtype.js';
import type { TensorEntry } from '../../src/formats/types.js';
import type { LayoutReader } from '../../src/layout/types.js';
import { dequantize } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { must } from './engine.js';

const device = openDevice({ kind: 'cpu', threads: 1, memoryLimit: 64 * 2 ** 20, poison: true });
/** Codes, scales and weights of all linears, as a job reads them. */
export async function readLinears(
  layout: LayoutReader,
  tensors: ReadonlyMap<string, TensorEntry>,
  columns?: unknown,
): Promise<unknown[]> {
  const found: unknown[] = [];
  for (const linear of layout.linears(tensors).values()) {
    const [n, padded] = linear.shape;
    // What the architecture asks for may be less: stored words are whole.
    const k = columns === undefined || padded - Number(columns) >= 32 ? padded : Math.min(padded, Number(columns));
    if (!(n * k <= 2 ** 20 && n * k > 0)) continue;
    using scope = new Scope(device);
    const load = (entry: TensorEntry, dtype: DType) => Promise.resolve(scope.zeros(dtype, entry.shape));
    try {
      const { codes, grid } = await linear.read(scope, load, n, k);
      must(codes.shape.join() === [n, k].join(), linear.name, 'shape of its codes');
      const weights = await dequantize(scope, codes, grid).float32();
      must(weights.length === n * k, linear.name, 'number of weights');
      found.push([linear.bits, linear.parts.size]);
    } catch (error) {
      await device.sync().catch(() => undefined);
      throw error;
    }
  }
  return found;
}
