import { dtypeSize } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import type { ConvertError } from '../base/errors.js';
import { Cursor } from './cursor.js';
import { encodedBytes, ggmlBlocks, ggmlOthers, ggmlPlain } from './ggml.js';
import { hashHeaders } from './source.js';
import type { RandomAccess } from './source.js';
import type { Encoding, GgmlType, ParsedFile, TensorEntry } from './types.js';

/** Types of metadata values, by their numbers in the file. */
export const ggufTypes = ['u8', 'i8', 'u16', 'i16', 'u32', 'i32', 'f32', 'bool', 'string', 'array', 'u64', 'i64', 'f64'] as const; // prettier-ignore
export type GgufType = (typeof ggufTypes)[number];
export type GgufScalar = number | bigint | boolean | string;

/** A metadata value with its type; 64-bit integers are numbers where they fit. */
export type GgufValue =
  | { readonly type: Exclude<GgufType, 'array'>; readonly value: GgufScalar }
  | { readonly type: 'array'; readonly of: Exclude<GgufType, 'array'>; readonly value: readonly GgufScalar[] };

export interface GgufFile extends ParsedFile {
  readonly version: number;
  readonly metadata: ReadonlyMap<string, GgufValue>;
  /** Where the tensors' data begins, bytes. */
  readonly dataStart: number;
}

/** GGML's own, but for the header: the largest real one (a vocabulary of 256,000 with merges) takes 12 MB. */
const limits = { keyBytes: 65_535, nameBytes: 63, arrayItems: 2 ** 25, dims: 4, header: 2 ** 27 };
const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

const encodings = new Map<number, Encoding>([
  ...ggmlPlain.map(([id, dtype]) => [id, { kind: 'plain', dtype }] as const),
  ...Object.entries(ggmlBlocks).map(([type, { id }]) => [id, { kind: 'ggml', type: type as GgmlType }] as const),
]);

/** The number of an encoding in GGUF files; undefined when they cannot hold it. */
export function ggufTypeId(encoding: Encoding): number | undefined {
  if (encoding.kind === 'ggml') return ggmlBlocks[encoding.type].id;
  return encoding.kind === 'plain' ? ggmlPlain.find(([, dtype]) => dtype === encoding.dtype)?.[0] : undefined;
}

/**
 * Reads the header of a GGUF file, version 2 or 3: metadata and tensor infos. Refuses what llama.cpp refuses: wrong
 * magic, unknown versions and types, duplicates, rows that are no whole number of blocks, offsets that are not the
 * running total. Tensor names and shapes are as in the file, dimensions in row-major order.
 */
export function readGguf(source: RandomAccess): GgufFile {
  const cursor = new Cursor(source, 'GGUF header', 0, Math.min(source.size, limits.header));
  const magic = cursor.bytes(4).toString('latin1');
  if (magic !== 'GGUF') {
    throw badInput('Not a GGUF file', {
      where: `${source.path}, byte 0`,
      expected: '"GGUF"',
      got: JSON.stringify(magic),
    });
  }
  const version = cursor.u32();
  if (version !== 2 && version !== 3) {
    const swapped = version === 0x02000000 || version === 0x03000000;
    throw badInput(swapped ? 'The GGUF file is big-endian' : 'Unknown GGUF version', {
      where: cursor.where(4),
      expected: '2 or 3, little-endian',
      got: `${version}`,
      hint:
        version === 1 ? 'Version 1 is of 2023: convert the model again from its source.' : 'Download the file again.',
    });
  }
  const [tensorCount, valueCount] = [cursor.u64(), cursor.u64()];
  requireRoom(cursor, tensorCount, 24, 'tensors');
  requireRoom(cursor, valueCount, 13, 'metadata values');
  const metadata = new Map<string, GgufValue>();
  for (let i = 0; i < valueCount; i++) {
    const at = cursor.position;
    const key = readString(cursor, limits.keyBytes, 'metadata key');
    if (metadata.has(key)) throw bad('Duplicate metadata key', cursor, at, JSON.stringify(key));
    metadata.set(key, readValue(cursor, key));
  }
  const alignment = readAlignment(metadata, source.path);
  const infos = Array.from({ length: tensorCount }, () => readInfo(cursor));
  const dataStart = Math.ceil(cursor.position / alignment) * alignment;
  const header = source.read(0, cursor.position, 'header');
  const tensors = placeTensors(infos, dataStart, alignment, source);
  return { tensors, notes: [], headerHash: hashHeaders(source.size, [header]), version, metadata, dataStart };
}

function bad(what: string, cursor: Cursor, at: number, got?: string): ConvertError {
  return badInput(`Bad GGUF file: ${what}`, { where: cursor.where(at), ...(got !== undefined && { got }) });
}

/** A count is refused before anything is allocated for it when the file cannot hold so many. */
function requireRoom(cursor: Cursor, count: number, bytesEach: number, what: string): void {
  if (count * bytesEach <= cursor.end - cursor.position) return;
  throw bad(`more ${what} than the file has room for`, cursor, cursor.position, `${count}`);
}

