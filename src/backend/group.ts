import { noResource } from '../base/errors.js';
import { Device, type Collective } from './device.js';
import type { NativeModule, TensorView } from './types.js';

/** Several devices of one kind in this process that add up and exchange tensors: GPUs through NCCL, CPUs in memory. */
export class Group {
  /** Rank by rank. */
  readonly devices: readonly Device[];

  /** Error: the devices cannot be joined. */
  constructor(native: NativeModule, devices: readonly Device[]) {
    this.devices = devices;
    try {
      Device.join(native, devices);
    } catch (cause) {
      throw noResource('These devices cannot work together', {
        where: devices.map(({ kind, index }) => `${kind}:${index}`).join(', '),
        got: cause instanceof Error ? cause.message : String(cause),
        hint: 'GPUs need NCCL: pip install nvidia-nccl-cu13, or apt-get install libnccl2, or name its folder in DEEPSEEK_CONVERT_CUDA_LIBRARIES. One GPU needs nothing of it.',
        cause,
      });
    }
  }

  /**
   * A collective operation in place (dc_collective in native/backend.h) on tensors[rank][i]; the same number and sizes on
   * every rank. It is enqueued on all ranks before anything else can be, so none waits for one that is not coming.
   */
  run(kind: Collective, tensors: readonly (readonly TensorView[])[]): void {
    this.devices.forEach((device, rank) => device.collective(kind, tensors[rank]!));
  }
}
