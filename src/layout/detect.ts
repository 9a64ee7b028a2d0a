import { awqReader, awqWriter } from './awq.js';
import { compressedTensorsReader, compressedTensorsWriter } from './compressed-tensors.js';
import { keyError, record } from './check.js';
import { gptqReader, gptqWriter } from './gptq.js';
import { matMulNBitsReader } from './matmulnbits.js';
import type { LayoutName, LayoutReader, LayoutWriter } from './types.js';

const readers: Readonly<Record<string, (config: Readonly<Record<string, unknown>>, where: string) => LayoutReader>> = {
  'compressed-tensors': compressedTensorsReader,
  gptq: gptqReader,
  awq: awqReader,
  matmulnbits: matMulNBitsReader,
};

export const layoutWriters: Readonly<Record<LayoutName, LayoutWriter>> = {
  'compressed-tensors': compressedTensorsWriter,
  gptq: gptqWriter,
  awq: awqWriter,
};

/** quant_method values that say how plain tensors are encoded; the checkpoint layer reads those. */
const encodedInTensors: ReadonlySet<unknown> = new Set(['fp8']);

/**
 * The layout that config.json's quantization_config names, or undefined for unquantized checkpoints.
 * Errors: a method or setting that is not supported.
 */
export function detectLayout(config: Readonly<Record<string, unknown>>, where: string): LayoutReader | undefined {
  const value = config.quantization_config ?? config.compression_config;
  if (value === undefined || value === null) return undefined;
  const quantization = record(value, where, 'quantization_config');
  const method = quantization.quant_method;
  if (encodedInTensors.has(method)) return undefined;
  const read = typeof method === 'string' && Object.hasOwn(readers, method) ? readers[method] : undefined;
  if (!read) {
    const known = [...Object.keys(readers), ...(encodedInTensors as Set<string>)];
    throw keyError(`${where}: quantization_config`, 'quant_method', method, known.join(', '));
  }
  return read(quantization, where);
}
