import { createHash } from 'node:crypto';
import { closeSync, cpSync, mkdirSync, openSync, readSync, readdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { openModel } from '../../src/arch/open.js';
import { writeTensors, type StoredTensor } from '../cli/files.js';
import { toNumber } from './models.js';

/** Nearest bf16, halves to even. */
function bf16(value: number): number {
  const bits = new Uint32Array(new Float32Array([value]).buffer)[0]!;
  return (bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16;
}

function roundHalfEven(x: number): number {
  const floor = Math.floor(x);
  if (x - floor !== 0.5) return Math.round(x);
  return floor % 2 === 0 ? floor : floor + 1;
}

/** INT4 of one bf16 matrix by the rule of fixtures/validate/make_validate.py (to_int4): codes -8..7, scales as bf16. */
function quantize(bits: Uint16Array, group: number): { codes: Int8Array; scales: Uint16Array } {
  const codes = new Int8Array(bits.length);
  const scales = new Uint16Array(bits.length / group);
  for (let g = 0; g < scales.length; g++) {
    const part = bits.subarray(g * group, (g + 1) * group);
    const largest = part.reduce((m, b) => Math.max(m, Math.abs(toNumber(b))), 0);
    scales[g] = bf16(Math.fround(largest / 7));
    const scale = toNumber(scales[g]!);
    part.forEach((b, i) => {
      codes[g * group + i] = Math.min(7, Math.max(-8, roundHalfEven(Math.fround(toNumber(b) / scale))));
    });
  }
  return { codes, scales };
}

/** Eight codes an int32, the first lowest, each with 8 added. */
function pack(codes: Int8Array): Int32Array {
  const words = new Int32Array(codes.length / 8);
  codes.forEach((code, i) => (words[i >> 3]! |= (code + 8) << (4 * (i & 7))));
  return words;
}

const bytes = ({ buffer }: { buffer: ArrayBufferLike }): Uint8Array => new Uint8Array(buffer as ArrayBuffer);

/**
 * Writes a model's INT4 as compressed-tensors stores it (pack-quantized), by this file alone: every linear of the
 * layers but the router.
 * @returns SHA-256 of all codes, matrices in the order of their names
 */
export async function writeInt4(model: string, folder: string, group: number): Promise<string> {
  mkdirSync(folder, { recursive: true });
  const home = model.endsWith('.bin') ? dirname(model) : model;
  for (const name of readdirSync(home)) if (/^(tokenizer|generation)/.test(name)) cpSync(join(home, name), join(folder, name)); // prettier-ignore
  const open = await openModel(model);
  const tensors = new Map<string, StoredTensor>();
  const digest = createHash('sha256');
  try {
    for (const [name, { span, shape }] of [...open.checkpoint.tensors].sort(([a], [b]) => (a < b ? -1 : 1))) {
      const file = openSync(span.path, 'r');
      const data = new Uint8Array(span.bytes);
      readSync(file, data, 0, span.bytes, span.offset);
      closeSync(file);
      if (!/^model\.layers\..*(proj|_mqa)\.weight$/.test(name)) {
        tensors.set(name, {
          dtype: data.length === 2 * shape.reduce((a, b) => a * b, 1) ? 'BF16' : 'F32',
          shape,
          data,
        });
        continue;
      }
      const [rows, columns] = shape as [number, number];
      const { codes, scales } = quantize(new Uint16Array(data.buffer), group);
      digest.update(bytes(codes.map((c) => c + 8)));
      tensors.set(`${name}_packed`, { dtype: 'I32', shape: [rows, columns / 8], data: bytes(pack(codes)) });
      tensors.set(`${name}_scale`, { dtype: 'BF16', shape: [rows, columns / group], data: bytes(scales) });
      tensors.set(`${name}_shape`, { dtype: 'I64', shape: [2], data: bytes(BigInt64Array.from([BigInt(rows), BigInt(columns)])) }); // prettier-ignore
    }
    writeTensors(join(folder, 'model.safetensors'), tensors);
    const weights = { num_bits: 4, type: 'int', symmetric: true, strategy: 'group', group_size: group, dynamic: false };
    const quantization_config = {
      quant_method: 'compressed-tensors',
      format: 'pack-quantized',
      quantization_status: 'compressed',
      config_groups: { group_0: { targets: ['Linear'], weights, input_activations: null, output_activations: null } },
      ignore: ['lm_head', 're:.*mlp\\.gate$'],
    };
    writeFileSync(join(folder, 'config.json'), JSON.stringify({ ...open.checkpoint.config, quantization_config }));
  } finally {
    await open.close();
  }
  return digest.digest('hex');
}
