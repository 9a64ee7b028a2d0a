import type { Random } from '../../src/base/rng.js';
import { edge, nearby, oddTexts, pick, shuffled } from './bytes.js';

/** A field: a number, fixed bytes, bytes, or a message. */
interface Field {
  readonly number: number;
  readonly wire: number;
  readonly content: bigint | Buffer | readonly Field[];
}

function varint(value: bigint): Buffer {
  const bytes: number[] = [];
  let rest = BigInt.asUintN(64, value);
  do {
    bytes.push(Number(rest & 127n) | (rest > 127n ? 128 : 0));
    rest >>= 7n;
  } while (rest > 0n);
  return Buffer.from(bytes);
}

/** The fields of a message; undefined when the bytes are no message. */
function takeApart(bytes: Buffer, depth = 0): Field[] | undefined {
  const fields: Field[] = [];
  let at = 0;
  const number = (): bigint | undefined => {
    let value = 0n;
    for (let shift = 0n; shift < 70n && at < bytes.length; shift += 7n) {
      const byte = bytes[at++]!;
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return value;
    }
    return undefined;
  };
  while (at < bytes.length) {
    const key = number();
    if (key === undefined || key >> 3n === 0n || key > 1000n) return undefined;
    const [field, wire] = [Number(key >> 3n), Number(key & 7n)];
    const first = wire === 0 || wire === 2 ? number() : 0n;
    if (first === undefined) return undefined;
    if (wire === 0) fields.push({ number: field, wire, content: first });
    else {
      const length = wire === 2 ? Number(first) : wire === 1 ? 8 : wire === 5 ? 4 : NaN;
      if (!(at + length <= bytes.length)) return undefined;
      const content = bytes.subarray(at, at + length);
      at += length;
      const inner = wire === 2 && depth < 6 && length > 1 ? takeApart(content, depth + 1) : undefined;
      fields.push({ number: field, wire, content: inner ?? content });
    }
  }
  return fields;
}

const made = new WeakMap<readonly Field[], Buffer>();

/** Messages that did not change are put together once. */
function put(fields: readonly Field[]): Buffer {
  const known = made.get(fields);
  if (known !== undefined) return known;
  const bytes = Buffer.concat(
    fields.flatMap(({ number, wire, content }) => {
      const key = varint(BigInt(number * 8 + wire));
      if (typeof content === 'bigint') return [key, varint(content)];
      const inner = Buffer.isBuffer(content) ? content : put(content);
      return wire === 2 ? [key, varint(BigInt(inner.length)), inner] : [key, inner];
    }),
  );
  made.set(fields, bytes);
  return bytes;
}

const known = new WeakMap<Buffer, Field[] | undefined>();

/** Changes one field somewhere in the tree of messages; lengths follow. */
export function reshapeProtobuf(random: Random, file: Buffer): Buffer {
  if (!known.has(file)) known.set(file, file.length < 65_536 ? takeApart(file) : undefined);
  const fields = known.get(file);
  if (fields === undefined) return file;
  return put(reshaped(random, fields));
}

const reshaped = (random: Random, fields: readonly Field[]): Field[] =>
  shuffled(random, fields, (field) => {
    const { number, wire, content } = field;
    if (Array.isArray(content) && random.below(8) > 0) {
      return { ...field, content: reshaped(random, content as readonly Field[]) };
    }
    switch (random.below(5)) {
      case 0:
        return { ...field, number: 1 + random.below(20) };
      case 1: {
        const nested = Array.from({ length: 50 }).reduce<Field>(
          (inner) => ({ number, wire: 2, content: [inner] }),
          field,
        );
        return random.below(10) === 0 ? nested : { number, wire: 0, content: edge(random) };
      }
      default:
        if (typeof content === 'bigint') {
          return { ...field, content: random.below(2) === 0 ? BigInt(random.below(30)) : nearby(random, content) };
        }
        if (wire !== 2) return field;
        return { ...field, content: Buffer.from(pick(random, oddTexts)) };
    }
  });
