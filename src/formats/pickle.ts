import { badInput, ConvertError } from '../base/errors.js';
import type { Cursor } from './cursor.js';
import { op, opNames } from './pickle-ops.js';
import { PyGlobal, PyObject, PyTuple, refusedGlobals } from './pickle-values.js';
import type { PyDict, PyValue, RefusedGlobal } from './pickle-values.js';

export interface UnpickleRules {
  readonly allows: (global: PyGlobal) => boolean;
  /** Represents a call of an allowed global. */
  readonly construct: (callee: PyGlobal, args: readonly PyValue[]) => PyValue;
  /** Represents an object that is stored outside of the pickle. */
  readonly persistent: (id: PyValue) => PyValue;
  /** Collects globals outside the allow-list, which become inert objects. Without it they are an error. */
  readonly refused?: RefusedGlobal[];
  readonly limits?: Readonly<typeof pickleLimits>;
}

/** A pickle with 70,000 tensors and their optimizer state takes 9 million opcodes and 1.4 million objects. */
export const pickleLimits = { opcodes: 10_000_000, objects: 1_500_000, memo: 3_000_000, marks: 1000 };
const [maxLongBytes, maxLine] = [64, 4096];
const mark = Symbol('mark');
const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true });

/**
 * Reads one pickle (protocols 0 to 5) without running any of it: data becomes Maps, arrays and inert objects; a global
 * must be on the allow-list, and a call of it is represented by `construct`. Leaves the cursor behind the STOP opcode.
 */
export function unpickle(cursor: Cursor, rules: UnpickleRules): PyValue {
  return new Machine(cursor, rules).run();
}

class Machine {
  #stack: (PyValue | typeof mark)[] = [];
  #marks: number[] = [];
  readonly #memo = new Map<number, PyValue>();
  #objects = 0;
  #start = 0;
  #code = 0;

  readonly #limits: Readonly<typeof pickleLimits>;

  constructor(
    readonly cursor: Cursor,
    readonly rules: UnpickleRules,
  ) {
    this.#limits = rules.limits ?? pickleLimits;
  }

