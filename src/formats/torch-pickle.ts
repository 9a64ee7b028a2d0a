import { op } from './pickle-ops.js';

export interface PickledTensor {
  readonly name: string;
  readonly shape: readonly number[];
  /** Storage class, or the dtype's name for elements without a class of their own. */
  readonly element: { readonly storage: string } | { readonly dtype: string };
  readonly key: string;
  /** Bytes per element. */
  readonly itemsize: number;
}

/** Items that Python's pickler puts into one SETITEMS. */
const batch = 1000;

/** The pickle (protocol 2) that torch.save writes for a dict of contiguous tensors, byte for byte. */
export function pickleStateDict(tensors: readonly PickledTensor[]): Buffer {
  const out = new PickleWriter();
  out.raw(op.PROTO, 2);
  out.raw(op.EMPTY_DICT).memoize();
  for (let start = 0; start < tensors.length; start += batch) {
    const part = tensors.slice(start, start + batch);
    if (part.length > 1) out.raw(op.MARK);
    for (const tensor of part) writeTensor(out, tensor);
    out.raw(part.length > 1 ? op.SETITEMS : op.SETITEM);
  }
  out.raw(op.STOP);
  return out.bytes();
}

function writeTensor(out: PickleWriter, { name, shape, element, key, itemsize }: PickledTensor): void {
  const count = shape.reduce((n, d) => n * d, 1);
  const strides = shape.map((_, i) => shape.slice(i + 1).reduce((n, d) => n * Math.max(d, 1), 1));
  const typed = 'storage' in element;
  out.text(name);
  out.global('torch._utils', typed ? '_rebuild_tensor_v2' : '_rebuild_tensor_v3');
  out.raw(op.MARK, op.MARK);
  out.shared('storage');
  if (typed) out.global('torch', element.storage);
  else out.global('torch.storage', 'UntypedStorage');
  out.shared(key);
  out.shared('cpu');
  out.integer(typed ? count : count * itemsize);
  out.raw(op.TUPLE).memoize();
  out.raw(op.BINPERSID);
  out.integer(0);
  out.tuple(shape);
  out.tuple(strides);
  out.raw(op.NEWFALSE);
  out.global('collections', 'OrderedDict');
  out.raw(op.EMPTY_TUPLE, op.REDUCE).memoize();
  if (!typed) out.global('torch', element.dtype);
  out.raw(op.TUPLE).memoize();
  out.raw(op.REDUCE).memoize();
}

class PickleWriter {
  #buffer = Buffer.alloc(4096);
  #length = 0;
  readonly #known = new Map<string, number>();
  #memo = 0;

  raw(...bytes: number[]): this {
    return this.#append(bytes);
  }

  memoize(): void {
    this.#put(this.#memo++, op.BINPUT, op.LONG_BINPUT);
  }

  integer(value: number): void {
    if (value < 2 ** 8) this.raw(op.BININT1, value);
    else if (value < 2 ** 16) this.#sized(op.BININT2, 2, value);
    else if (value < 2 ** 31) this.#sized(op.BININT, 4, value);
    else {
      const bytes: number[] = [];
      for (let rest = BigInt(value); rest > 0n; rest >>= 8n) bytes.push(Number(rest & 255n));
      if (bytes.at(-1)! >= 0x80) bytes.push(0);
      this.raw(op.LONG1, bytes.length, ...bytes);
    }
  }

  text(value: string): void {
    const bytes = Buffer.from(value);
    this.#sized(op.BINUNICODE, 4, bytes.length);
    this.#append(bytes);
    this.memoize();
  }

  /** A string that Python holds once and so writes once. */
  shared(value: string): void {
    if (!this.#recall(`"${value}`)) this.text(value);
  }

  global(module: string, name: string): void {
    if (this.#recall(`${module} ${name}`)) return;
    this.raw(op.GLOBAL);
    this.#append(Buffer.from(`${module}\n${name}\n`));
    this.memoize();
  }

  tuple(items: readonly number[]): void {
    if (items.length === 0) {
      this.raw(op.EMPTY_TUPLE);
      return;
    }
    const small = [op.TUPLE1, op.TUPLE2, op.TUPLE3][items.length - 1];
    if (small === undefined) this.raw(op.MARK);
    for (const item of items) this.integer(item);
    this.raw(small ?? op.TUPLE).memoize();
  }

  bytes(): Buffer {
    return this.#buffer.subarray(0, this.#length);
  }

  #append(bytes: ArrayLike<number>): this {
    if (this.#length + bytes.length > this.#buffer.length) {
      const larger = Buffer.alloc(2 * this.#buffer.length + bytes.length);
      this.#buffer.copy(larger);
      this.#buffer = larger;
    }
    this.#buffer.set(bytes, this.#length);
    this.#length += bytes.length;
    return this;
  }

  /** Refers to what was written before; otherwise notes that it is written now, under the next memo number. */
  #recall(key: string): boolean {
    const index = this.#known.get(key);
    if (index === undefined) this.#known.set(key, this.#memo);
    else this.#put(index, op.BINGET, op.LONG_BINGET);
    return index !== undefined;
  }

  #put(index: number, short: number, long: number): void {
    if (index < 256) this.raw(short, index);
    else this.#sized(long, 4, index);
  }

  #sized(code: number, size: 2 | 4, value: number): void {
    const buffer = Buffer.alloc(1 + size, code);
    buffer.writeUIntLE(value, 1, size);
    this.#append(buffer);
  }
}
