const [zero, space] = ['0', ' '].map((c) => c.charCodeAt(0)) as [number, number];

/**
 * Reads JSON of the form that libraries write piece by piece, without building objects of it. What returns undefined
 * is otherwise, or wrong: a whole parser decides.
 */
export class Cursor {
  constructor(
    readonly text: string,
    public at: number,
  ) {}

  /** Whether `literal` comes next; then it is passed. */
  pass(literal: string): boolean {
    const found = this.text.startsWith(literal, this.at);
    if (found) this.at += literal.length;
    return found;
  }

  skipSpace(): void {
    const { text } = this;
    for (let code; (code = text.charCodeAt(this.at)) === space || code === 10 || code === 13 || code === 9;) this.at++;
  }

  /** A string that is not empty and has no escapes. */
  string(): string | undefined {
    const { text } = this;
    if (!this.pass('"')) return undefined;
    const end = text.indexOf('"', this.at);
    const value = text.slice(this.at, end);
    if (end < 0 || value === '' || /[\\\u0000-\u001f]/.test(value)) return undefined;
    this.at = end + 1;
    return value;
  }

  /** The text before `literal`, which is passed with it. */
  before(literal: string): string | undefined {
    const end = this.text.indexOf(literal, this.at);
    if (end < 0) return undefined;
    const found = this.text.slice(this.at, end);
    this.at = end + literal.length;
    return found;
  }

  /** A count and `literal` behind it, which is passed. */
  count(literal: string): number | undefined {
    const { text, at: start } = this;
    let value = 0;
    for (let digit; (digit = text.charCodeAt(this.at) - zero) >= 0 && digit <= 9; this.at++) value = 10 * value + digit;
    const digits = this.at - start;
    // 15 digits are exact; a leading zero is no JSON.
    if (digits === 0 || digits > 15 || (digits > 1 && text.charCodeAt(start) === zero)) return undefined;
    return this.pass(literal) ? value : undefined;
  }
}
