import { bug } from '../base/errors.js';
import { copyInto } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import type { KvCache } from './calls.js';

/**
 * Keys and values of one layer in memory that doubles as it fills: [B, capacity, H, D]. Rows may have different
 * lengths: then `lengths[b]` of the tokens appended first are real, and each later token goes behind its own row's.
 */
export class GrowingCache implements KvCache {
  readonly #scope: Scope;
  readonly #lengths: number[] | undefined;
  readonly #parts = new Map<string, KvCache>();
  #k: Tensor | undefined;
  #v: Tensor | undefined;
  #length = 0;
  /** Tokens that no window reaches any more; the memory begins behind them. */
  #gone = 0;

  constructor(scope: Scope, lengths?: readonly number[]) {
    this.#scope = scope;
    if (lengths?.some((n) => n !== lengths[0])) this.#lengths = [...lengths];
  }

  get length(): number {
    return this.#length;
  }

  part(name: string): KvCache {
    const known = this.#parts.get(name) ?? new GrowingCache(this.#scope, this.#lengths);
    this.#parts.set(name, known);
    return known;
  }

  append(k: Tensor, v?: Tensor, window?: number): { k: Tensor; v: Tensor; offset: number } {
    const rows = this.#lengths;
    const s = k.dim(1);
    const first = this.#length === 0;
    if (rows && !first && s !== 1) throw bug('rows of different lengths grow by one token at a time');
    if (rows && !first) rows.forEach((n, b) => (rows[b] = n + 1));
    const end = rows ? Math.max(...rows) : this.#length + s;
    const full = this.#k !== undefined && end - this.#gone > this.#k.dim(1);
    const before = full && window && !rows ? Math.max(0, this.#length - this.#gone - (window - 1)) : 0;
    const held = this.#length - this.#gone - before;
    this.#gone += before;
    const offset = this.#length - this.#gone;
    const needed = Math.max(end - this.#gone, s);
    const put = (old: Tensor | undefined, x: Tensor): Tensor => {
      const into = this.#room(old, x, needed, { before, held: rows ? undefined : held, window });
      if (s === 0) return into;
      if (rows && !first)
        rows.forEach((n, b) => copyInto(into.slice(0, b, b + 1).slice(1, n - 1, n), x.slice(0, b, b + 1)));
      else copyInto(into.slice(1, offset, offset + s), x);
      return into;
    };
    this.#k = put(this.#k, k);
    if (v) this.#v = put(this.#v, v);
    this.#length = end;
    const keys = this.#k.slice(1, 0, end - this.#gone);
    return { k: keys, v: this.#v ? this.#v.slice(1, 0, end - this.#gone) : keys, offset };
  }

  /** Memory for `needed` tokens: what there is, or more of it with what was `held` behind the first `before`. */
  #room(
    old: Tensor | undefined,
    x: Tensor,
    needed: number,
    { before, held, window }: { before: number; held: number | undefined; window: number | undefined },
  ): Tensor {
    if (old && before === 0 && old.dim(1) >= needed) return old;
    const capacity = Math.max(32, 2 ** Math.ceil(Math.log2(window ? 2 * needed : needed)));
    const shape = [x.dim(0), capacity, x.dim(2), x.dim(3)];
    // Rows of different lengths have gaps, which are masked but must be finite.
    const grown = this.#lengths ? this.#scope.zeros(x.dtype, shape) : this.#scope.empty(x.dtype, shape);
    if (old) {
      const count = held ?? old.dim(1);
      if (count > 0) copyInto(grown.slice(1, 0, count), old.slice(1, before, before + count));
      this.#scope.free(old);
    }
    return grown;
  }
}
