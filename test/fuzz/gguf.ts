import type { Random } from '../../src/base/rng.js';
import { dtypeSize } from '../../src/base/dtype.js';
import { ggmlBlocks, ggmlPlain } from '../../src/formats/ggml.js';
import { edge, nearby, oddTexts, pick, shuffled, u32, u64 } from './bytes.js';

/** A field of a header: a number, or a text behind its length. */
type Field = { readonly size: 1 | 2 | 4 | 8; readonly value: bigint } | { readonly text: Buffer };
interface Parts {
  readonly values: Field[][];
  readonly infos: Field[][];
  data: Buffer;
}

const sizes = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8] as const;

/** Takes a valid file apart: metadata values, tensor infos, data. */
function takeApart(file: Buffer): Parts {
  let at = 8;
  const number = (size: 1 | 2 | 4 | 8): Field & { value: bigint } => {
    const value = size === 8 ? file.readBigUInt64LE(at) : BigInt(file.readUIntLE(at, size));
    at += size;
    return { size, value };
  };
  const text = (): Field => {
    const length = Number(number(8).value);
    at += length;
    return { text: file.subarray(at - length, at) };
  };
  const scalar = (type: number): Field => (type === 8 ? text() : number(sizes[type] as 1));
  const [tensors, count] = [number(8).value, number(8).value];
  const values = Array.from({ length: Number(count) }, () => {
    const fields: Field[] = [text()];
    const type = number(4);
    fields.push(type);
    if (type.value !== 9n) return [...fields, scalar(Number(type.value))];
    const [of, length] = [number(4), number(8)];
    fields.push(of, length);
    for (let i = 0; i < Number(length.value); i++) fields.push(scalar(Number(of.value)));
    return fields;
  });
  const infos = Array.from({ length: Number(tensors) }, () => {
    const fields: Field[] = [text()];
    const dims = number(4);
    fields.push(dims);
    for (let i = 0; i < Number(dims.value); i++) fields.push(number(8));
    fields.push(number(4), number(8));
    return fields;
  });
  return { values, infos, data: file.subarray(Math.ceil(at / 32) * 32) };
}

function bytesOf(field: Field): Buffer {
  if ('text' in field) return Buffer.concat([u64(field.text.length), field.text]);
  return u64(field.value).subarray(0, field.size);
}

function put({ values, infos, data }: Parts, counts: readonly [bigint | number, bigint | number]): Buffer {
  const header = Buffer.concat([
    Buffer.from('GGUF'),
    u32(3),
    ...counts.map((count) => u64(count)),
    ...[...values, ...infos].flat().map(bytesOf),
  ]);
  return Buffer.concat([header, Buffer.alloc((32 - (header.length % 32)) % 32), data]);
}

const known = new WeakMap<Buffer, Parts | undefined>();

function partsOf(file: Buffer): Parts | undefined {
  if (known.has(file)) return known.get(file);
  let parts: Parts | undefined;
  try {
    parts = file.length < 65_536 ? takeApart(file) : undefined;
  } catch {
    parts = undefined; // already spoiled
  }
  known.set(file, parts);
  return parts;
}

/** Bytes of 256 values, by the numbers of types. */
const typeBytes = new Map<bigint, bigint>([
  ...ggmlPlain.map(([id, dtype]) => [BigInt(id), BigInt(256 * dtypeSize(dtype))] as const),
  ...Object.values(ggmlBlocks).map(({ id, values, bytes }) => [BigInt(id), BigInt((256 / values) * bytes)] as const),
]);

/** Lets each tensor begin where the one before it ends, and the data be as long as all, as far as that is sensible. */
function placed(parts: Parts): void {
  let at = 0n;
  for (const [i, fields] of parts.infos.entries()) {
    const numbers = fields.filter((field) => 'value' in field).map(({ value }) => value);
    const [type, dims] = [numbers.at(-2) ?? 0n, numbers.slice(1, -2)];
    if (fields.length < 3) continue;
    parts.infos[i] = [...fields.slice(0, -1), { size: 8, value: at }];
    const bytes = dims.reduce((n, dim) => n * dim, typeBytes.get(type) ?? 0n) / 256n;
    at = ((at + bytes + 31n) / 32n) * 32n;
  }
  if (at < 65_536n) parts.data = Buffer.alloc(Number(at));
}

/** Changes a metadata value or a tensor info; counts follow, mostly. */
export function reshapeGguf(random: Random, file: Buffer): Buffer {
  const parts = partsOf(file);
  if (parts === undefined) return file;
  const texts = [...parts.values, ...parts.infos].flatMap((fields) => fields.filter((field) => 'text' in field));
  const change = (field: Field): Field => {
    if ('text' in field) return random.below(2) === 0 && texts.length > 0 ? pick(random, texts) : { text: Buffer.from(pick(random, oddTexts)) };
    // Mostly small: types, dimensions, lengths.
    const value = random.below(3) === 0 ? BigInt(random.below(40)) : nearby(random, field.value);
    return { size: field.size, value };
  }; // prettier-ignore
  const list = (all: Field[][]): Field[][] => shuffled(random, all, (fields) => shuffled(random, fields, change));
  const which = random.below(2);
  const next = { ...parts, ...(which === 0 ? { values: list(parts.values) } : { infos: list(parts.infos) }) };
  if (random.below(40) === 0) next.data = Buffer.alloc(random.below(2 * parts.data.length + 1));
  if (random.below(4) > 0) placed(next);
  const counts: [bigint | number, bigint | number] = [next.infos.length, next.values.length];
  if (random.below(25) === 0) counts[random.below(2)] = edge(random);
  return put(next, counts);
}
