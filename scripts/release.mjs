// Makes what is published, in a folder: the package, the packages with the native core of this machine (and the CUDA
// module, where it is built), an SBOM and checksums.
//   npm run release [-- --out folder]
// deepseek-convert-<version>.tgz names the platform packages as optional dependencies, as sharp does: npm takes the one
// that fits, and no compiler is needed. Where none fits: npm run build:native in the installed package.
import { spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  copyFileSync,
  cpSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const { values } = parseArgs({ options: { out: { type: 'string', default: 'build/release' } } });
const out = resolve(root, values.out);
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8'));
const { name, version, license, engines } = manifest;
const platform = `${process.platform}-${process.arch}`;

/** What each platform package holds. */
const variants = [
  { suffix: '', file: 'deepseek_convert.node', what: 'native CPU core', required: true },
  { suffix: '-cuda', file: 'libdeepseek_convert_cuda.so', what: 'CUDA module', required: false },
];
/** Platforms that a release is made for; each is made on a machine of its kind. */
const platforms = ['linux-x64', 'linux-arm64'];

const npm = (args, cwd) => {
  const done = spawnSync('npm', args, { cwd, encoding: 'utf8', maxBuffer: 1 << 28 });
  if (done.status !== 0) throw new Error(`npm ${args.join(' ')}: ${done.stderr}`);
  return done.stdout;
};
const pack = (folder) => {
  const [made] = JSON.parse(npm(['pack', '--json', '--ignore-scripts', '--pack-destination', out], folder));
  return made;
};

/**
 * What is reached from the package's own dependencies. `npm sbom --omit dev` leaves out packages that a development
 * dependency uses too (yaml), so the choice is made here.
 */
function sbom() {
  const all = JSON.parse(npm(['sbom', '--sbom-format', 'cyclonedx'], root));
  const graph = new Map(all.dependencies.map(({ ref, dependsOn }) => [ref, dependsOn ?? []]));
  const own = all.metadata.component['bom-ref'];
  const direct = graph.get(own).filter((ref) => ref.slice(0, ref.lastIndexOf('@')) in manifest.dependencies);
  const reached = new Set(direct);
  for (const ref of reached) for (const next of graph.get(ref) ?? []) reached.add(next);
  return {
    ...all,
    components: all.components.filter((component) => reached.has(component['bom-ref'])),
    dependencies: [{ ref: own, dependsOn: direct }, ...all.dependencies.filter(({ ref }) => reached.has(ref))],
  };
}

mkdirSync(out, { recursive: true });
for (const old of readdirSync(out)) if (/\.tgz$|^SHA256SUMS$|^sbom\.cdx\.json$/.test(old)) rmSync(join(out, old));
const work = mkdtempSync(join(tmpdir(), 'deepseek-convert-release-'));
try {
  const made = [];
  for (const { suffix, file, what, required } of variants) {
    const source = join(root, 'build', file);
    if (!existsSync(source)) {
      if (required) throw new Error(`${source} is not built: npm run build:native`);
      console.error(`${what}: not built, left out (npm run build:cuda).`);
      continue;
    }
    const folder = join(work, `native${suffix}`);
    mkdirSync(folder);
    copyFileSync(source, join(folder, file));
    const own = {
      name: `${name}-${platform}${suffix}`,
      version,
      description: `${what} of ${name} for ${platform}`,
      license,
      os: [process.platform],
      cpu: [process.arch],
      libc: ['glibc'],
      engines,
      files: [file],
    };
    writeFileSync(join(folder, 'package.json'), `${JSON.stringify(own, null, 2)}\n`);
    made.push(pack(folder));
  }

  const main = join(work, 'main');
  mkdirSync(main);
  for (const part of [...manifest.files.filter((entry) => !entry.startsWith('!')), 'README.md']) {
    cpSync(join(root, part), join(main, part), { recursive: true });
  }
  const published = { ...manifest };
  delete published.devDependencies;
  // What a user of the package can run: the rest needs sources that are not in it.
  published.scripts = {
    'build:native': manifest.scripts['build:native'],
    'build:cuda': manifest.scripts['build:cuda'],
  };
  published.optionalDependencies = Object.fromEntries(platforms.map((p) => [`${name}-${p}`, version]));
  writeFileSync(join(main, 'package.json'), `${JSON.stringify(published, null, 2)}\n`);
  made.push(pack(main));

  writeFileSync(join(out, 'sbom.cdx.json'), `${JSON.stringify(sbom(), null, 2)}\n`);
  const files = readdirSync(out).filter((file) => /\.tgz$|^sbom/.test(file)).sort(); // prettier-ignore
  const sums = files.map((file) => `${createHash('sha256').update(readFileSync(join(out, file))).digest('hex')}  ${file}`); // prettier-ignore
  writeFileSync(join(out, 'SHA256SUMS'), `${sums.join('\n')}\n`);
  for (const { filename, size, unpackedSize, entryCount } of made) {
    const mb = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
    console.log(`${filename}: ${mb(size)}, ${mb(unpackedSize)} unpacked, ${entryCount} files`);
  }
  console.log(
    `sbom.cdx.json: ${(statSync(join(out, 'sbom.cdx.json')).size / 1e6).toFixed(2)} MB; SHA256SUMS. All in ${out}`,
  );
} finally {
  rmSync(work, { recursive: true, force: true });
}