function readString(cursor: Cursor, limit: number, what: string): string {
  const at = cursor.position;
  const length = cursor.u64();
  if (length > limit) throw bad(`a ${what} of ${length} bytes`, cursor, at);
  const bytes = cursor.bytes(length);
  try {
    return utf8.decode(bytes);
  } catch {
    throw bad(`a ${what} that is not UTF-8`, cursor, at);
  }
}

function readType(cursor: Cursor): GgufType {
  const at = cursor.position;
  const id = cursor.u32();
  const type = ggufTypes[id];
  if (type === undefined) throw bad('unknown type of a metadata value', cursor, at, `${id}`);
  return type;
}

const itemBytes: Record<Exclude<GgufType, 'array'>, number> = {
  u8: 1, i8: 1, u16: 2, i16: 2, u32: 4, i32: 4, f32: 4, bool: 1, string: 8, u64: 8, i64: 8, f64: 8,
}; // prettier-ignore

function readValue(cursor: Cursor, key: string): GgufValue {
  const type = readType(cursor);
  if (type !== 'array') return { type, value: readScalar(cursor, type) };
  const at = cursor.position;
  const of = readType(cursor);
  if (of === 'array') throw bad('an array of arrays', cursor, at, JSON.stringify(key));
  const count = cursor.u64();
  if (count > limits.arrayItems) throw bad(`an array of ${count} values`, cursor, at, JSON.stringify(key));
  requireRoom(cursor, count, itemBytes[of], 'array values');
  const value: GgufScalar[] = [];
  for (let i = 0; i < count; i++) value.push(readScalar(cursor, of));
  return { type, of, value };
}

function readScalar(cursor: Cursor, type: Exclude<GgufType, 'array'>): GgufScalar {
  const at = cursor.position;
  switch (type) {
    case 'u8':
      return cursor.u8();
    case 'i8':
      return cursor.bytes(1).readInt8();
    case 'u16':
      return cursor.u16();
    case 'i16':
      return cursor.bytes(2).readInt16LE();
    case 'u32':
      return cursor.u32();
    case 'i32':
      return cursor.i32();
    case 'f32':
      return cursor.bytes(4).readFloatLE();
    case 'f64':
      return cursor.bytes(8).readDoubleLE();
    case 'u64':
      return narrow(cursor.bytes(8).readBigUInt64LE());
    case 'i64':
      return narrow(cursor.i64());
    case 'string':
      return readString(cursor, limits.header, 'string');
    case 'bool': {
      const byte = cursor.u8();
      if (byte > 1) throw bad('a truth value that is neither 0 nor 1', cursor, at, `${byte}`);
      return byte === 1;
    }
  }
}

const narrow = (value: bigint): number | bigint =>
  value >= Number.MIN_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : value;

function readAlignment(metadata: ReadonlyMap<string, GgufValue>, path: string): number {
  const found = metadata.get('general.alignment');
  if (found === undefined) return 32;
  const { type, value } = found;
  if (type === 'u32' && typeof value === 'number' && value > 0 && (value & (value - 1)) === 0 && value <= 2 ** 20) {
    return value;
  }
  throw badInput('Bad GGUF file: general.alignment', { where: path, expected: 'a u32, power of two', got: `${type} ${String(value)}` }); // prettier-ignore
}

interface Info {
  readonly name: string;
  readonly shape: readonly number[];
  readonly encoding: Encoding;
  readonly offset: number;
  readonly bytes: number;
  readonly at: number;
}

function readInfo(cursor: Cursor): Info {
  const at = cursor.position;
  const name = readString(cursor, limits.nameBytes, 'tensor name');
  const fail = (what: string, got?: string): ConvertError => bad(`tensor ${JSON.stringify(name)}: ${what}`, cursor, at, got); // prettier-ignore
  const dims = cursor.u32();
  if (dims > limits.dims) throw fail(`more than ${limits.dims} dimensions`, `${dims}`);
  const shape = Array.from({ length: dims }, () => cursor.u64()).reverse();
  const id = cursor.u32();
  const encoding = encodings.get(id);
  if (encoding === undefined) {
    throw badInput('This GGML type is not read', {
      where: `${cursor.source.path}, tensor ${JSON.stringify(name)}`,
      got: ggmlOthers.get(id) ?? `type ${id}`,
      expected: [...ggmlPlain.map(([, dtype]) => dtype), ...Object.keys(ggmlBlocks)].join(', '),
      hint: 'Take a file of another quantization of the same model.',
    });
  }
  let product = 1;
  for (const dim of shape) product *= dim;
  if (!Number.isSafeInteger(product * 8) || shape.some((dim) => !Number.isSafeInteger(dim))) {
    throw fail('the shape overflows', `[${shape.join(', ')}]`);
  }
  const bytes = encodedBytes(shape, encoding);
  if (Number.isNaN(bytes)) throw fail('a row is no whole number of blocks', `[${shape.join(', ')}]`);
  return { name, shape, encoding, offset: cursor.u64(), bytes, at };
}

