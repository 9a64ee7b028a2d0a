import { readdirSync, readFileSync, statSync } from 'node:fs';
import { basename, extname, join, resolve } from 'node:path';
import { begunBy } from '../base/job.js';
import { columns, displayWidth, shellQuote } from '../base/text.js';

const weightFile = /\.(safetensors|bin|pt|pth|gguf)$/i;

interface Found {
  readonly path: string;
  readonly kind: 'dense' | 'moe' | 'int4' | 'gguf' | 'unknown';
}

type Suggestion = readonly [command: string, does: string];

/** Three commands that fit the folder: what it holds decides. Jobs that were interrupted come first, then jobs to run. */
export function welcome(folder: string, width = 80): string {
  const here = names(folder);
  const found = models(folder, here);
  const interrupted = here.filter((name) => name.endsWith('.part')).flatMap((name) => resumption(folder, name));
  const jobs = here.filter((name) => /\.ya?ml$/.test(name) && isJobs(join(folder, name)));
  const lines = [...interrupted, ...jobs.flatMap(batchOf), ...suggest(found)].slice(0, 3);
  const what = [
    interrupted.length > 0 && `${some(interrupted.length, 'An interrupted job is', 'interrupted jobs are')} here`,
    jobs.length > 0 && `${some(jobs.length, 'A file of jobs is', 'files of jobs are')} here: ${listed(jobs)}`,
    found.length > 0 && `${some(found.length, 'A model is', 'models are')} here: ${listed(found.map(({ path }) => (path === '.' ? 'this folder itself' : path)))}`, // prettier-ignore
  ].filter((part) => part !== false);
  return `deepseek-convert: language-model checkpoints to verified INT4 and MoE ones.

${what.length === 0 ? 'No model in this folder. Where there is one:' : `${what.join('. ')}. For example:`}
${table(lines, width)}

deepseek-convert --help lists all commands.`; // prettier-ignore
}

/** What does not fit beside the commands stands below them. */
function table(lines: readonly Suggestion[], width: number): string {
  const wide = columns(lines.map(([command, does]) => [`  deepseek-convert ${command}`, does]), 'll'); // prettier-ignore
  if (wide.split('\n').every((line) => displayWidth(line) <= width)) return wide;
  return lines.map(([command, does]) => `  deepseek-convert ${command}\n      ${does}`).join('\n');
}

const some = (n: number, one: string, several: string): string => (n === 1 ? one : `${n} ${several}`);
const listed = (paths: readonly string[]): string => `${paths.slice(0, 3).join(', ')}${paths.length > 3 ? ' ...' : ''}`;

/** The command that began the job of a work folder; from another folder it would not find its files. */
function resumption(folder: string, name: string): Suggestion[] {
  const begun = begunBy(join(folder, name));
  if (!begun || resolve(begun.folder) !== resolve(folder)) return [];
  return [[begun.arguments.map(shellQuote).join(' '), `go on with ${name.slice(0, -'.part'.length)}`]];
}

function isJobs(path: string): boolean {
  try {
    return statSync(path).size < 1e6 && /^(jobs|matrix):/m.test(readFileSync(path, 'utf8'));
  } catch {
    return false; // a file that may not be read holds no suggestion
  }
}

const batchOf = (file: string): Suggestion[] => [
  [`batch ${shellQuote(file)} --dry-run`, 'what its jobs would do'],
  [`batch ${shellQuote(file)}`, 'do them; what is done stays done'],
];

function suggest(found: readonly Found[]): Suggestion[] {
  const first = found.find((f) => f.kind === 'dense') ?? found.find((f) => f.kind !== 'int4') ?? found[0];
  if (first === undefined) {
    return [
      ['demo', 'everything once, on a tiny model'],
      ['inspect <model>', 'what it is'],
      ['quantize <model> -o <out>', 'make it INT4'],
    ];
  }
  const path = shellQuote(first.path);
  const stem = extname(first.path) ? first.path.slice(0, -extname(first.path).length) : first.path;
  const inspect: Suggestion = [`inspect ${path}`, 'what it is'];
  const speak = (model: string): Suggestion => [`generate ${model} --prompt "Hello"`, 'let it speak'];
  const small = found.find((f) => f.kind === 'int4');
  if (first.kind === 'int4') return [inspect, speak(path), ['doctor', 'is this machine ready?']];
  if (first.kind === 'gguf') {
    return [
      inspect,
      speak(path),
      [`convert ${path} -o ${shellQuote(stem)} --format safetensors`, 'a Hugging Face folder'],
    ];
  }
  if (small) {
    const other = shellQuote(small.path);
    return [inspect, [`validate ${path} ${other}`, 'how close they are'], speak(other)];
  }
  // A model in the folder itself: what is made of it stands beside that.
  const beside = first.path === '.' ? `../${basename(resolve(first.path))}` : stem;
  const quantize: Suggestion = [`quantize ${path} -o ${shellQuote(`${beside}-int4`)}`, 'make it INT4'];
  if (first.kind === 'moe') return [inspect, quantize, speak(path)];
  return [inspect, [`moe ${path} -o ${shellQuote(`${beside}-moe`)} --experts 8 --active 2`, 'make it MoE'], quantize];
}

function models(folder: string, here: readonly string[]): Found[] {
  const found: Found[] = [];
  if (here.includes('config.json') && here.some((name) => weightFile.test(name))) {
    return [{ path: '.', kind: kindOf(join(folder, 'config.json')) }];
  }
  for (const name of here) {
    if (name.endsWith('.part') || name === 'node_modules') continue;
    if (/\.gguf$/i.test(name)) {
      found.push({ path: name, kind: 'gguf' });
    } else if (weightFile.test(name)) {
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
      .sort()
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
