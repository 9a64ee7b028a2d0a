import { op } from '../../src/formats/pickle-ops.js';

/** Builds pickles, hostile ones too, opcode by opcode. */
export class PickleBuilder {
  readonly #parts: Buffer[] = [];

  raw(...parts: (number | Buffer | string)[]): this {
    for (const part of parts)
      this.#parts.push(typeof part === 'number' ? Buffer.from([part]) : Buffer.from(part as string));
    return this;
  }

  text(value: string): this {
    const bytes = Buffer.from(value);
    const length = Buffer.alloc(4);
    length.writeUInt32LE(bytes.length);
    return this.raw(op.BINUNICODE, length, bytes);
  }

  integer(value: number): this {
    const bytes = Buffer.alloc(8);
    bytes.writeBigInt64LE(BigInt(value));
    return this.raw(op.LONG1, 8, bytes);
  }

  global(module: string, name: string): this {
    return this.raw(op.GLOBAL, `${module}\n${name}\n`);
  }

  integers(values: readonly number[]): this {
    this.raw(op.MARK);
    for (const value of values) this.integer(value);
    return this.raw(op.TUPLE);
  }

  storage(key: string, count: number, className = 'FloatStorage'): this {
    this.raw(op.MARK).text('storage').global('torch', className).text(key).text('cpu').integer(count);
    return this.raw(op.TUPLE, op.BINPERSID);
  }

  /** name -> tensor, between MARK and SETITEMS. */
  tensor(
    name: string,
    shape: readonly number[],
    strides: readonly number[],
    more: { offset?: number; key?: string; count?: number } = {},
  ): this {
    this.text(name).global('torch._utils', '_rebuild_tensor_v2').raw(op.MARK);
    this.storage(more.key ?? '0', more.count ?? 4)
      .integer(more.offset ?? 0)
      .integers(shape)
      .integers(strides);
    return this.raw(op.NEWFALSE, op.EMPTY_DICT, op.TUPLE, op.REDUCE);
  }

  done(): Buffer {
    return Buffer.concat([Buffer.from([op.PROTO, 2]), ...this.#parts, Buffer.from([op.STOP])]);
  }
}

/** A pickle of one dict whose items `fill` writes. */
export const pickledDict = (fill: (builder: PickleBuilder) => PickleBuilder): Buffer =>
  fill(new PickleBuilder().raw(op.EMPTY_DICT, op.MARK)).raw(op.SETITEMS).done();
