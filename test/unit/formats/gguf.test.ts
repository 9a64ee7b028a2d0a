import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { encodingName, ggmlBlocks } from '../../../src/formats/ggml.js';
import { buildGgufHeader, readGguf } from '../../../src/formats/gguf.js';
import type { GgufFile, GgufValue } from '../../../src/formats/gguf.js';
import { inMemory } from '../../../src/formats/source.js';
import type { Encoding } from '../../../src/formats/types.js';
import { badInputMessage } from '../../support/refusal.js';

interface Expected {
  metadata: Record<string, unknown>;
  tensors: Record<string, { type: string; shape: number[]; hex: string }>;
}
const folder = new URL('../../../fixtures/formats/gguf/', import.meta.url);
const bytesOf = (name: string): Buffer => readFileSync(new URL(name, folder));
const expected = JSON.parse(bytesOf('expected.json').toString()) as Record<string, Expected>;
const read = (bytes: Buffer): GgufFile => readGguf(inMemory(bytes, 'x.gguf'));
const f32: Encoding = { kind: 'plain', dtype: 'f32' };

/** As gguf-py's listing has them: f32 as the double that it is, integers beyond 2^53 as text. */
function plain({ value }: GgufValue): unknown {
  const one = (item: unknown): unknown => (typeof item === 'bigint' ? item.toString() : item);
  return Array.isArray(value) ? value.map(one) : one(value);
}

describe('readGguf', () => {
  it.each(Object.keys(expected))('reads %s as gguf-py does', (name) => {
    const bytes = bytesOf(name);
    const { metadata, tensors, version } = read(bytes);
    const want = expected[name]!;
    expect(version).toBe(name === 'version-2.gguf' ? 2 : 3);
    expect(Object.fromEntries([...metadata].map(([key, value]) => [key, plain(value)]))).toEqual(want.metadata);
    expect(tensors.map((tensor) => tensor.name)).toEqual(Object.keys(want.tensors));
    for (const { name: tensor, encoding, shape, span } of tensors) {
      const { type, hex, shape: rows } = want.tensors[tensor]!;
      expect([encodingName(encoding), shape], tensor).toEqual([type, rows]);
      expect(bytes.subarray(span.offset, span.offset + span.bytes).toString('hex'), tensor).toBe(hex);
    }
  });

  it('keeps the types of metadata', () => {
    const { metadata } = read(bytesOf('all-types.gguf'));
    for (const type of ['u8', 'i8', 'u16', 'i16', 'u32', 'i32', 'f32', 'bool', 'string', 'u64', 'i64', 'f64']) {
      expect(metadata.get(`t.${type}`)!.type).toBe(type);
    }
    expect(metadata.get('t.u64')!.value).toBe(2n ** 64n - 1n);
    expect(metadata.get('t.ints')).toEqual({ type: 'array', of: 'i32', value: [1, -2, 3] });
  });
});

describe('buildGgufHeader', () => {
  it.each(['all-types.gguf', 'aligned.gguf'])('makes the very bytes of gguf-py for %s', (name) => {
    const bytes = bytesOf(name);
    const { metadata, tensors } = read(bytes);
    const { header, offsets, size } = buildGgufHeader(metadata, tensors);
    const made = Buffer.alloc(size);
    header.copy(made);
    for (const { name: tensor, span } of tensors) {
      bytes.copy(made, offsets.get(tensor), span.offset, span.offset + span.bytes);
    }
    expect(made.equals(bytes)).toBe(true);
  });

  it('refuses what GGUF cannot hold', async () => {
    const refuse = (name: string, shape: number[], encoding: Encoding): Promise<string> =>
      badInputMessage(() => buildGgufHeader(new Map(), [{ name, shape, encoding }]));
    expect(await refuse('x'.repeat(64), [1], f32)).toContain('at most 63 bytes');
    expect(await refuse('x', [1, 1, 1, 1, 1], f32)).toContain('4 dimensions');
    expect(await refuse('x', [2, 40], { kind: 'ggml', type: 'q4_0' })).toContain('whole blocks');
    expect(await refuse('x', [2], { kind: 'plain', dtype: 'u8' })).toContain('GGML type');
  });
});

/** A file built field by field. */
class Builder {
  readonly parts: Buffer[] = [];
  u32(...values: number[]): this {
    for (const value of values) this.parts.push(Buffer.from(Uint32Array.of(value).buffer));
    return this;
  }
  u64(...values: (number | bigint)[]): this {
    for (const value of values) this.parts.push(Buffer.from(BigUint64Array.of(BigInt(value)).buffer));
    return this;
  }
  text(value: string | Buffer): this {
    const bytes = Buffer.from(value as string);
    this.u64(bytes.length).parts.push(bytes);
    return this;
  }
  raw(value: string | Buffer): this {
    this.parts.push(Buffer.from(value as string));
    return this;
  }
  start(tensors: number | bigint, values: number | bigint): this {
    return this.raw('GGUF').u32(3).u64(tensors, values);
  }
  tensor(name: string, dims: (number | bigint)[], type = 0, offset: number | bigint = 0): this {
    return this.text(name).u32(dims.length).u64(...dims).u32(type).u64(offset); // prettier-ignore
  }
  done(data = 0): Buffer {
    const header = Buffer.concat(this.parts);
    return Buffer.concat([header, Buffer.alloc(((32 - (header.length % 32)) % 32) + data)]);
  }
}
const message = (builder: Builder, data = 0): Promise<string> => badInputMessage(() => read(builder.done(data)));
const start = (tensors: number | bigint, values: number | bigint): Builder => new Builder().start(tensors, values);

