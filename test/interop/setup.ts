import { spawnSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';

const here = fileURLToPath(new URL('.', import.meta.url));
const root = join(here, '../..');
const modules = ['torch', 'transformers', 'safetensors', 'gguf', 'onnx', 'numpy'];
const venv = join(root, '.interop/venv');

function run(command: string, args: readonly string[], cwd: string, env: Record<string, string> = {}): void {
  console.log(`interop: ${command} ${args.join(' ')}`);
  const { status } = spawnSync(command, args, { cwd, stdio: 'inherit', env: { ...process.env, ...env } });
  if (status !== 0) throw new Error(`${command} ${args.join(' ')} failed (${status ?? 'killed'})`);
}

/** A Python that has the oracles: INTEROP_PYTHON, the project's .venv, or one made here. */
function python(): string {
  const fits = (path: string) =>
    spawnSync(path, ['-c', `import importlib.util as u; assert all(map(u.find_spec, ${JSON.stringify(modules)}))`], { stdio: 'ignore' }).status === 0; // prettier-ignore
  const given = process.env.INTEROP_PYTHON;
  const known = [given, join(root, '.venv/bin/python'), join(venv, 'bin/python')].filter((path) => path !== undefined);
  const found = known.find((path) => (existsSync(path) || path === given) && fits(path));
  if (found !== undefined) return found;
  run('python3', ['-m', 'venv', venv], root);
  run(join(venv, 'bin/pip'), ['install', '--quiet', '-r', join(here, 'requirements.txt')], root);
  return join(venv, 'bin/python');
}

/** Node engines of test/interop/package.json: prebuilt binaries from the registry, nothing is compiled or fetched elsewhere. */
function nodeEngines(): void {
  const wanted = ['node-llama-cpp', '@node-llama-cpp/linux-x64', 'onnxruntime-node'];
  if (wanted.every((name) => existsSync(join(here, 'node_modules', name, 'package.json')))) return;
  const skip = { ONNXRUNTIME_NODE_INSTALL: 'skip', ONNXRUNTIME_NODE_INSTALL_CUDA: 'skip' };
  const flags = ['--omit=optional', '--ignore-scripts', '--no-audit', '--no-fund', '--no-package-lock'];
  run('npm', ['install', ...flags], here, skip);
}

export default function setup(): void {
  nodeEngines();
  process.env.INTEROP_PYTHON = python();
}
