import { existsSync } from 'node:fs';
import { noResource } from '../base/errors.js';
import { Device } from './device.js';
import { Group } from './group.js';
import { loadNative, nativeFile } from './native.js';
import type { DeviceOptions } from './types.js';

/** Where the CUDA module would be; `existsSync` tells whether it was built. */
export const cudaLibraryPath = (): string => nativeFile('libdeepseek_convert_cuda.so', '-cuda');

/** Opens a device, or throws with the reason: `cuda` never falls back (see `openBestDevice`). */
export function openDevice(options: DeviceOptions): Device {
  const module = loadNative();
  if (options.kind === 'cpu') return new Device(module, '', options);
  const library = cudaLibraryPath();
  if (!existsSync(library)) {
    throw noResource('The CUDA module is not built', {
      where: library,
      hint: 'It needs nvcc (CUDA 12.8 or newer): set CUDA_HOME, then npm run build:native. Or use --device cpu.',
    });
  }
  try {
    return new Device(module, library, options);
  } catch (cause) {
    throw noResource('The GPU could not be opened', {
      got: cause instanceof Error ? cause.message : String(cause),
      hint: 'deepseek-convert doctor shows what was looked for. Or use --device cpu.',
      cause,
    });
  }
}

/** `--device auto`: CUDA, else the CPU with the reason why. */
export function openBestDevice(options: Omit<DeviceOptions, 'kind'>): { device: Device; reason: string | undefined } {
  try {
    return { device: openDevice({ ...options, kind: 'cuda' }), reason: undefined };
  } catch (error) {
    const reason = error instanceof Error ? error.message.split('\n')[0]! : String(error);
    return { device: openDevice({ ...options, kind: 'cpu' }), reason };
  }
}

/** Joins devices of one kind. Error: no NCCL, with the places where it was looked for. */
export const joinDevices = (devices: readonly Device[]): Group => new Group(loadNative(), devices);
