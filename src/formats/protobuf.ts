import { badInput } from '../base/errors.js';
import type { ConvertError } from '../base/errors.js';
import { Cursor } from './cursor.js';
import type { RandomAccess } from './source.js';

/** One field of a message: a number (wire type 0) or a run of bytes (all others). */
export interface Field {
  readonly number: number;
  readonly wire: number;
  readonly value: bigint;
  /** Payload, bytes in the file. */
  readonly start: number;
  readonly end: number;
}

/** A protobuf message in a file, read field by field where it lies. */
export class Protobuf {
  readonly source: RandomAccess;
  readonly cursor: Cursor;
  #budget = 2_000_000;

  constructor(source: RandomAccess, what: string) {
    this.source = source;
    this.cursor = new Cursor(source, what);
  }

  /** Every field costs: a hostile file of tiny fields ends here. */
  spend(): void {
    if (--this.#budget < 0) throw badInput('Too many fields in a protobuf file', { where: this.cursor.where() });
  }

  bytes({ start, end }: Field): Buffer {
    return this.source.read(start, end - start, this.cursor.what);
  }

  fail(what: string, at: number): ConvertError {
    return badInput(`Bad protobuf: ${what}`, { where: this.cursor.where(at) });
  }

  varint(limit: number): bigint {
    const start = this.cursor.position;
    let value = 0n;
    for (let shift = 0n; shift < 70n; shift += 7n) {
      if (this.cursor.position >= limit) throw this.fail('a number runs over the end of its message', start);
      const byte = this.cursor.u8();
      value |= BigInt(byte & 127) << shift;
      if (byte < 128) return BigInt.asUintN(64, value);
    }
    throw this.fail('a number of more than ten bytes', start);
  }
}

/** The fields of the message in [start, end), without descending; readers may move the cursor meanwhile. */
export function* fieldsOf(proto: Protobuf, start: number, end: number): Generator<Field> {
  const { cursor } = proto;
  for (let at = start; at < end;) {
    proto.spend();
    cursor.position = at;
    const key = proto.varint(end);
    const [number, wire] = [Number(key >> 3n), Number(key & 7n)];
    if (number === 0 || number > 2 ** 29) throw proto.fail('a field without a number', at);
    let [value, size] = [0n, 0];
    if (wire === 0) value = proto.varint(end);
    else if (wire === 1) size = 8;
    else if (wire === 2) size = Number(proto.varint(end));
    else if (wire === 5) size = 4;
    else throw proto.fail(`unknown wire type ${wire}`, at);
    const from = cursor.position;
    if (from + size > end) throw proto.fail('a field runs over the end of its message', at);
    at = from + size;
    yield { number, wire, value, start: from, end: at };
  }
}

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/** Names of modules are far shorter; what looks at names takes longer than they are long. */
const maxName = 1024;

export function text(proto: Protobuf, field: Field): string {
  if (field.wire !== 2 || field.end - field.start > maxName)
    throw proto.fail('a name that is no short text', field.start);
  try {
    return utf8.decode(proto.bytes(field));
  } catch {
    throw proto.fail('a name that is not UTF-8', field.start);
  }
}

/** Repeated unsigned integers, packed or single. */
export function varints(proto: Protobuf, field: Field): number[] {
  const number = (value: bigint): number => {
    if (value <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(value);
    throw proto.fail('a negative or impossible size', field.start);
  };
  if (field.wire === 0) return [number(field.value)];
  if (field.end - field.start > 1024) throw proto.fail('a list that is too long', field.start);
  const values: number[] = [];
  proto.cursor.position = field.start;
  while (proto.cursor.position < field.end) values.push(number(proto.varint(field.end)));
  return values;
}
