// Packs what a GPU machine without Node, npm and network needs into .carry/: Node itself, the addon, the CUDA module,
// compiled sources and tests, production packages. `npm run test:gpu` unpacks it where there is no Node.
//   node scripts/gpu-pack.mjs [--cuda-arch 90a]
import { execFileSync } from 'node:child_process';
import { cpSync, existsSync, mkdirSync, rmSync, statSync, writeFileSync, readdirSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const { values } = parseArgs({ options: { 'cuda-arch': { type: 'string', default: '90a' } } });
const run = (command, ...args) => execFileSync(command, args, { cwd: root, stdio: ['ignore', 'inherit', 'inherit'] });
const carry = join(root, '.carry');
const stage = join(carry, 'stage');
mkdirSync(carry, { recursive: true });
rmSync(stage, { recursive: true, force: true });

run('node', 'scripts/build-native.mjs', '--cuda', '--cuda-arch', values['cuda-arch']);
try {
  run('npx', 'tsc', '-p', 'tsconfig.gpu.json');
} catch {
  console.error('tsc reported errors; packing what it emitted.');
}

mkdirSync(join(stage, 'build'), { recursive: true });
for (const file of ['deepseek_convert.node', 'libdeepseek_convert_cuda.so'])
  cpSync(join(root, 'build', file), join(stage, 'build', file));
// Without what `npm run test:gpu` puts beside it here: a second stand-in for vitest would take the tests to itself.
const ours = (path) => !/gpu\/(node_modules|fixtures|calibration|schemas|package\.json|run\.mjs)/.test(path);
cpSync(join(root, 'build/gpu'), join(stage, 'build/gpu'), { recursive: true, filter: ours });
cpSync(join(root, 'test/gpu/run.mjs'), join(stage, 'test/gpu/run.mjs'));
writeFileSync(join(stage, 'package.json'), '{"type":"module","version":"0.0.0"}');
// What the command line looks for at its package's root, which is build/gpu here.
for (const name of ['package.json', 'calibration', 'schemas'])
  if (existsSync(join(root, name))) cpSync(join(root, name), join(stage, 'build/gpu', name), { recursive: true });

// Production packages, and of the development ones `expect` alone.
const production = execFileSync('npm', ['ls', '--omit=dev', '--all', '--parseable'], { cwd: root, encoding: 'utf8' })
  .split('\n').filter((line) => line.includes('node_modules')); // prettier-ignore
const extra = ['@vitest/expect', '@vitest/utils', '@vitest/spy', '@vitest/pretty-format', 'chai', 'tinyrainbow', 'assertion-error', '@standard-schema/spec', 'check-error', 'deep-eql', 'loupe', 'pathval', '@types/chai'].map((name) => join(root, 'node_modules', name)); // prettier-ignore
const heavy = ['/node-addon-api', '/node-api-headers', '/@types/'];
for (const folder of [...production, ...extra].filter(
  (path) => existsSync(path) && !heavy.some((h) => path.includes(h)),
)) {
  cpSync(folder, join(stage, folder.slice(root.length + 1)), { recursive: true, filter: (file) => !/\.(map|md|ts|mts|cts)$/.test(file) || /\.wasm/.test(file) }); // prettier-ignore
}
const stand = join(stage, 'node_modules/vitest');
mkdirSync(stand, { recursive: true });
cpSync(join(root, 'test/gpu/vitest.mjs'), join(stand, 'index.mjs'));
writeFileSync(
  join(stand, 'package.json'),
  '{"name":"vitest","version":"0.0.0","type":"module","exports":"./index.mjs"}',
);

const node = join(carry, `node-${process.version}.xz`);
if (!existsSync(node)) {
  for (const old of readdirSync(carry).filter((name) => name.startsWith('node-'))) rmSync(join(carry, old));
  run(
    'sh',
    '-c',
    `xz --x86 --lzma2=preset=6e -T2 -c "${process.execPath}" > "${node}.part" && mv "${node}.part" "${node}"`,
  );
}
run('sh', '-c', `tar -C "${stage}" -c . | xz -T2 -4 > "${join(carry, 'stage.tar.xz')}"`);
rmSync(stage, { recursive: true, force: true });
for (const name of readdirSync(carry))
  console.error(`${(statSync(join(carry, name)).size / 2 ** 20).toFixed(1)} MB  .carry/${name}`);
