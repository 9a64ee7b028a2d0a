import { createHash } from 'node:crypto';
import { readFile, stat } from 'node:fs/promises';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';
import { readGguf } from '../formats/gguf.js';
import { decodeUtf8 } from '../formats/json.js';
import { inMemory } from '../formats/source.js';

/** Mean squared activation of each input channel: f32 [experts, K], one row for tensors that are no stack of experts. */
export interface Importance {
  readonly experts: number;
  readonly values: Float32Array;
}

/** By GGUF tensor name (`blk.0.attn_q.weight`). */
export type Imatrix = ReadonlyMap<string, Importance>;

/** No model has so many; a damaged count must not be believed. */
const limits = { bytes: 2 ** 31, entries: 2 ** 20, name: 4096, values: 2 ** 28 };

/**
 * Reads llama.cpp's importance matrix: the GGUF form (`X.in_sum2` and `X.counts`), and the older .dat form.
 * Errors (kind 'input'): files that are neither, counts that do not fit.
 */
export async function readImatrix(path: string): Promise<Imatrix> {
  const { size } = await stat(path).catch((error: unknown) => {
    throw ioError(error, 'read the importance matrix', path);
  });
  if (size > limits.bytes) throw badInput('Too large for an importance matrix', { where: path, got: `${size} bytes` });
  const bytes = await readFile(path);
  return parseImatrix(bytes, path);
}

/** The same from a file's bytes. */
export const parseImatrix = (bytes: Buffer, path: string): Imatrix =>
  bytes.subarray(0, 4).toString('latin1') === 'GGUF' ? fromGguf(bytes, path) : parseDat(bytes, path);

function fromGguf(bytes: Buffer, path: string): Imatrix {
  const { metadata, tensors } = readGguf(inMemory(bytes, path));
  const type = metadata.get('general.type')?.value;
  if (type !== 'imatrix') {
    throw badInput('This GGUF file is no importance matrix', { where: path, expected: 'general.type imatrix', got: JSON.stringify(type) ?? 'none' }); // prettier-ignore
  }
  const entries = new Map(tensors.map((tensor) => [tensor.name, tensor]));
  const read = (name: string): { values: Float32Array; shape: readonly number[] } => {
    const entry = entries.get(name);
    if (entry?.encoding.kind !== 'plain' || entry.encoding.dtype !== 'f32') {
      throw badInput('A tensor of an importance matrix is missing or no f32', { where: `${path}, tensor ${name}` });
    }
    const { offset, bytes: size } = entry.span;
    return { values: new Float32Array(new Uint8Array(bytes.subarray(offset, offset + size)).buffer), shape: entry.shape }; // prettier-ignore
  };
  const found = new Map<string, Importance>();
  for (const name of entries.keys()) {
    if (!name.endsWith('.in_sum2')) continue;
    const tensor = name.slice(0, -'.in_sum2'.length);
    const sums = read(name);
    const counts = read(`${tensor}.counts`);
    const experts = counts.values.length;
    if (experts === 0 || sums.values.length % experts !== 0) {
      throw badInput('Sums and counts of an importance matrix disagree', {
        where: `${path}, tensor ${tensor}`,
        got: `[${sums.shape.join(', ')}] and [${counts.shape.join(', ')}]`,
      });
    }
    const columns = sums.values.length / experts;
    const values = sums.values.map((sum, i) => {
      const count = counts.values[Math.floor(i / columns)]!;
      return count > 0 ? sum / count : 0;
    });
    found.set(tensor, { experts, values });
  }
  return usable(found, path);
}

/** The older form: i32 entries; each i32 length, name, i32 calls, i32 values, f32 sums (over `calls`). What follows is of no use here. */
function parseDat(bytes: Buffer, path: string): Imatrix {
  let at = 0;
  const fail = (what: string): Error => badInput(`Not an importance matrix: ${what}`, { where: `${path}, byte ${at}` });
  const int = (most: number, what: string): number => {
    if (at + 4 > bytes.length) throw fail('the file ends early');
    const value = bytes.readInt32LE(at);
    if (value < 0 || value > most) throw fail(`${what} of ${value}`);
    at += 4;
    return value;
  };
  const entries = int(limits.entries, 'a number of entries');
  const found = new Map<string, Importance>();
  for (let e = 0; e < entries; e++) {
    const length = int(limits.name, 'a name');
    const name = decodeUtf8(bytes.subarray(at, at + length));
    if (name === undefined) throw fail('a name that is not UTF-8');
    if (found.has(name)) throw fail(`two entries for ${JSON.stringify(name)}`);
    at += length;
    const calls = int(2 ** 31 - 1, 'a number of calls');
    const count = int(limits.values, 'a number of values');
    if (at + 4 * count > bytes.length) throw fail('the file ends early');
    const values = Float32Array.from({ length: count }, (_, i) => bytes.readFloatLE(at + 4 * i) / Math.max(calls, 1));
    at += 4 * count;
    found.set(name, { experts: 1, values });
  }
  return usable(found, path);
}

function usable(found: Map<string, Importance>, path: string): Imatrix {
  if (found.size === 0) throw badInput('The importance matrix is empty', { where: path });
  for (const [name, { values }] of found) {
    if (values.every((value) => Number.isFinite(value) && value >= 0)) continue;
    throw badInput('An importance is negative or no number', { where: `${path}, tensor ${name}` });
  }
  return found;
}

/** Names what was read, for the fingerprint of a job. */
export function imatrixHash(imatrix: Imatrix): string {
  const hash = createHash('sha256');
  for (const [name, { values }] of imatrix) hash.update(name).update(new Uint8Array(values.buffer));
  return hash.digest('hex');
}

/**
 * The importance of a tensor's columns, [experts, columns]; undefined where the matrix does not know it.
 * Error: of another width.
 */
export function importanceOf(imatrix: Imatrix, name: string, experts: number, columns: number): Importance | undefined {
  const found = imatrix.get(name);
  if (found === undefined) return undefined;
  const { values } = found;
  // The older form does not say how many experts its sums are of.
  if (values.length === experts * columns) return { experts, values };
  if (values.length === columns) return { experts: 1, values };
  throw badInput('The importance matrix belongs to another model', {
    where: `tensor ${name}`,
    expected: `${columns} columns${experts > 1 ? ` for each of ${experts} experts` : ''}`,
    got: `${values.length} values`,
  });
}
