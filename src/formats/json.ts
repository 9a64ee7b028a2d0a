import { badInput, ConvertError } from '../base/errors.js';

/** Objects have no prototype: `__proto__` and `constructor` are names like any other. */
export type JsonValue = null | boolean | number | string | JsonValue[] | JsonObject;
export type JsonObject = { [key: string]: JsonValue };

export interface JsonOptions {
  /** File (and part of it) that errors name. */
  readonly where: string;
  /** Nesting beyond this is refused (default 64; real configs nest 10 deep). */
  readonly maxDepth?: number;
  /** Values beyond this count are refused (default 4 million; the largest real headers and tokenizers hold 1 to 2 million). */
  readonly maxValues?: number;
  /**
   * What Python's json writes and reads beyond the standard: NaN, Infinity, and integers of any size (rounded).
   * For configs; never for offsets and shapes.
   */
  readonly lenient?: boolean;
  /** Only non-negative integers in plain digits are numbers: for headers, where `1.0` or `1e3` is no offset. */
  readonly integersOnly?: boolean;
}

export const isJsonObject = (value: unknown): value is JsonObject =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

/** Text of valid UTF-8; undefined for other bytes. */
export function decodeUtf8(bytes: Uint8Array): string | undefined {
  try {
    return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch {
    return undefined;
  }
}

/**
 * Parses JSON strictly: UTF-8 only, no duplicate keys, no integer that a double cannot hold, bounded depth.
 * JSON.parse hides duplicate keys (two readers could see two models in one file) and rounds integers above 2^53.
 */
export function parseJson(bytes: Uint8Array | string, options: JsonOptions): JsonValue {
  let text: string;
  try {
    text = typeof bytes === 'string' ? bytes : new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes);
  } catch (cause) {
    throw badInput('Not valid UTF-8', { where: options.where, cause });
  }
  return new Parser(text, options).document();
}

/** The same, undefined for what it refuses: where another reading follows that says what is wrong. */
export function tryJson(bytes: Uint8Array | string, options: JsonOptions): JsonValue | undefined {
  try {
    return parseJson(bytes, options);
  } catch (error) {
    if (error instanceof ConvertError) return undefined;
    throw error;
  }
}

const code = (character: string): number => character.charCodeAt(0);
const [quote, backslash, comma, colon, minus, digit0, digit9] = ['"', '\\', ',', ':', '-', '0', '9'].map(code) as [
  number, number, number, number, number, number, number]; // prettier-ignore
const [openBrace, closeBrace, openBracket, closeBracket] = ['{', '}', '[', ']'].map(code) as [
  number, number, number, number]; // prettier-ignore
const escapes: Record<string, string> = { '"': '"', '\\': '\\', '/': '/', b: '\b', f: '\f', n: '\n', r: '\r', t: '\t' };
const numberPattern = /-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?/y;
/** What a string cannot hold as it stands. */
const notPlain = /[\\\u0000-\u001f]/;
/** Longer texts may be all of the rest of a damaged file, again and again. */
const plainLimit = 4096;
const literalPattern = /true|false|null|NaN|-?Infinity/y;
const literals = new Map<string, JsonValue>([
  ['true', true],
  ['false', false],
  ['null', null],
]);

class Parser {
  #at = 0;
  #values = 0;
  readonly #maxDepth: number;
  readonly #maxValues: number;

  constructor(
    readonly text: string,
    readonly options: JsonOptions,
  ) {
    this.#maxDepth = options.maxDepth ?? 64;
    this.#maxValues = options.maxValues ?? 4_000_000;
  }

