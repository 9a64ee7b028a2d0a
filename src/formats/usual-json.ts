const [quote, backslash, zero, nine, space] = ['"', '\\', '0', '9', ' '].map((c) => c.charCodeAt(0)) as [
  number, number, number, number, number]; // prettier-ignore

/** Bytes that stand for themselves in a string: ASCII without controls, quote and backslash. */
const plain = Uint8Array.from({ length: 256 }, (_, c) => Number(c >= space && c < 0x7f && c !== quote && c !== backslash)); // prettier-ignore

/** `toString('latin1', ...)` without its detours, which would take as long again; @types/node leaves it out. */
type Latin1 = Buffer & { latin1Slice(start: number, end: number): string };

/**
 * Reads JSON of the form that libraries write straight from its bytes, without building objects of it: headers of models
 * hold 100,000 tensors. What returns undefined is otherwise, or wrong, or not ASCII: a whole parser decides.
 */
export class Cursor {
  readonly bytes: Latin1;

  constructor(
    bytes: Buffer,
    public at: number,
  ) {
    this.bytes = bytes as Latin1;
  }

  /** Whether `literal` comes next; then it is passed. */
  pass(literal: Uint8Array): boolean {
    const { bytes, at } = this;
    for (let i = 0; i < literal.length; i++) if (bytes[at + i] !== literal[i]) return false;
    this.at = at + literal.length;
    return true;
  }

  skipSpace(): void {
    const { bytes } = this;
    for (let c; (c = bytes[this.at]) === space || c === 10 || c === 13 || c === 9;) this.at++;
  }

  /** A string that is not empty and has no escapes. */
  string(): string | undefined {
    const { bytes } = this;
    if (bytes[this.at] !== quote) return undefined;
    const start = this.at + 1;
    let end = start;
    while (plain[bytes[end]!] === 1) end++;
    if (bytes[end] !== quote || end === start) return undefined;
    this.at = end + 1;
    return bytes.latin1Slice(start, end);
  }

  /** The bytes up to and with `last`. */
  through(last: number): Buffer | undefined {
    const end = this.bytes.indexOf(last, this.at);
    if (end < 0) return undefined;
    const found = this.bytes.subarray(this.at, end + 1);
    this.at = end + 1;
    return found;
  }

  /** A count and `literal` behind it, which is passed. */
  count(literal: Uint8Array): number | undefined {
    const { bytes, at: start } = this;
    let [value, end] = [0, start];
    for (let c; (c = bytes[end]!) >= zero && c <= nine; end++) value = 10 * value + (c - zero);
    const digits = end - start;
    // 15 digits are exact; a leading zero is no JSON.
    if (digits === 0 || digits > 15 || (digits > 1 && bytes[start] === zero)) return undefined;
    this.at = end;
    return this.pass(literal) ? value : undefined;
  }
}
