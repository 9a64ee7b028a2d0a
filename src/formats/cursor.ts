import { badInput } from '../base/errors.js';
import { safeU64 } from './source.js';
import type { RandomAccess } from './source.js';

const windowBytes = 1 << 16;

/** Reads a file's header front to back through a small window. Little-endian unless a name says otherwise. */
export class Cursor {
  readonly source: RandomAccess;
  /** Reading beyond this byte is refused. */
  readonly end: number;
  readonly what: string;
  #position: number;
  #window: Buffer = Buffer.alloc(0);
  #windowStart = 0;

  constructor(source: RandomAccess, what: string, start = 0, end = source.size) {
    [this.source, this.what, this.#position, this.end] = [source, what, start, end];
  }

  get position(): number {
    return this.#position;
  }

  set position(value: number) {
    this.#position = value;
  }

  /** "file, byte n": where the next byte is, for errors. */
  where(at = this.#position): string {
    return `${this.source.path}, byte ${at}`;
  }

  /** `count` bytes; valid until the next read. Refused before anything is allocated when the file has fewer. */
  bytes(count: number): Buffer {
    const at = this.#reserve(count);
    return this.#window.subarray(at, at + count);
  }

  u8(): number {
    const at = this.#reserve(1);
    return this.#window[at]!;
  }

  u16(): number {
    const at = this.#reserve(2);
    return this.#window.readUInt16LE(at);
  }

  u32(): number {
    const at = this.#reserve(4);
    return this.#window.readUInt32LE(at);
  }

  i32(): number {
    const at = this.#reserve(4);
    return this.#window.readInt32LE(at);
  }

  /** Rounded beyond 2^53, which no real count or offset reaches: range checks still refuse it. */
  u64(): number {
    const at = this.#reserve(8);
    return safeU64(this.#window, at);
  }

  i64(): bigint {
    const at = this.#reserve(8);
    return this.#window.readBigInt64LE(at);
  }

  f64BigEndian(): number {
    const at = this.#reserve(8);
    return this.#window.readDoubleBE(at);
  }

  /** Text up to a newline (not included), at most `limit` bytes. */
  line(limit: number): string {
    const parts: number[] = [];
    for (;;) {
      const byte = this.u8();
      if (byte === 0x0a) return Buffer.from(parts).toString('latin1');
      if (parts.length >= limit) throw badInput(`A line in the ${this.what} is too long`, { where: this.where() });
      parts.push(byte);
    }
  }

  /** Moves on by `count`; returns the index of the first of these bytes in the window, which it may have replaced. */
  #reserve(count: number): number {
    const start = this.#position;
    if (start + count > this.end) {
      throw badInput(`The ${this.what} ends too early`, {
        where: this.where(),
        expected: `${count} bytes more`,
        got: `${Math.max(0, this.end - start)}`,
        hint: 'The file is truncated or damaged: download or copy it again.',
      });
    }
    let at = start - this.#windowStart;
    if (at < 0 || at + count > this.#window.length) {
      const size = Math.min(Math.max(count, windowBytes), this.end - start);
      this.#window = this.source.read(start, size, this.what);
      this.#windowStart = start;
      at = 0;
    }
    this.#position = start + count;
    return at;
  }
}
