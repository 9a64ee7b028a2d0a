import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { useNativeHasher } from '../base/digest.js';
import { noResource } from '../base/errors.js';
import { Device } from './device.js';
import { Group } from './group.js';
import type { DeviceOptions, NativeModule } from './types.js';

const packageRoot = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const buildFolder = (): string => process.env.DEEPSEEK_CONVERT_BUILD ?? join(packageRoot, 'build');
const require = createRequire(import.meta.url);

/**
 * What was built here, else what a platform package brings (deepseek-convert-linux-x64, ...-linux-x64-cuda: see
 * scripts/release.mjs); where there is neither, the place of a build.
 */
function nativeFile(name: string, variant = ''): string {
  const built = join(buildFolder(), name);
  if (existsSync(built) || process.env.DEEPSEEK_CONVERT_BUILD !== undefined) return built;
  try {
    return require.resolve(`deepseek-convert-${process.platform}-${process.arch}${variant}/${name}`);
  } catch {
    return built;
  }
}

let native: NativeModule | undefined;

/** Loads the addon; the only place that touches a `.node` file. */
export function loadNative(): NativeModule {
  if (native) return native;
  const path = nativeFile('deepseek_convert.node');
  if (!existsSync(path)) {
    throw noResource('The native core is not built', {
      where: path,
      hint: packageRoot.includes('node_modules')
        ? `Without a compiler: npm install deepseek-convert-${process.platform}-${process.arch}. With one: npm --prefix ${packageRoot} run build:native`
        : 'Run: npm run build:native   (needs a C++17 compiler; Debian: apt-get install g++)',
    });
  }
  try {
    native = require(path) as NativeModule;
  } catch (cause) {
    throw noResource('The native core does not load on this machine', {
      where: path,
      got: cause instanceof Error ? cause.message : String(cause),
      hint: 'Rebuild it here: npm run build:native',
      cause,
    });
  }
  if (native.Hasher) useNativeHasher(native.Hasher);
  return native;
}

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
