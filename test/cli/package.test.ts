import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import {
  mkdirSync,
  readFileSync,
  readdirSync,
  renameSync,
  rmSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { beforeAll, describe, expect, it } from 'vitest';
import { root, v1, workFolder } from './support.js';

const folder = workFolder();
const out = join(folder, 'release');
const { version, dependencies } = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as {
  version: string;
  dependencies: Record<string, string>;
};
const platform = `deepseek-convert-${process.platform}-${process.arch}`;
const tarball = (name: string) => join(out, `${name}-${version}.tgz`);
const entries = (file: string) => execFileSync('tar', ['-tzf', file], { encoding: 'utf8' }).trim().split('\n');

beforeAll(() => {
  execFileSync(process.execPath, [join(root, 'scripts/release.mjs'), '--out', out], { encoding: 'utf8' });
}, 240_000);

/** A project that has the package, as npm would lay it out; dependencies are the repository's. */
function installed(): { readonly project: string; readonly env: NodeJS.ProcessEnv } {
  const project = join(folder, 'project');
  const modules = join(project, 'node_modules');
  mkdirSync(join(modules, '@anush008'), { recursive: true });
  for (const name of ['deepseek-convert', platform]) {
    execFileSync('tar', ['-xzf', tarball(name), '-C', modules]);
    renameSync(join(modules, 'package'), join(modules, name));
  }
  for (const name of Object.keys(dependencies)) symlinkSync(join(root, 'node_modules', name), join(modules, name));
  // Nothing but Node: no compiler, no npm, no Python.
  const path = join(folder, 'path');
  mkdirSync(path);
  symlinkSync(process.execPath, join(path, 'node'));
  return { project, env: { PATH: path, HOME: folder, NO_COLOR: '1' } };
}

describe('what is published', () => {
  it('holds the program, its data and the native sources; no tests, fixtures or build leftovers', () => {
    const files = entries(tarball('deepseek-convert')).map((name) => name.replace(/^package\//, ''));
    const places = new Set(files.map((name) => name.split('/')[0]!));
    expect([...places].sort()).toEqual(['README.md', 'bin', 'calibration', 'data', 'dist', 'man', 'native', 'package.json', 'schemas', 'scripts']); // prettier-ignore
    expect(files.filter((name) => /(^|\/)(test|tests|fixtures)\/|\.test\.|\.tsbuildinfo$|\.ts$|\.part\//.test(name))).toEqual([]); // prettier-ignore
    expect(files).toEqual(expect.arrayContaining(['dist/cli.js', 'data/hardware.json', 'scripts/build-native.mjs', 'native/backend.h'])); // prettier-ignore
    // The sizes that README and docs state: half as much again is worth a look.
    expect(statSync(tarball('deepseek-convert')).size).toBeLessThan(1_000_000);
    expect(statSync(tarball(platform)).size).toBeLessThan(600_000);
    expect(entries(tarball(platform)).sort()).toEqual(['package/deepseek_convert.node', 'package/package.json']);
  });
  it('has checksums of every file, and an SBOM of what it depends on', () => {
    const sums = readFileSync(join(out, 'SHA256SUMS'), 'utf8').trim().split('\n').map((line) => line.split('  ')); // prettier-ignore
    expect(sums.map(([, name]) => name)).toEqual(readdirSync(out).filter((name) => name !== 'SHA256SUMS').sort()); // prettier-ignore
    for (const [sum, name] of sums) {
      expect(
        createHash('sha256')
          .update(readFileSync(join(out, name!)))
          .digest('hex'),
      ).toBe(sum);
    }
    const { bomFormat, components } = JSON.parse(readFileSync(join(out, 'sbom.cdx.json'), 'utf8')) as {
      bomFormat: string;
      components: { group?: string; name: string }[];
    };
    expect(bomFormat).toBe('CycloneDX');
    const names = components.map(({ group, name }) => (group === undefined ? name : `${group}/${name}`));
    expect(names).toEqual(expect.arrayContaining(Object.keys(dependencies)));
    expect(names).not.toContain('vitest');
  });
  it('computes without a compiler through the platform package, and says what to do without that', () => {
    const { project, env } = installed();
    const program = join(project, 'node_modules/deepseek-convert/bin/deepseek-convert.js');
    const run = (...args: string[]) => spawnSync(process.execPath, [program, ...args], { cwd: project, env, encoding: 'utf8' }); // prettier-ignore
    writeFileSync(join(project, 'text.txt'), 'The old man went down to the sea and looked at the boats. '.repeat(3));
    const scored = run('score', v1, '--text', 'text.txt', '--device', 'cpu');
    expect(scored.stdout, scored.stderr).toMatch(/perplexity \d+\.\d+/);
    rmSync(join(project, 'node_modules', platform), { recursive: true });
    const without = run('score', v1, '--text', 'text.txt', '--device', 'cpu');
    expect(without.status).toBe(4);
    expect(without.stderr).toContain('The native core is not built');
    expect(without.stderr).toContain(`npm install ${platform}`);
    const build = spawnSync(process.execPath, [join(project, 'node_modules/deepseek-convert/scripts/build-native.mjs')], { cwd: project, env, encoding: 'utf8' }); // prettier-ignore
    expect(build.status).toBe(1);
    expect(build.stderr).toContain('apt-get install g++');
  });
});