describe('hostile GGUF', () => {
  it('wrong magic, versions, byte order', async () => {
    expect(await message(new Builder().raw('GGML').u32(3).u64(0, 0))).toContain('got "GGML"');
    expect(await message(new Builder().raw('GGUF').u32(1).u64(0, 0))).toContain('Version 1 is of 2023');
    expect(await message(new Builder().raw('GGUF').u32(0x03000000).u64(0, 0))).toContain('big-endian');
    expect(await message(new Builder().raw('GGUF').u32(4).u64(0, 0))).toContain('got 4');
  });

  it('a valid file made by this builder is accepted', () => {
    const { tensors } = read(start(2, 0).tensor('a', [3], 0, 0).tensor('b', [1], 0, 32).done(36));
    expect(tensors.map(({ shape }) => shape)).toEqual([[3], [1]]);
  });

  it('counts and lengths far beyond the file', async () => {
    expect(await message(start(2n ** 63n, 0))).toContain('more tensors than');
    expect(await message(start(0, 2n ** 63n))).toContain('more metadata values than');
    expect(
      await message(
        start(0, 1)
          .text('k')
          .u32(9, 4)
          .u64(2n ** 40n)
          .raw(Buffer.alloc(64)),
      ),
    ).toContain('an array of');
    expect(await message(start(0, 1).text('k').u32(9, 8).u64(1000).raw(Buffer.alloc(64)))).toContain(
      'more array values',
    );
    expect(
      await message(
        start(0, 1)
          .text('k')
          .u32(8)
          .u64(2n ** 62n)
          .raw(Buffer.alloc(64)),
      ),
    ).toContain('a string of');
    expect(await message(start(0, 1).u64(100_000).raw(Buffer.alloc(64)))).toContain('metadata key of 100000 bytes');
  });

  it('nested arrays, unknown types, duplicates, truth values of 2, text that is not UTF-8', async () => {
    expect(await message(start(0, 1).text('k').u32(9, 9).u64(1).u32(4).u64(0))).toContain('array of arrays');
    expect(await message(start(0, 1).text('k').u32(13).raw(Buffer.alloc(64)))).toContain('unknown type');
    expect(await message(start(0, 2).text('k').u32(4, 1).text('k').u32(4, 1))).toContain('Duplicate metadata key');
    expect(await message(start(0, 1).text('k').u32(7).raw(Buffer.alloc(64, 2)))).toContain('neither 0 nor 1');
    expect(
      await message(
        start(0, 1)
          .text('k')
          .u32(8)
          .text(Buffer.from([0xff]))
          .raw(Buffer.alloc(9)),
      ),
    ).toContain('UTF-8');
    expect(await message(start(2, 0).tensor('a', [1]).tensor('a', [1], 0, 32), 64)).toContain(
      'two tensors of one name',
    );
  });

  it('__proto__ as key and name', () => {
    const { metadata, tensors } = read(start(1, 1).text('__proto__').u32(4, 7).tensor('__proto__', [1]).done(4));
    expect([metadata.get('__proto__')!.value, tensors[0]!.name]).toEqual([7, '__proto__']);
  });

  it('bad alignment', async () => {
    for (const [type, value] of [[4, 0], [4, 33], [5, 32], [4, 2 ** 31]] as const) {
      expect(await message(start(0, 1).text('general.alignment').u32(type, value))).toContain('general.alignment');
    } // prettier-ignore
  });

  it('long names, too many dimensions, shapes that overflow, rows that are no whole blocks', async () => {
    expect(await message(start(1, 0).tensor('n'.repeat(64), [1]), 32)).toContain('tensor name of 64 bytes');
    expect(await message(start(1, 0).tensor('a', [1, 1, 1, 1, 1]), 32)).toContain('more than 4 dimensions');
    expect(await message(start(1, 0).tensor('a', [2n ** 40n, 2n ** 40n]))).toContain('overflows');
    expect(await message(start(1, 0).tensor('a', [0, 2n ** 64n - 1n]))).toContain('overflows');
    expect(await message(start(1, 0).tensor('a', [40, 8], ggmlBlocks.q4_0.id), 999)).toContain(
      'whole number of blocks',
    );
  });

  it('types that are not read, by name', async () => {
    expect(await message(start(1, 0).tensor('a', [256], 19))).toContain('got IQ1_S');
    expect(await message(start(1, 0).tensor('a', [256], 4))).toContain('got type 4');
  });

  it('overlaps, holes and offsets out of order', async () => {
    expect(await message(start(2, 0).tensor('a', [16]).tensor('b', [1], 0, 0), 99)).toContain(
      'expected offset 64, got 0',
    );
    expect(await message(start(2, 0).tensor('a', [16]).tensor('b', [1], 0, 96), 200)).toContain('got 96');
    expect(await message(start(1, 0).tensor('a', [16], 0, 2n ** 63n), 99)).toContain('expected offset 0');
  });

  it('truncation in header and data', async () => {
    const whole = bytesOf('all-types.gguf');
    for (const length of [3, 10, 23, 100, 700]) {
      expect(await badInputMessage(() => read(whole.subarray(0, length)))).toMatch(
        /too early|ends before|more .* than/,
      );
    }
    expect(await badInputMessage(() => read(whole.subarray(0, whole.length - 40)))).toContain('truncated');
  });
});
