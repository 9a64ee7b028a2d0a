import { readFileSync } from 'node:fs';
import { beforeAll, describe, expect, it } from 'vitest';
import { loadNative } from '../../../src/backend/native.js';
import { provideScanner } from '../../../src/base/scanner.js';
import { buildSafetensorsHeader, readSafetensors, safetensorsDtype } from '../../../src/formats/safetensors.js';
import { inMemory } from '../../../src/formats/source.js';
import { badInputMessage } from '../../support/refusal.js';

const fixture = new URL('../../../fixtures/formats/safetensors/', import.meta.url);
const library = readFileSync(new URL('all-dtypes.safetensors', fixture));
const listing = JSON.parse(readFileSync(new URL('all-dtypes.json', fixture), 'utf8')) as Record<
  string,
  { dtype: string; shape: number[]; hex: string }
>;

const read = (bytes: Buffer): ReturnType<typeof readSafetensors> => readSafetensors(inMemory(bytes, 'x.safetensors'));

/** A file with this header text and so many bytes of data. */
function file(header: string | Buffer, data = 0): Buffer {
  const json = Buffer.from(header as string);
  const length = Buffer.alloc(8);
  length.writeBigUInt64LE(BigInt(json.length));
  return Buffer.concat([length, json, Buffer.alloc(data)]);
}
const one = (entry: string, data = 0): Buffer => file(`{"w":${entry}}`, data);
const f32 = (shape: string, offsets: string): string => `{"dtype":"F32","shape":${shape},"data_offsets":${offsets}}`;
const message = (bytes: Buffer): Promise<string> => badInputMessage(() => read(bytes));

const ways = [
  ['by the native scanner', () => loadNative().scanner],
  ['as any JSON', () => undefined],
] as const;

describe.each(ways)('readSafetensors %s', (way, load) => {
  beforeAll(() => provideScanner(load));

  it('tells where the names stand only where the scanner has read them', () => {
    const { tensors, names } = read(one(f32('[1]', '[0,4]'), 4));
    expect(tensors).toHaveLength(1);
    expect(names && [...names.places]).toEqual(way === 'as any JSON' ? undefined : [10, 11].map((at) => at - 8));
  });

  it('reads what the safetensors library wrote, all dtypes', () => {
    const { tensors, metadata } = read(library);
    expect(metadata['format']).toBe('pt "quoted" ü');
    expect(tensors.map(({ name }) => name).sort()).toEqual(Object.keys(listing).sort());
    for (const { name, shape, encoding, span } of tensors) {
      const expected = listing[name]!;
      expect([safetensorsDtype(encoding), shape], name).toEqual([expected.dtype, expected.shape]);
      expect(library.subarray(span.offset, span.offset + span.bytes).toString('hex'), name).toBe(expected.hex);
    }
  });

  it('accepts leading and trailing spaces, unaligned headers, extra fields, no tensors', () => {
    expect(read(one(`{"extra":"field",${f32('[1]', '[0,4]').slice(1)} `, 4)).tensors).toHaveLength(1);
    expect(read(file(`  {"w":${f32('[]', '[0,4]')}}  `, 4)).tensors[0]!.shape).toEqual([]);
    expect(read(file('{}')).tensors).toEqual([]);
    const odd =
      '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F64","shape":[1],"data_offsets":[1,9]}}';
    expect(read(file(odd, 9)).tensors).toHaveLength(2);
  });

  it('counts sub-byte elements', async () => {
    const f4 = (n: number, bytes: number): string => `{"dtype":"F4","shape":[${n}],"data_offsets":[0,${bytes}]}`;
    expect(read(one(f4(6, 3), 3)).tensors[0]!.encoding).toEqual({ kind: 'opaque', name: 'F4', bits: 4 });
    expect(await message(one(f4(5, 3), 3))).toContain('ends inside a byte');
  });

  it('changes its hash with header and size, not with weights', () => {
    const a = one(f32('[1]', '[0,4]'), 4);
    const b = Buffer.from(a);
    b[b.length - 1] = 1;
    expect(read(a).headerHash).toBe(read(b).headerHash);
    expect(read(a).headerHash).not.toBe(read(one(f32('[1,1]', '[0,4]'), 4)).headerHash);
  });
});

