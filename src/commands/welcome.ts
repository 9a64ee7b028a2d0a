import { readdirSync, readFileSync, statSync } from 'node:fs';
import { extname, join } from 'node:path';
import { columns, shellQuote } from '../base/text.js';

const weightFile = /\.(safetensors|bin|pt|pth|gguf)$/i;

interface Found {
  readonly path: string;
  readonly kind: 'dense' | 'moe' | 'int4' | 'unknown';
}

/** Three commands that fit the folder: what it holds decides. */
export function welcome(folder: string): string {
  const found = models(folder);
  const lines = suggest(found).map(([command, does]) => [`  deepseek-convert ${command}`, does]);
  const what =
    found.length === 0
      ? 'No model in this folder. Where there is one:'
      : `${found.length === 1 ? 'A model is' : `${found.length} models are`} here: ${found
          .slice(0, 3)
          .map((f) => f.path)
          .join(', ')}${found.length > 3 ? ' ...' : ''}. For example:`;
  return `deepseek-convert turns language-model checkpoints into verified INT4 and MoE checkpoints.

${what}
${columns(lines, 'll')}

deepseek-convert --help lists all commands.`;
}

function suggest(found: readonly Found[]): [command: string, does: string][] {
  const first = found.find((f) => f.kind === 'dense') ?? found.find((f) => f.kind !== 'int4') ?? found[0];
  if (first === undefined) {
    return [
      ['inspect <model>', 'what it is'],
      ['quantize <model> -o <out>', 'make it INT4'],
      ['doctor', 'is this machine ready?'],
    ];
  }
  const path = shellQuote(first.path);
  const stem = extname(first.path) ? first.path.slice(0, -extname(first.path).length) : first.path;
  const inspect: [string, string] = [`inspect ${path}`, 'what it is'];
  const small = found.find((f) => f.kind === 'int4');
  if (first.kind === 'int4') {
    return [inspect, [`generate ${path} --prompt "Hello"`, 'let it speak'], ['doctor', 'is this machine ready?']];
  }
  if (small) {
    const validate = `validate ${path} ${shellQuote(small.path)}`;
    return [inspect, [validate, 'how close they are'], [`generate ${shellQuote(small.path)} --prompt "Hello"`, 'let it speak']]; // prettier-ignore
  }
  const quantize: [string, string] = [`quantize ${path} -o ${shellQuote(`${stem}-int4`)}`, 'make it INT4'];
  if (first.kind === 'moe') return [inspect, quantize, [`generate ${path} --prompt "Hello"`, 'let it speak']];
  return [inspect, [`moe ${path} -o ${shellQuote(`${stem}-moe`)} --experts 8 --active 2`, 'make it MoE'], quantize];
}

function models(folder: string): Found[] {
  const found: Found[] = [];
  const here = names(folder);
  if (here.includes('config.json') && here.some((name) => weightFile.test(name))) {
    return [{ path: '.', kind: kindOf(join(folder, 'config.json')) }];
  }
  for (const name of here.sort()) {
    if (name.endsWith('.part') || name === 'node_modules') continue;
    if (weightFile.test(name)) {
      found.push({ path: name, kind: kindOf(join(folder, `${name.replace(weightFile, '')}.config.json`)) });
    } else if (names(join(folder, name)).some((inner) => weightFile.test(inner))) {
      found.push({ path: name, kind: kindOf(join(folder, name, 'config.json')) });
    }
  }
  return found;
}

function names(folder: string): string[] {
  try {
    if (!statSync(folder).isDirectory()) return [];
    return readdirSync(folder)
      .filter((name) => !name.startsWith('.'))
      .slice(0, 1000);
  } catch {
    return []; // a folder that may not be read holds no suggestion
  }
}

function kindOf(configPath: string): Found['kind'] {
  try {
    const config = JSON.parse(readFileSync(configPath, 'utf8')) as Record<string, unknown>;
    if (config.quantization_config !== undefined) return 'int4';
    const experts = ['n_routed_experts', 'num_experts', 'num_local_experts'].some((key) => Number(config[key]) > 0);
    return experts ? 'moe' : 'dense';
  } catch {
    return 'unknown';
  }
}
