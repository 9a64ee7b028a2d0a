// Runs the op tests and every architecture on CUDA, then the comparisons of test/gpu; prints one table. Called by
// scripts/test-gpu.sh; `node run.mjs <folder of compiled tests> [name filter]`. With DEEPSEEK_CONVERT_TEST_CUDA=0 the
// CPU alone: to try the suite itself.
import { readdirSync } from 'node:fs';
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';
import { runAll } from 'vitest';

const [folder = 'build/gpu', filter = ''] = process.argv.slice(2);
const onCuda = (process.env.DEEPSEEK_CONVERT_TEST_CUDA ??= '1') === '1';
const ops = resolve(folder, 'test/ops');
// isa-base is the op tests once more with the plainest kernels, for all that comes after it in the same process.
const suites = readdirSync(ops).filter((file) => file.endsWith('.test.js') && !file.startsWith('isa-base'));
for (const name of suites.sort()) {
  await import(pathToFileURL(join(ops, name)).href);
} // prettier-ignore
await import(pathToFileURL(resolve(folder, 'test/arch/device.test.js')).href);
// The CPU's own too: a GPU host's processor may have units (AMX) that others lack.
const result = await runAll((name) => / on (cuda|cpu)/.test(name) && name.includes(filter));
const width = Math.max(...result.rows.map((row) => row.name.length));
console.log(`\n${'op tests'.padEnd(width)}  passed  failed      ms`);
for (const row of result.rows) {
  console.log(`${row.name.padEnd(width)}  ${String(row.passed).padStart(6)}  ${String(row.failed).padStart(6)}  ${row.ms.toFixed(0).padStart(6)}`); // prettier-ignore
}
for (const failure of result.failures) console.log(`FAILED ${failure}`);
if (filter === '' && result.passed === 0) result.failed = 1; // then no test has found its way here
const { compareAll } = await import(pathToFileURL(resolve(folder, 'test/gpu/compare.js')).href);
const seed = Number(process.env.DEEPSEEK_CONVERT_TEST_SEED ?? Date.now() % 1_000_000);
const compared = onCuda ? await compareAll(filter, seed) : { passed: 0, failed: 0 };
const { endToEnd } = await import(pathToFileURL(resolve(folder, 'test/gpu/end-to-end.js')).href);
const whole = endToEnd(['cpu', onCuda ? 'cuda' : 'cpu'], filter);
const [passed, failed] = [
  result.passed + compared.passed + whole.passed,
  result.failed + compared.failed + whole.failed,
];
console.log(`tests: ${passed} passed, ${failed} failed`);
process.exit(failed === 0 && passed > 0 ? 0 : 1);
