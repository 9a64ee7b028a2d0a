import type { DType } from '../base/dtype.js';
import { badInput, didYouMean } from '../base/errors.js';
import { scanner } from '../base/scanner.js';
import type { Places } from '../base/scanner.js';
import { isJsonObject, parseJson, tryJson } from './json.js';
import type { JsonObject, JsonValue } from './json.js';
import { hashHeaders, safeU64 } from './source.js';
import type { RandomAccess } from './source.js';
import type { Encoding, ParsedFile, TensorEntry } from './types.js';

/** As in the reference implementation. */
const maxHeader = 100_000_000;

const plain = (dtype: DType, bits: number): { encoding: Encoding; bits: number } => ({
  encoding: { kind: 'plain', dtype },
  bits,
});
const opaque = (name: string, bits: number): { encoding: Encoding; bits: number } => ({
  encoding: { kind: 'opaque', name, bits },
  bits,
});

const dtypes = new Map<string, { readonly encoding: Encoding; readonly bits: number }>([
  ['BOOL', plain('bool', 8)],
  ['F4', opaque('F4', 4)],
  ['F6_E2M3', opaque('F6_E2M3', 6)],
  ['F6_E3M2', opaque('F6_E3M2', 6)],
  ['U8', plain('u8', 8)],
  ['I8', plain('i8', 8)],
  ['F8_E5M2', plain('f8_e5m2', 8)],
  ['F8_E4M3', plain('f8_e4m3', 8)],
  ['F8_E8M0', opaque('F8_E8M0', 8)],
  ['F8_E4M3FNUZ', opaque('F8_E4M3FNUZ', 8)],
  ['F8_E5M2FNUZ', opaque('F8_E5M2FNUZ', 8)],
  ['I16', plain('i16', 16)],
  ['U16', plain('u16', 16)],
  ['F16', plain('f16', 16)],
  ['BF16', plain('bf16', 16)],
  ['I32', plain('i32', 32)],
  ['U32', plain('u32', 32)],
  ['F32', plain('f32', 32)],
  ['C64', opaque('C64', 64)],
  ['F64', plain('f64', 64)],
  ['I64', plain('i64', 64)],
  ['U64', plain('u64', 64)],
]);

const nameOf = new Map<string, string>(
  [...dtypes].flatMap(([name, { encoding }]) => (encoding.kind === 'plain' ? [[encoding.dtype, name] as const] : [])),
);

export interface SafetensorsFile extends ParsedFile {
  readonly metadata: Readonly<Record<string, string>>;
  /** Where the tensors' data begins, bytes. */
  readonly dataStart: number;
}

/**
 * Reads a safetensors header. Refuses what the Rust reference refuses (sizes, holes, overlaps, trailing bytes,
 * unknown dtypes, non-string metadata) and duplicate keys, which the specification forbids.
 */
export function readSafetensors(source: RandomAccess): SafetensorsFile {
  const { path, size } = source;
  const length = safeU64(source.read(0, 8, 'header length'), 0);
  if (length > maxHeader) {
    throw badInput('Not a safetensors file, or a damaged one: the header length is impossible', {
      where: `${path}, byte 0`,
      expected: `at most ${maxHeader}`,
      got: `${length}`,
    });
  }
  const bytes = source.read(8, length, 'header');
  const dataStart = 8 + length;
  const found = readUsual(bytes, path, dataStart) ?? readAny(bytes, path, dataStart);
  requireContiguous(found.tensors, dataStart, size, path);
  return { ...found, notes: [], headerHash: hashHeaders(size, [bytes]), dataStart };
}

type Listing = Pick<SafetensorsFile, 'tensors' | 'metadata' | 'names'>;

