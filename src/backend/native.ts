import { existsSync } from 'node:fs';
import { createRequire } from 'node:module';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { useNativeHasher } from '../base/digest.js';
import { ConvertError, noResource } from '../base/errors.js';
import type { Scanner } from '../base/scanner.js';
import type { NativeModule } from './types.js';

const packageRoot = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
const buildFolder = (): string => process.env.DEEPSEEK_CONVERT_BUILD ?? join(packageRoot, 'build');
const require = createRequire(import.meta.url);

/**
 * What was built here, else what a platform package brings (deepseek-convert-linux-x64, ...-linux-x64-cuda: see
 * scripts/release.mjs); where there is neither, the place of a build.
 */
export function nativeFile(name: string, variant = ''): string {
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

/** What reads large headers fast; undefined where the addon is not built: looking at a model does without. */
export function nativeScanner(): Scanner | undefined {
  try {
    return loadNative().scanner;
  } catch (error) {
    if (error instanceof ConvertError) return undefined;
    throw error;
  }
}