describe.each(ways)('hostile safetensors %s', (_, load) => {
  beforeAll(() => provideScanner(load));

  it('offsets that are no plain integers', async () => {
    for (const offsets of ['[00,4]', '[0,04]', '[0,4.0]', '[-0,4]', '[0,9007199254740993]', '[,4]', '[0,]']) {
      expect(await message(one(f32('[1]', offsets), 4)), offsets).toContain('x.safetensors, header');
    }
  });

  it('an empty file, and one that ends in the header', async () => {
    expect(await message(Buffer.alloc(0))).toContain('x.safetensors, byte 0');
    expect(await message(library.subarray(0, 100))).toContain('File ends before its header');
  });
  it('a header length of 2^63, and a header bomb just over the limit', async () => {
    const bomb = Buffer.alloc(16, 0xff);
    expect(await message(bomb)).toContain('header length is impossible');
    bomb.writeBigUInt64LE(100_000_001n);
    expect(await message(bomb)).toContain('at most 100000000');
  });
  it('a truncated file and trailing bytes', async () => {
    expect(await message(library.subarray(0, library.length - 1))).toContain('truncated');
    expect(await message(Buffer.concat([library, Buffer.alloc(1)]))).toContain('Bytes after the last tensor');
  });
  it('overlaps and holes', async () => {
    const two = (a: string, b: string): string => `{"a":${f32('[1]', a)},"b":${f32('[1]', b)}}`;
    expect(await message(file(two('[0,4]', '[2,6]'), 6))).toContain('overlap');
    expect(await message(file(two('[0,4]', '[0,4]'), 4))).toContain('overlap');
    expect(await message(file(two('[0,4]', '[6,10]'), 10))).toContain('Hole');
    expect(await message(file(two('[4,8]', '[8,12]'), 12))).toContain('Hole');
  });
  it('sizes that disagree, offsets backwards, negative, fractional, missing', async () => {
    expect(await message(one(f32('[2]', '[0,4]'), 4))).toContain('expected 8 bytes for F32 [2], got 4 bytes');
    expect(await message(one(f32('[1]', '[4,0]'), 4))).toContain('data_offsets');
    expect(await message(one(f32('[1]', '[0]'), 4))).toContain('data_offsets');
    expect(await message(one(f32('[-1]', '[0,4]'), 4))).toContain('non-negative');
    expect(await message(one(f32('[1.0]', '[0,4]'), 4))).toContain('non-negative');
    expect(await message(one('{"dtype":"F32","shape":[1]}', 4))).toContain('data_offsets');
    expect(await message(one('{"dtype":"F32","data_offsets":[0,4]}', 4))).toContain('shape');
    expect(await message(one('[]', 4))).toContain('no object');
  });
  it('shapes that overflow', async () => {
    const big = '4294967296';
    expect(await message(one(f32(`[${big},${big}]`, '[0,0]')))).toContain('overflows');
    expect(await message(one(f32('[0,18446744073709551615]', '[0,0]')))).toContain('Integer too large');
    expect(await message(one(f32(`[${big},${big},0]`, '[0,0]')))).toContain('overflows');
  });
  it('unknown dtypes, with a guess', async () => {
    expect(await message(one('{"dtype":"BF17","shape":[1],"data_offsets":[0,2]}', 2))).toContain('perhaps BF16');
    expect(await message(one('{"dtype":7,"shape":[1],"data_offsets":[0,2]}', 2))).toContain('Unknown dtype');
  });
  it('duplicate keys, __proto__ names, bad UTF-8, deep nesting, text after the header, metadata of numbers', async () => {
    const w = f32('[0]', '[0,0]');
    expect(await message(file(`{"w":${w},"w":${w}}`))).toContain('Duplicate key "w"');
    expect(read(file(`{"__proto__":${w},"constructor":${w}}`)).tensors.map((t) => t.name)).toEqual([
      '__proto__',
      'constructor',
    ]);
    expect(await message(file(Buffer.from([0x7b, 0x22, 0xff, 0x22, 0x3a, 0x31, 0x7d])))).toContain('UTF-8');
    expect(await message(file(`{"a":${'['.repeat(200_000)}`))).toContain('Nested deeper');
    expect(await message(file('{}{}'))).toContain('Text after the end');
    expect(await message(file('{"__metadata__":{"a":1}}'))).toContain('strings to strings');
    expect(await message(file('[]'))).toContain('no JSON object');
  });
});

describe('buildSafetensorsHeader', () => {
  it('makes the very bytes that the safetensors library writes', () => {
    const { tensors, metadata } = read(library);
    const plan = tensors.map(({ name, shape, encoding }) => ({ name, shape, dtype: safetensorsDtype(encoding)! }));
    const { header, offsets, size } = buildSafetensorsHeader(plan.reverse(), metadata);
    const made = Buffer.alloc(size);
    header.copy(made);
    for (const { name, span } of tensors) library.copy(made, offsets.get(name), span.offset, span.offset + span.bytes);
    expect(made.equals(library)).toBe(true);
  });

  it('keeps the order that is given where every tensor lies aligned in it', () => {
    const tensor = (name: string, dtype: string, ...shape: number[]) => ({ name, dtype, shape });
    const plan = [tensor('b', 'BF16', 4), tensor('c', 'F32', 2), tensor('a', 'I64', 1), tensor('d', 'BF16', 3)];
    const offsets = (...args: Parameters<typeof buildSafetensorsHeader>) => {
      const { header, offsets } = buildSafetensorsHeader(...args);
      return [...offsets].map(([name, at]) => `${name} ${at - header.length}`);
    };
    expect(offsets(plan, {}, true)).toEqual(['b 0', 'c 8', 'a 16', 'd 24']);
    expect(offsets([...plan].reverse(), {}, true)).toEqual(['a 0', 'c 8', 'b 16', 'd 24']); // 'c' would begin at 14
    expect(offsets(plan)).toEqual(['a 0', 'c 8', 'b 16', 'd 24']);
    const { header, size } = buildSafetensorsHeader(plan, {}, true);
    const { tensors } = read(Buffer.concat([header, Buffer.alloc(size - header.length)]));
    expect(tensors.map(({ name }) => name)).toEqual(['b', 'c', 'a', 'd']);
  });
});
