import { spawnSync } from 'node:child_process';
import { existsSync, mkdirSync, readdirSync } from 'node:fs';
import { join } from 'node:path';
import { root } from '../cli/support.js';

export interface Tools {
  readonly prometheus: string;
  readonly promtool: string;
}

const folder = join(root, '.interop/prometheus');

function run(line: string): void {
  console.log(`prometheus: ${line}`);
  const { status } = spawnSync('bash', ['-euo', 'pipefail', '-c', line], { cwd: folder, stdio: 'inherit' });
  if (status !== 0) throw new Error(`${line} failed (${status ?? 'killed'})`);
}

const has = (program: string): boolean => spawnSync(program, ['--version'], { stdio: 'ignore' }).status === 0;

/**
 * The two programs of Debian's package `prometheus`: those of the machine, else those of the package, which is fetched
 * and unpacked but not installed: no service starts, and nothing of the system changes.
 */
export function tools(): Tools {
  if (has('prometheus') && has('promtool')) return { prometheus: 'prometheus', promtool: 'promtool' };
  const [prometheus, promtool] = ['prometheus', 'promtool'].map((name) => join(folder, 'usr/bin', name)) as [string, string]; // prettier-ignore
  if (!existsSync(prometheus) || !existsSync(promtool)) {
    mkdirSync(folder, { recursive: true });
    const root = process.getuid?.() === 0 ? '' : 'sudo -n ';
    run(`apt-get download -q prometheus || { ${root}apt-get update -q && apt-get download -q prometheus; }`);
    const name = readdirSync(folder).find((name) => name.endsWith('.deb'))!;
    run(`dpkg-deb --fsys-tarfile ${name} | tar -x ./usr/bin/prometheus ./usr/bin/promtool`);
    run(`rm ${name}`);
  }
  return { prometheus, promtool };
}
