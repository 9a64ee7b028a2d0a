// Builds the native core with AddressSanitizer and UndefinedBehaviorSanitizer and runs all tests of operations, checksums and
// copies on it.
import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = fileURLToPath(new URL('..', import.meta.url));
const run = (command, args, env = {}) => {
  const { status } = spawnSync(command, args, { cwd: root, stdio: 'inherit', env: { ...process.env, ...env } });
  if (status !== 0) process.exit(status ?? 1);
};

run(process.execPath, ['scripts/build-native.mjs', '--sanitize', '--out', 'build/sanitize']);
// Node itself is built without: the runtime has to be there before it.
const runtime = spawnSync(process.env.CXX ?? 'g++', ['-print-file-name=libasan.so'], {
  encoding: 'utf8',
}).stdout.trim();
if (!existsSync(runtime)) {
  console.error('The compiler has no libasan.so (Debian: apt-get install libasan8)');
  process.exit(4);
}
const tests = [
  'test/ops',
  'test/unit/base/digest.test.ts',
  'test/unit/checkpoint/copy-range.test.ts',
  'test/unit/formats/safetensors.test.ts',
  'test/fuzz/texts.test.ts',
];
run(process.execPath, ['node_modules/vitest/vitest.mjs', 'run', '--reporter', 'dot', ...tests], {
  LD_PRELOAD: runtime,
  ASAN_OPTIONS: 'detect_leaks=0', // what V8 keeps at exit is not ours to free
  DEEPSEEK_CONVERT_BUILD: join(root, 'build/sanitize'),
});
