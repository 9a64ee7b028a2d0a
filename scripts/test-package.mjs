// npm run test:package: what a user without a compiler gets. Packs everything (scripts/release.mjs), serves these files
// and the dependencies of node_modules from a registry on this machine alone, installs from it into an empty folder
// with a PATH that has Node, npm and a shell and no compiler, and runs the demo there. Prints sizes.
import { spawn, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync, mkdirSync, mkdtempSync, readFileSync, readdirSync, rmSync, statSync, symlinkSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { basename, dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const { packages } = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8'));
const work = mkdtempSync(join(tmpdir(), 'deepseek-convert-package-'));
const tarballs = join(work, 'tarballs');
const npmCli = join(dirname(process.execPath), '../lib/node_modules/npm/bin/npm-cli.js');
const npm = process.env.npm_execpath ?? npmCli;
const mb = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;

function check(holds, what) {
  if (!holds) throw new Error(`not as promised: ${what}`);
  console.log(`ok  ${what}`);
}
/** Waits without blocking: the registry of this process must answer meanwhile. */
function run(command, args, options = {}) {
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, { ...options, stdio: ['ignore', 'pipe', 'pipe'] });
    let [stdout, stderr] = ['', ''];
    child.stdout.setEncoding('utf8').on('data', (text) => (stdout += text));
    child.stderr.setEncoding('utf8').on('data', (text) => (stderr += text));
    child.on('error', reject);
    child.on('close', (code) => resolve({ code, stdout, stderr }));
  });
}
const sizeOf = (folder) =>
  readdirSync(folder, { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .reduce((n, entry) => n + statSync(join(entry.parentPath, entry.name)).size, 0);

/** What a registry says of each package: name -> the one version that there is. */
const published = new Map();
function publish(tarball) {
  const manifest = JSON.parse(
    spawnSync('tar', ['-xzOf', tarball, 'package/package.json'], { encoding: 'utf8' }).stdout,
  );
  const bytes = readFileSync(tarball);
  const integrity = `sha512-${createHash('sha512').update(bytes).digest('base64')}`;
  published.set(manifest.name, { manifest, bytes, integrity, file: basename(tarball) });
}

const server = createServer((request, response) => {
  const path = decodeURIComponent(request.url.slice(1).split('?')[0]);
  const [name, file] = path.split('/-/');
  const found = published.get(name);
  if (!found) return response.writeHead(404).end('{}');
  if (file !== undefined) return response.end(found.bytes);
  const { manifest, integrity } = found;
  const { version } = manifest;
  const dist = { tarball: `http://${request.headers.host}/${name}/-/${found.file}`, integrity };
  response.setHeader('content-type', 'application/json');
  response.end(
    JSON.stringify({ name, 'dist-tags': { latest: version }, versions: { [version]: { ...manifest, dist } } }),
  );
});

try {
  mkdirSync(tarballs);
  const release = await run(process.execPath, [join(root, 'scripts/release.mjs'), '--out', tarballs], { cwd: root });
  check(release.code === 0, `everything is packed\n${release.stdout || release.stderr}`);
  const own = readdirSync(tarballs).filter((name) => name.endsWith('.tgz'));
  for (const name of own) publish(join(tarballs, name));

  // Dependencies as they lie here, of every package that is no development dependency.
  const installed = Object.entries(packages).filter(([path, { dev }]) => path !== '' && !dev && existsSync(join(root, path))); // prettier-ignore
  for (const [path] of installed) {
    const tarball = join(work, `${path.replaceAll('/', '-')}.tgz`);
    const args = [
      '-czf',
      tarball,
      '--exclude=./node_modules',
      '--transform=s,^\\.,package,',
      '-C',
      join(root, path),
      '.',
    ];
    if (spawnSync('tar', args).status !== 0) throw new Error(`${path} cannot be packed`);
    publish(tarball);
  }
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  const registry = `http://127.0.0.1:${server.address().port}`;

  const path = join(work, 'path');
  mkdirSync(path);
  symlinkSync(process.execPath, join(path, 'node'));
  for (const name of ['sh', 'env']) {
    const found = ['/bin', '/usr/bin'].map((folder) => join(folder, name)).find(existsSync);
    symlinkSync(found, join(path, name));
  }
  const project = join(work, 'project');
  mkdirSync(project);
  const env = { PATH: path, HOME: work, NO_COLOR: '1', npm_config_registry: registry, npm_config_cache: join(work, 'cache'), npm_config_update_notifier: 'false' }; // prettier-ignore
  for (const compiler of ['g++', 'c++', 'cc', 'gcc', 'clang++', 'make', 'python3']) {
    const there = await run('sh', ['-c', `command -v ${compiler}`], { env });
    if (there.code === 0) throw new Error(`${compiler} is on the PATH of the test`);
  }
  const install = await run(process.execPath, [npm, 'install', 'deepseek-convert', '--no-audit', '--no-fund'], { cwd: project, env }); // prettier-ignore
  check(install.code === 0, `npm install without a compiler${install.code === 0 ? '' : `\n${install.stdout}${install.stderr}`}`); // prettier-ignore
  const modules = join(project, 'node_modules');
  const program = join(modules, '.bin/deepseek-convert');
  const inside = readdirSync(join(modules, 'deepseek-convert'));
  check(!inside.includes('fixtures') && !inside.includes('test'), 'no fixtures and no tests are in it');

  const demo = await run(program, ['demo', '--device', 'cpu'], { cwd: project, env });
  check(demo.code === 0, `deepseek-convert demo${demo.code === 0 ? '' : `\n${demo.stdout}${demo.stderr}`}`);
  for (const word of ['convert ', 'moe ', 'quantize ', 'validate ', 'Verdict: PASSED']) {
    check(demo.stdout.includes(word), `its output has "${word.trim()}"`);
  }
  const man = join(modules, 'deepseek-convert/man/deepseek-convert.1');
  check(existsSync(man), 'the manual page is there');
  const doctor = await run(program, ['doctor', '--json'], { cwd: project, env });
  const state = Object.fromEntries(JSON.parse(doctor.stdout).checks.map(({ name, state }) => [name, state]));
  check(state['Native core'] === 'ok' && state['C++ compiler'] === 'missing', 'doctor sees a native core and no compiler'); // prettier-ignore
  console.log(`\ninstalled: ${mb(sizeOf(modules))} in ${readdirSync(modules).length} folders, of which`);
  for (const name of readdirSync(modules).filter((name) => name.startsWith('deepseek-convert'))) {
    console.log(`  ${name}: ${mb(sizeOf(join(modules, name)))}`);
  }
  console.log(`\n${demo.stdout}`);
} finally {
  server.close();
  rmSync(work, { recursive: true, force: true });
}
