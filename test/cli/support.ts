import { spawn } from 'node:child_process';
import { existsSync, mkdtempSync, readdirSync, rmSync, statSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll } from 'vitest';

export const root = dirname(dirname(dirname(fileURLToPath(import.meta.url))));
export const bin = join(root, 'bin/deepseek-convert.js');
export const fixture = (name: string): string => join(root, 'fixtures', name);
export const v1 = fixture('v1.0/v1.0_checkpoint.bin');

if (!existsSync(join(root, 'dist/cli.js'))) throw new Error('dist/ is not built: npm run build (npm test does it)');

export interface Finished {
  readonly code: number | null;
  readonly signal: NodeJS.Signals | null;
  readonly stdout: string;
  readonly stderr: string;
}

export interface CliOptions {
  readonly env?: Readonly<Record<string, string | undefined>>;
  readonly cwd?: string;
  /** Sees the child as soon as it runs. */
  readonly started?: (child: ReturnType<typeof spawn>) => void;
}

/** Runs the program as a user does, without a terminal. */
export const cli = (args: readonly string[], options: CliOptions = {}): Promise<Finished> =>
  spawned(process.execPath, [bin, ...args], options);

/** Runs a line of shell in which `deepseek-convert` is the program. */
export const shell = (line: string, options: CliOptions = {}): Promise<Finished> =>
  spawned('bash', ['-c', `deepseek-convert() { "${process.execPath}" "${bin}" "$@"; }\n${line}`], options);

function spawned(command: string, args: readonly string[], { env, cwd, started }: CliOptions): Promise<Finished> {
  // The surroundings of the tests must not decide their outcome.
  const clean = Object.entries(process.env).filter(([name]) => !/^(DEEPSEEK_CONVERT_|NO_COLOR|FORCE_COLOR)/.test(name));
  return new Promise((resolve, reject) => {
    const child = spawn(command, args, {
      cwd: cwd ?? root,
      env: { ...Object.fromEntries(clean), ...env },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    let [stdout, stderr] = ['', ''];
    child.stdout.setEncoding('utf8').on('data', (text: string) => (stdout += text));
    child.stderr.setEncoding('utf8').on('data', (text: string) => (stderr += text));
    child.on('error', reject);
    child.on('close', (code, signal) => resolve({ code, signal, stdout, stderr }));
    started?.(child);
  });
}

/** A folder for one test file, gone afterwards. */
export function workFolder(): string {
  const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-'));
  afterAll(() => rmSync(folder, { recursive: true, force: true }));
  return folder;
}

/** Everything below `folder`, as paths relative to it, with sizes: to see that a command left nothing behind. */
export function listing(folder: string): string[] {
  return readdirSync(folder, { recursive: true, encoding: 'utf8' })
    .filter((name) => statSync(join(folder, name)).isFile())
    .sort();
}

/** The one object that `--json` prints. */
export const json = <T = Record<string, unknown>>({ stdout }: Finished): T => JSON.parse(stdout) as T;