  run(): PyValue {
    for (let count = 0; ; count++) {
      if (count >= this.#limits.opcodes) throw this.#error(`More than ${this.#limits.opcodes} opcodes`);
      this.#start = this.cursor.position;
      this.#code = this.cursor.u8();
      if (this.#code === op.STOP) return this.#pop();
      this.#step(this.#code);
    }
  }

  #step(code: number): void {
    const { cursor } = this;
    switch (code) {
      case op.PROTO: {
        const protocol = cursor.u8();
        if (protocol > 5) throw this.#error(`Unknown pickle protocol ${protocol}`);
        return;
      }
      case op.FRAME:
        cursor.u64();
        return;
      case op.MARK:
        if (this.#marks.length >= this.#limits.marks) throw this.#error('Nested too deeply');
        this.#marks.push(this.#stack.length);
        this.#stack.push(mark);
        return;
      case op.POP:
        if (this.#stack.at(-1) === mark) this.#popMark();
        else this.#pop();
        return;
      case op.POP_MARK:
        this.#popMark();
        return;
      case op.DUP:
        this.#stack.push(this.#top());
        return;
      case op.NONE:
        return this.#push(null);
      case op.NEWTRUE:
        return this.#push(true);
      case op.NEWFALSE:
        return this.#push(false);
      case op.INT: {
        const text = cursor.line(maxLine);
        return this.#push(text === '01' ? true : text === '00' ? false : this.#integer(text));
      }
      case op.LONG:
        return this.#push(this.#integer(cursor.line(maxLine).replace(/L$/, '')));
      case op.BININT:
        return this.#push(cursor.i32());
      case op.BININT1:
        return this.#push(cursor.u8());
      case op.BININT2:
        return this.#push(cursor.u16());
      case op.LONG1:
        return this.#push(this.#long(cursor.u8()));
      case op.LONG4:
        return this.#push(this.#long(cursor.u32()));
      case op.FLOAT:
        return this.#push(this.#float(cursor.line(maxLine)));
      case op.BINFLOAT:
        return this.#push(cursor.f64BigEndian());
      case op.STRING:
      case op.UNICODE:
        return this.#push(this.#quoted(cursor.line(1 << 20), code === op.STRING));
      case op.BINSTRING:
        return this.#push(cursor.bytes(cursor.u32()).toString('latin1'));
      case op.SHORT_BINSTRING:
        return this.#push(cursor.bytes(cursor.u8()).toString('latin1'));
      case op.BINUNICODE:
        return this.#push(this.#utf8(cursor.u32()));
      case op.SHORT_BINUNICODE:
        return this.#push(this.#utf8(cursor.u8()));
      case op.BINUNICODE8:
        return this.#push(this.#utf8(cursor.u64()));
      case op.BINBYTES:
        return this.#push(this.#bytes(cursor.u32()));
      case op.SHORT_BINBYTES:
        return this.#push(this.#bytes(cursor.u8()));
      case op.BINBYTES8:
      case op.BYTEARRAY8:
        return this.#push(this.#bytes(cursor.u64()));
      default:
        return this.#stepContainer(code);
    }
  }

  #stepContainer(code: number): void {
    switch (code) {
      case op.EMPTY_TUPLE:
        return this.#push(new PyTuple([]));
      case op.TUPLE1:
        return this.#push(new PyTuple([this.#pop()]));
      case op.TUPLE2: {
        const second = this.#pop();
        return this.#push(new PyTuple([this.#pop(), second]));
      }
      case op.TUPLE3: {
        const [third, second] = [this.#pop(), this.#pop()];
        return this.#push(new PyTuple([this.#pop(), second, third]));
      }
      case op.TUPLE:
        return this.#push(new PyTuple(this.#popMark()));
      case op.EMPTY_LIST:
        return this.#push([]);
      case op.LIST:
        return this.#push(this.#popMark());
      case op.EMPTY_DICT:
        return this.#push(new Map());
      case op.DICT: {
        const items = this.#popMark();
        const dict: PyDict = new Map();
        this.#setItems(dict, items);
        return this.#push(dict);
      }
      case op.EMPTY_SET:
        return this.#push(new Set());
      case op.FROZENSET:
        return this.#push(new Set(this.#popMark()));
      case op.APPEND:
        return this.#append([this.#pop()]);
      case op.APPENDS:
        return this.#append(this.#popMark());
      case op.SETITEM: {
        const value = this.#pop();
        const key = this.#pop();
        return this.#setItems(this.#top(), [key, value]);
      }
      case op.SETITEMS: {
        const items = this.#popMark();
        return this.#setItems(this.#top(), items);
      }
      case op.ADDITEMS: {
        const items = this.#popMark();
        const set = this.#top();
        if (set instanceof Set) items.forEach((item) => set.add(item));
        else if (!(set instanceof PyObject)) throw this.#error('Items are added to something that is no set');
        return;
      }
      case op.GET:
        return this.#get(Number(this.cursor.line(maxLine)));
      case op.BINGET:
        return this.#get(this.cursor.u8());
      case op.LONG_BINGET:
        return this.#get(this.cursor.u32());
      case op.PUT:
        return this.#put(Number(this.cursor.line(maxLine)));
      case op.BINPUT:
        return this.#put(this.cursor.u8());
      case op.LONG_BINPUT:
        return this.#put(this.cursor.u32());
      case op.MEMOIZE:
        return this.#put(this.#memo.size);
      default:
        return this.#stepObject(code);
    }
  }

  #stepObject(code: number): void {
    switch (code) {
      case op.GLOBAL: {
        const module = this.cursor.line(maxLine);
        return this.#global(module, this.cursor.line(maxLine));
      }
      case op.STACK_GLOBAL: {
        const [name, module] = [this.#pop(), this.#pop()];
        if (typeof name !== 'string' || typeof module !== 'string') throw this.#error('A global without a name');
        return this.#global(module, name);
      }
      case op.INST: {
        const module = this.cursor.line(maxLine);
        const name = this.cursor.line(maxLine);
        const args = this.#popMark();
        this.#global(module, name);
        return this.#push(this.#call(this.#pop(), args));
      }
      case op.OBJ: {
        const [callee, ...args] = this.#popMark();
        return this.#push(this.#call(callee ?? null, args));
      }
      case op.REDUCE:
      case op.NEWOBJ: {
        const args = this.#pop();
        if (!(args instanceof PyTuple)) throw this.#error('A call whose arguments are no tuple');
        return this.#push(this.#call(this.#pop(), args.items));
      }
      case op.NEWOBJ_EX: {
        const [, args] = [this.#pop(), this.#pop()];
        if (!(args instanceof PyTuple)) throw this.#error('A call whose arguments are no tuple');
        return this.#push(this.#call(this.#pop(), args.items));
      }
      case op.BUILD:
        // Sets attributes (OrderedDict's _metadata ...). No attribute means anything here.
        this.#pop();
        this.#top();
        return;
      case op.PERSID:
        return this.#push(this.rules.persistent(this.cursor.line(maxLine)));
      case op.BINPERSID:
        return this.#push(this.rules.persistent(this.#pop()));
      default: {
        const name = opNames.get(code) ?? `0x${code.toString(16).padStart(2, '0')}`;
        throw this.#error(`Opcode ${name} is not accepted`);
      }
    }
  }

  #push(value: PyValue): void {
    if (typeof value === 'object' && value !== null && ++this.#objects > this.#limits.objects) {
      throw this.#error(`More than ${this.#limits.objects} objects`);
    }
    this.#stack.push(value);
  }

  #top(): PyValue {
    const value = this.#stack.at(-1);
    if (value === undefined || value === mark) throw this.#error('The stack is empty');
    return value;
  }

  #pop(): PyValue {
    const value = this.#top();
    this.#stack.pop();
    return value;
  }

  #popMark(): PyValue[] {
    const at = this.#marks.pop();
    if (at === undefined) throw this.#error('A mark is missing');
    const items = this.#stack.splice(at);
    items.shift();
    return items as PyValue[];
  }