const metadataPattern = /^\{(?:"__metadata__":(\{(?:"[^"\\]*":"[^"\\]*",?)*\})(?:,(?=")|(?=\})))?/;
/**
 * A header in the form that the libraries write. Undefined when anything in it is otherwise; then it is read as any JSON.
 */
function readUsual(bytes: Buffer, path: string, dataStart: number): Listing | undefined {
  const [start, metadata] = metadataPattern.exec(bytes.toString('latin1', 0, 4096)) ?? [];
  if (start === undefined) return undefined;
  const from = '{"__metadata__":'.length;
  // Its values may hold any text: of the bytes, Latin-1 only tells where they lie.
  const listed = metadata === undefined ? null : tryJson(bytes.subarray(from, from + metadata.length), { where: path });
  if (listed === undefined) return undefined;
  const found = scanner()?.header(bytes, start.length);
  if (!found) return undefined;
  const { names: places, formOf, offsets } = found;
  const forms = readForms(bytes, found.forms);
  if (forms === undefined) return undefined;
  const tensors: TensorEntry[] = [];
  for (let i = 0; i < formOf.length; i++) {
    const name = (bytes as Latin1).latin1Slice(places[2 * i]!, places[2 * i + 1]!);
    if (name === '__metadata__') return undefined;
    tensors.push(place(name, forms[formOf[i]!]!, offsets[2 * i]!, offsets[2 * i + 1]!, path, dataStart));
  }
  return { tensors, names: { bytes, places }, metadata: readMetadata(listed, path) };
}

/** `toString('latin1', ...)` without its detours, which would take as long again; @types/node leaves it out. */
type Latin1 = Buffer & { latin1Slice(start: number, end: number): string };

/** What tensors of a file have in common: there are few forms, and many tensors share one. */
interface Form {
  readonly type: string;
  readonly encoding: Encoding;
  readonly shape: readonly number[];
  /** Of the whole tensor; no safe integer where the shape overflows. */
  readonly bits: number;
}

type DTypeForm = Pick<Form, 'encoding' | 'bits'>;

const formOf = (type: string, { encoding, bits }: DTypeForm, shape: readonly number[]): Form => ({
  ...{ type, encoding, shape },
  bits: shape.reduce((product, dim) => (Number.isSafeInteger(product) ? product * dim : product), bits),
});

/** 15 digits are exact; a leading zero is no JSON. */
const formPattern = /^:\{"dtype":"(\w+)","shape":\[((?:0|[1-9]\d{0,14})(?:,(?:0|[1-9]\d{0,14}))*)?\]$/;

/** `:{"dtype":"BF16","shape":[4096,7168]` at each of `places`; undefined where one is otherwise. */
function readForms(bytes: Buffer, places: Places): Form[] | undefined {
  const known = new Map<string, Form>();
  const forms: Form[] = [];
  for (let i = 0; i < places.length; i += 2) {
    const text = bytes.toString('latin1', places[i], places[i + 1]);
    const form = known.get(text) ?? readForm(text);
    if (form === undefined) return undefined;
    known.set(text, form);
    forms.push(form);
  }
  return forms;
}

function readForm(text: string): Form | undefined {
  const [, type, sizes] = formPattern.exec(text) ?? [];
  const dtype = type === undefined ? undefined : dtypes.get(type);
  const shape = sizes === undefined ? [] : sizes.split(',').map(Number);
  return dtype && shape.length <= 64 ? formOf(type!, dtype, shape) : undefined;
}

function readAny(bytes: Buffer, path: string, dataStart: number): Listing {
  const header = parseJson(bytes, { where: `${path}, header`, maxDepth: 32, integersOnly: true });
  if (!isJsonObject(header)) throw badInput('The safetensors header is no JSON object', { where: path });
  const metadata = readMetadata(header['__metadata__'] ?? null, path);
  const tensors: TensorEntry[] = [];
  for (const name in header) {
    if (name !== '__metadata__') tensors.push(readTensor(name, header[name]!, path, dataStart));
  }
  return { tensors, metadata };
}

function readMetadata(value: JsonValue, path: string): Record<string, string> {
  if (value === null) return Object.create(null) as Record<string, string>;
  const strings = isJsonObject(value) && Object.values(value).every((item) => typeof item === 'string');
  if (!strings) {
    throw badInput('Safetensors metadata must map strings to strings', { where: `${path}, header, __metadata__` });
  }
  return value as Record<string, string>;
}

function readTensor(name: string, value: JsonValue, path: string, dataStart: number): TensorEntry {
  const where = `${path}, tensor ${JSON.stringify(name)}`;
  if (!isJsonObject(value)) throw badInput('A tensor in the header is no object', { where });
  const dtype = readDtype(value, where);
  const shape = readIntegers(value, 'shape', where);
  const offsets = readIntegers(value, 'data_offsets', where);
  const [begin, end] = offsets;
  if (offsets.length !== 2 || begin! > end!) {
    throw badInput('Bad data_offsets', { where, expected: '[begin, end]', got: JSON.stringify(offsets) });
  }
  return place(name, formOf(value['dtype'] as string, dtype, shape), begin!, end!, path, dataStart);
}

/** Checks a tensor's shape against its bytes. */
function place(
  name: string,
  { type, encoding, shape, bits }: Form,
  begin: number,
  end: number,
  path: string,
  dataStart: number,
): TensorEntry {
  const bytes = end - begin;
  if (bytes >= 0 && bits === 8 * bytes && Number.isSafeInteger(bits)) {
    return { name, shape, encoding, span: { path, offset: dataStart + begin, bytes } };
  }
  const where = `${path}, tensor ${JSON.stringify(name)}`;
  if (bytes < 0) throw badInput('Bad data_offsets', { where, expected: '[begin, end]', got: `[${begin},${end}]` });
  if (!Number.isSafeInteger(bits)) throw badInput('Shape overflows', { where, got: `[${shape.join(', ')}]` });
  if (bits % 8 !== 0) {
    throw badInput('The tensor ends inside a byte', { where, got: `${bits} bits`, expected: 'a multiple of 8 bits' });
  }
  throw badInput('Size of a tensor disagrees with its offsets', {
    where,
    expected: `${bits / 8} bytes for ${type} [${shape.join(', ')}]`,
    got: `${bytes} bytes`,
  });
}

function readDtype(value: JsonObject, where: string): DTypeForm {
  const name = value['dtype'];
  const dtype = typeof name === 'string' ? dtypes.get(name) : undefined;
  if (dtype !== undefined) return dtype;
  const near = typeof name === 'string' ? didYouMean(name, dtypes.keys()) : undefined;
  throw badInput('Unknown dtype', {
    where,
    got: JSON.stringify(name)?.slice(0, 80) ?? 'none',
    expected: near === undefined ? `one of ${[...dtypes.keys()].join(', ')}` : `perhaps ${near}`,
  });
}

function readIntegers(value: JsonObject, key: string, where: string): number[] {
  const list = value[key];
  if (
    Array.isArray(list) &&
    list.length <= 64 &&
    list.every((item) => Number.isSafeInteger(item) && Number(item) >= 0)
  ) {
    return list as number[];
  }
  const got = list === undefined ? 'none' : JSON.stringify(list).slice(0, 80);
  throw badInput(`Bad ${key}`, { where, expected: 'non-negative integers', got });
}

/** The data section must be covered exactly: no hole to hide bytes in, no byte with two meanings. */
function requireContiguous(tensors: readonly TensorEntry[], dataStart: number, size: number, path: string): void {
  const order = (a: TensorEntry, b: TensorEntry) => a.span.offset - b.span.offset || a.span.bytes - b.span.bytes;
  let at = dataStart;
  const sorted = tensors.every(({ span }) => span.offset === at && ((at += span.bytes), true));
  if (!sorted) at = dataStart;
  for (const { name, span } of sorted ? [] : [...tensors].sort(order)) {
    if (span.offset !== at) {
      const what = span.offset < at ? 'Tensors overlap' : 'Hole between tensors';
      const where = `${path}, tensor ${JSON.stringify(name)}`;
      throw badInput(what, { where, expected: `data from byte ${at}`, got: `byte ${span.offset}` });
    }
    at += span.bytes;
  }
  if (at === size) return;
  throw badInput(at > size ? 'File is truncated' : 'Bytes after the last tensor', {
    where: path,
    expected: `${at} bytes by the header`,
    got: `${size} bytes`,
    hint:
      at > size ? 'The download or copy stopped early: fetch the file again.' : 'The file is damaged: fetch it again.',
  });
}

/** The dtype name in a header, for a plain or opaque encoding; others have none. */
export function safetensorsDtype(encoding: Encoding): string | undefined {
  if (encoding.kind === 'plain') return nameOf.get(encoding.dtype);
  return encoding.kind === 'opaque' && dtypes.has(encoding.name) ? encoding.name : undefined;
}

export interface HeaderTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** As `safetensorsDtype` names it. */
  readonly dtype: string;
}

/** Bytes that a tensor takes. */
export function safetensorsBytes({ dtype, shape }: HeaderTensor): number {
  return (shape.reduce((n, d) => n * d, 1) * dtypes.get(dtype)!.bits) / 8;
}

/** Place in the reference's list of dtypes, which ascends by size: its writer sorts by this, descending, then by name. */
const rank = new Map([...dtypes.keys()].map((name, index) => [name, index]));

/** By descending element size, so that each lies aligned, then by name. */
const inReferenceOrder = (tensors: readonly HeaderTensor[]): HeaderTensor[] =>
  [...tensors].sort(
    (a, b) => rank.get(b.dtype)! - rank.get(a.dtype)! || (a.name < b.name ? -1 : a.name > b.name ? 1 : 0),
  );

/** Whether every tensor of this order begins at a multiple of its element size. */
function liesAligned(tensors: readonly HeaderTensor[]): boolean {
  let at = 0;
  return tensors.every((tensor) => {
    const aligned = at % Math.max(1, dtypes.get(tensor.dtype)!.bits / 8) === 0;
    at += safetensorsBytes(tensor);
    return aligned;
  });
}

/**
 * Builds a header, padded with spaces to 8 bytes. `offsets` are absolute, in bytes; `size` is the whole file's.
 * @param asGiven data lies in the order of `tensors` where that leaves each aligned, else in the reference writer's.
 */
export function buildSafetensorsHeader(
  tensors: readonly HeaderTensor[],
  metadata: Readonly<Record<string, string>> = {},
  asGiven = false,
): { header: Buffer; offsets: Map<string, number>; size: number } {
  const entries: string[] = [];
  if (Object.keys(metadata).length > 0) entries.push(`"__metadata__":${JSON.stringify(metadata)}`);
  const relative = new Map<string, number>();
  let at = 0;
  for (const tensor of asGiven && liesAligned(tensors) ? tensors : inReferenceOrder(tensors)) {
    if (tensor.name === '__metadata__') throw badInput('safetensors cannot hold a tensor named __metadata__');
    const end = at + safetensorsBytes(tensor);
    const { name, dtype, shape } = tensor;
    entries.push(`${JSON.stringify(name)}:${JSON.stringify({ dtype, shape, data_offsets: [at, end] })}`);
    relative.set(name, at);
    at = end;
  }
  const json = Buffer.from(`{${entries.join(',')}}`);
  const padded = Math.ceil(json.length / 8) * 8;
  const header = Buffer.alloc(8 + padded, 0x20);
  header.writeBigUInt64LE(BigInt(padded), 0);
  json.copy(header, 8);
  const offsets = new Map([...relative].map(([name, offset]) => [name, header.length + offset]));
  return { header, offsets, size: header.length + at };
}
