import type { ByteSource } from '../base/bytes.js';
import type { DType } from '../base/dtype.js';
import { TensorLoader } from '../arch/load.js';
import { matMulNBitsWriter, placeRows, type RowPlace } from '../layout/matmulnbits-writer.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Device } from '../backend/device.js';
import type { ConvertPlan } from './convert-plan.js';
import type { PlannedConversion } from './convert-tensor.js';

/** The codes of quantized linears, as they are, in MatMulNBits' and QMoE's arrangement. */
export function repacked(
  { name, repack, writes, output }: PlannedConversion,
  { source }: ConvertPlan,
  device: Device,
): ByteSource {
  const loader = new TensorLoader(source, device);
  const { module, scheme, block, parts } = repack!;
  const graphType = output.dtype === 'f16' ? 'f16' : 'f32';
  const stored = async (scope: Scope, { linear }: RowPlace): Promise<Tensor> => {
    const { inFeatures, outFeatures } = linear;
    const raw = (entry: Parameters<TensorLoader['raw']>[1], dtype: DType) => loader.raw(scope, entry, dtype);
    const values = await source.tensors.get(`${linear.name}.weight`)!.linear!.read(scope, raw, outFeatures, inFeatures);
    const tensors = matMulNBitsWriter.store(scope, { ...linear, name: module }, scheme, values, graphType, block);
    return tensors.find((tensor) => tensor.name === name)!.tensor;
  };
  return {
    byteLength: writes,
    writeTo: async (fd, position) => {
      using scope = new Scope(device);
      const rows = parts.reduce((sum, { linear }) => sum + linear.outFeatures, 0);
      const whole = scope.empty(output.dtype, output.shape);
      for (const part of parts) {
        using own = new Scope(device);
        placeRows(whole, rows, await stored(own, part), part);
      }
      await whole.source().writeTo(fd, position);
    },
  };
}