  #append(items: PyValue[]): void {
    const list = this.#top();
    if (Array.isArray(list)) for (const item of items) list.push(item);
    else if (!(list instanceof PyObject)) throw this.#error('Items are appended to something that is no list');
  }

  #setItems(target: PyValue, items: PyValue[]): void {
    if (items.length % 2 !== 0) throw this.#error('A key without a value');
    if (target instanceof PyObject) return;
    if (!(target instanceof Map)) throw this.#error('Keys are set in something that is no dictionary');
    for (let i = 0; i < items.length; i += 2) target.set(items[i]!, items[i + 1]!);
  }

  #get(index: number): void {
    const value = this.#memo.get(index);
    if (value === undefined) throw this.#error(`Memo ${index} is not set`);
    this.#stack.push(value);
  }

  #put(index: number): void {
    if (!Number.isSafeInteger(index) || index < 0) throw this.#error('Bad memo index');
    if (this.#memo.size >= this.#limits.memo) throw this.#error(`More than ${this.#limits.memo} memo entries`);
    this.#memo.set(index, this.#top());
  }

  #global(module: string, name: string): void {
    // Protocols up to 2 write Python 2's name of the builtins.
    const global = new PyGlobal(module === '__builtin__' ? 'builtins' : module, name);
    if (!this.rules.allows(global)) {
      const refused = { name: global.toString(), position: this.#start };
      if (this.rules.refused === undefined) throw refusedGlobals([refused], this.cursor.source.path);
      if (this.rules.refused.length < 1000) this.rules.refused.push(refused);
    }
    this.#push(global);
  }

  #call(callee: PyValue, args: readonly PyValue[]): PyValue {
    if (callee instanceof PyObject) return callee; // already refused: getattr(...)(...)
    if (!(callee instanceof PyGlobal)) throw this.#error('A call of something that is no global');
    return this.rules.allows(callee) ? this.rules.construct(callee, args) : new PyObject(callee, args);
  }

  #integer(text: string): number | bigint {
    if (!/^[+-]?\d{1,100}$/.test(text)) throw this.#error('Malformed integer');
    const value = Number(text);
    return Number.isSafeInteger(value) ? value : BigInt(text);
  }

  #long(count: number): number | bigint {
    if (count > maxLongBytes) throw this.#error(`An integer of ${count} bytes`);
    const bytes = this.cursor.bytes(count);
    let value = 0n;
    for (let i = count - 1; i >= 0; i--) value = (value << 8n) | BigInt(bytes[i]!);
    value = BigInt.asIntN(count * 8, value);
    return value >= Number.MIN_SAFE_INTEGER && value <= Number.MAX_SAFE_INTEGER ? Number(value) : value;
  }

  #float(text: string): number {
    if (text === 'nan') return NaN;
    if (/^[+-]?inf$/.test(text)) return text.startsWith('-') ? -Infinity : Infinity;
    if (!/^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$/.test(text)) throw this.#error('Malformed number');
    return Number(text);
  }

  /** Protocol 0 text: a Python literal for STRING, raw-unicode-escape for UNICODE. */
  #quoted(line: string, quotes: boolean): string {
    let text = line;
    if (quotes) {
      const [first, last] = [text.at(0), text.at(-1)];
      if (text.length < 2 || first !== last || (first !== "'" && first !== '"')) throw this.#error('Unquoted string');
      text = text.slice(1, -1);
    }
    const pattern = quotes ? /\\(x[0-9a-f]{2}|[\\'"nrt])/gi : /\\(u[0-9a-f]{4}|U[0-9a-f]{8})/g;
    const plain: Record<string, string> = { n: '\n', r: '\r', t: '\t' };
    return text.replace(pattern, (_, escape: string) => {
      if (escape.length === 1) return plain[escape] ?? escape;
      const point = Number.parseInt(escape.slice(1), 16);
      if (point > 0x10ffff) throw this.#error('Bad escape in a string');
      return String.fromCodePoint(point);
    });
  }

  #utf8(count: number): string {
    try {
      return utf8.decode(this.cursor.bytes(count));
    } catch (error) {
      if (error instanceof ConvertError) throw error;
      throw this.#error('A string that is not UTF-8');
    }
  }

  #bytes(count: number): Uint8Array {
    return Uint8Array.from(this.cursor.bytes(count));
  }

  #error(what: string): ConvertError {
    const name = opNames.get(this.#code) ?? `0x${this.#code.toString(16)}`;
    return badInput(`Bad pickle: ${what}`, { where: this.cursor.where(this.#start), got: `opcode ${name}` });
  }
}