  document(): JsonValue {
    this.#space();
    const value = this.#value(0);
    this.#space();
    if (this.#at < this.text.length) throw this.#error('Text after the end of the JSON value');
    return value;
  }

  #value(depth: number): JsonValue {
    if (++this.#values > this.#maxValues) throw this.#error(`More than ${this.#maxValues} values`);
    const c = this.text.charCodeAt(this.#at);
    if (c === quote) return this.#string();
    if (c === openBrace) return this.#object(depth + 1);
    if (c === openBracket) return this.#array(depth + 1);
    if (c === minus || (c >= digit0 && c <= digit9)) return this.#number();
    return this.#literal();
  }

  #object(depth: number): JsonObject {
    this.#requireDepth(depth);
    const object = Object.create(null) as JsonObject;
    this.#at++;
    this.#space();
    if (this.#take(closeBrace)) return object;
    for (;;) {
      if (this.text.charCodeAt(this.#at) !== quote) throw this.#error('Expected a string as key');
      const at = this.#at;
      const key = this.#string();
      if (key in object) throw this.#error(`Duplicate key ${JSON.stringify(shorten(key))}`, at);
      this.#space();
      if (!this.#take(colon)) throw this.#error("Expected ':' after a key");
      this.#space();
      object[key] = this.#value(depth);
      this.#space();
      if (this.#take(closeBrace)) return object;
      if (!this.#take(comma)) throw this.#error("Expected ',' or '}' in an object");
      this.#space();
    }
  }

  #array(depth: number): JsonValue[] {
    this.#requireDepth(depth);
    const items: JsonValue[] = [];
    this.#at++;
    this.#space();
    if (this.#take(closeBracket)) return items;
    for (;;) {
      items.push(this.#value(depth));
      this.#space();
      if (this.#take(closeBracket)) return items;
      if (!this.#take(comma)) throw this.#error("Expected ',' or ']' in an array");
      this.#space();
    }
  }

  #string(): string {
    const start = ++this.#at;
    // Without escapes, as nearly all are: found at once rather than looked at character by character.
    const end = this.text.indexOf('"', start);
    if (end >= 0 && end - start < plainLimit) {
      const plain = this.text.slice(start, end);
      if (!notPlain.test(plain)) {
        this.#at = end + 1;
        return plain;
      }
    }
    let plainFrom = start;
    let result = '';
    for (;;) {
      const c = this.text.charCodeAt(this.#at);
      if (c === quote) break;
      if (c === backslash) {
        result += this.text.slice(plainFrom, this.#at) + this.#escape();
        plainFrom = this.#at;
      } else if (c < 0x20) {
        throw this.#error('Control character in a string');
      } else if (Number.isNaN(c)) {
        throw this.#error('String without an end', start - 1);
      } else this.#at++;
    }
    if (plainFrom === start) return this.text.slice(start, this.#at++);
    result += this.text.slice(plainFrom, this.#at++);
    if (/[\ud800-\udfff]/u.test(result)) throw this.#error('Half a surrogate pair in a string', start - 1);
    return result;
  }

  #escape(): string {
    const kind = this.text.charAt(this.#at + 1);
    if (kind === 'u') {
      const unit = /^[0-9a-fA-F]{4}$/.exec(this.text.slice(this.#at + 2, this.#at + 6))?.[0];
      if (unit === undefined) throw this.#error('Bad \\u escape');
      this.#at += 6;
      return String.fromCharCode(Number.parseInt(unit, 16));
    }
    const plain = escapes[kind];
    if (plain === undefined) throw this.#error('Unknown escape in a string');
    this.#at += 2;
    return plain;
  }

  #number(): number {
    numberPattern.lastIndex = this.#at;
    const match = numberPattern.exec(this.text);
    if (match === null) {
      if (this.options.lenient) return this.#literal() as number;
      throw this.#error('Malformed number');
    }
    const value = Number(match[0]);
    const isInteger = match[1] === undefined && match[2] === undefined;
    if (this.options.integersOnly && !(isInteger && match[0].charCodeAt(0) !== minus)) {
      throw this.#error('Expected a non-negative integer');
    }
    if (!this.options.lenient) {
      if (isInteger && !Number.isSafeInteger(value)) throw this.#error(`Integer too large: ${shorten(match[0])}`);
      if (!Number.isFinite(value)) throw this.#error(`Number too large: ${shorten(match[0])}`);
    }
    this.#at += match[0].length;
    return value;
  }

  #literal(): JsonValue {
    literalPattern.lastIndex = this.#at;
    const word = literalPattern.exec(this.text)?.[0];
    const value = word === undefined ? undefined : literals.get(word);
    if (word === undefined || (value === undefined && !this.options.lenient)) throw this.#error('Expected a value');
    this.#at += word.length;
    return value === undefined ? Number(word) : value;
  }

  #requireDepth(depth: number): void {
    if (depth > this.#maxDepth) throw this.#error(`Nested deeper than ${this.#maxDepth}`);
  }

  #take(c: number): boolean {
    if (this.text.charCodeAt(this.#at) !== c) return false;
    this.#at++;
    return true;
  }

  #space(): void {
    for (;;) {
      const c = this.text.charCodeAt(this.#at);
      if (c !== 0x20 && c !== 0x0a && c !== 0x0d && c !== 0x09) return;
      this.#at++;
    }
  }

  #error(what: string, at = this.#at): ConvertError {
    const byte = Buffer.byteLength(this.text.slice(0, at));
    const got = at < this.text.length ? JSON.stringify(this.text.slice(at, at + 24)) : 'the end of the text';
    return badInput(`Bad JSON: ${what}`, { where: `${this.options.where}, byte ${byte}`, got });
  }
}

const shorten = (text: string): string => (text.length > 80 ? `${text.slice(0, 77)}...` : text);
