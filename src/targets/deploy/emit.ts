import { badUsage } from '../../base/errors.js';
import type { Deployed } from './batching.js';
import { prometheus } from './prometheus.js';
import { llamaCpp, sglang, triton, vllm } from './servers.js';

export const emitted = ['vllm', 'triton', 'sglang', 'llama.cpp', 'prometheus'] as const;
export type Emitted = (typeof emitted)[number];

const servers: Readonly<Record<Exclude<Emitted, 'prometheus'>, (model: Deployed) => Map<string, string>>> = {
  ...{ vllm, triton, sglang },
  'llama.cpp': llamaCpp,
};
/** Formats that the engines load. */
const folders: readonly string[] = ['compressed-tensors', 'gptq', 'awq', 'safetensors'];
const loads = (engine: Emitted, format: string): boolean =>
  engine === 'llama.cpp' ? format === 'gguf' : folders.includes(format);

/** Refuses an engine that loads none of the formats. */
export function checkEmitted(engines: readonly Emitted[], formats: readonly string[], isFile: boolean): void {
  const idle = engines.find((engine) => engine !== 'prometheus' && !formats.some((format) => loads(engine, format)));
  if (idle !== undefined) {
    throw badUsage(`--emit ${idle} has nothing to serve: it loads none of the formats`, {
      expected: idle === 'llama.cpp' ? '--format gguf' : `--format ${folders.join(', ')}`,
      got: `--format ${formats.join(',')}`,
    });
  }
  if (isFile && engines.length > 0) {
    throw badUsage('--emit writes files beside the model', { got: 'one output file', expected: 'a folder for -o' });
  }
}

/** The files that one output gets, by name. */
export function deployment(engines: readonly Emitted[], format: string, model: Deployed): Map<string, string> {
  const own = engines.filter((engine) => engine !== 'prometheus' && loads(engine, format));
  const files = own.flatMap((engine) => [...servers[engine as keyof typeof servers](model)]);
  if (engines.includes('prometheus') && format !== 'imatrix') files.push(...prometheus(own));
  return new Map(files);
}