/** Each tensor must begin where the one before it ends, padded: no overlap, no hole to hide bytes in. */
function placeTensors(
  infos: readonly Info[],
  dataStart: number,
  alignment: number,
  { path, size }: RandomAccess,
): TensorEntry[] {
  const names = new Set<string>();
  let at = 0;
  return infos.map(({ name, shape, encoding, offset, bytes, at: info }) => {
    const where = `${path}, byte ${info}, tensor ${JSON.stringify(name)}`;
    if (names.has(name)) throw badInput('Bad GGUF file: two tensors of one name', { where });
    names.add(name);
    if (offset !== at) {
      throw badInput('Bad GGUF file: a tensor is not where it should be', {
        where,
        expected: `offset ${at}`,
        got: `${offset}`,
      });
    }
    const start = dataStart + offset;
    if (start + bytes > size) {
      throw badInput('The GGUF file is truncated', {
        where,
        expected: `at least ${start + bytes} bytes`,
        got: `${size} bytes`,
        hint: 'The download or copy stopped early: fetch the file again.',
      });
    }
    at = Math.ceil((at + bytes) / alignment) * alignment;
    return { name, shape, encoding, span: { path, offset: start, bytes } };
  });
}

export interface GgufTensorPlan {
  readonly name: string;
  /** Row-major, as everywhere else; written reversed. */
  readonly shape: readonly number[];
  readonly encoding: Encoding;
}

/** Builds the header of a GGUF v3 file; `offsets` are absolute, in bytes. */
export function buildGgufHeader(
  metadata: ReadonlyMap<string, GgufValue>,
  tensors: readonly GgufTensorPlan[],
): { header: Buffer; offsets: Map<string, number>; size: number } {
  const alignment = readAlignment(metadata, 'the metadata to be written');
  const parts: Buffer[] = [Buffer.from('GGUF'), number('u32', 3), number('u64', tensors.length)];
  parts.push(number('u64', metadata.size));
  for (const [key, entry] of metadata) {
    parts.push(text(key), number('u32', ggufTypes.indexOf(entry.type)));
    if (entry.type !== 'array') parts.push(scalar(entry.type, entry.value));
    else {
      parts.push(number('u32', ggufTypes.indexOf(entry.of)), number('u64', entry.value.length));
      for (const item of entry.value) parts.push(scalar(entry.of, item));
    }
  }
  const relative = new Map<string, number>();
  let at = 0;
  for (const { name, shape, encoding } of tensors) {
    const id = ggufTypeId(encoding);
    const bytes = encodedBytes(shape, encoding);
    if (
      id === undefined ||
      Number.isNaN(bytes) ||
      Buffer.byteLength(name) > limits.nameBytes ||
      shape.length > limits.dims
    ) {
      throw badInput('GGUF cannot hold this tensor', {
        where: `tensor ${JSON.stringify(name)}`,
        expected: `a name of at most ${limits.nameBytes} bytes, at most ${limits.dims} dimensions, whole blocks, a GGML type`,
        got: `[${shape.join(', ')}]`,
      });
    }
    const dims = [...shape].reverse().map((dim) => number('u64', dim));
    parts.push(text(name), number('u32', shape.length), ...dims, number('u32', id), number('u64', at));
    relative.set(name, at);
    at = Math.ceil((at + bytes) / alignment) * alignment;
  }
  const bare = Buffer.concat(parts);
  const header = Buffer.alloc(Math.ceil(bare.length / alignment) * alignment);
  bare.copy(header);
  const offsets = new Map([...relative].map(([name, offset]) => [name, header.length + offset]));
  return { header, offsets, size: header.length + at };
}

function text(value: string): Buffer {
  const bytes = Buffer.from(value);
  return Buffer.concat([number('u64', bytes.length), bytes]);
}

function scalar(type: Exclude<GgufType, 'array'>, value: GgufScalar): Buffer {
  if (type === 'string') return text(value as string);
  return number(type, typeof value === 'boolean' ? Number(value) : (value as number | bigint));
}

function number(type: Exclude<GgufType, 'array' | 'string'>, value: number | bigint): Buffer {
  const buffer = Buffer.alloc(type === 'bool' ? 1 : dtypeSize(type));
  if (type === 'u64') buffer.writeBigUInt64LE(BigInt(value));
  else if (type === 'i64') buffer.writeBigInt64LE(BigInt(value));
  else if (type === 'f32') buffer.writeFloatLE(Number(value));
  else if (type === 'f64') buffer.writeDoubleLE(Number(value));
  else if (type.startsWith('i')) buffer.writeIntLE(Number(value), 0, buffer.length);
  else buffer.writeUIntLE(Number(value), 0, buffer.length);
  return buffer;
}
