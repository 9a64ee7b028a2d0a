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
  #k: Tensor | undefined;
  #v: Tensor | undefined;
  #length = 0;

  constructor(scope: Scope, lengths?: readonly number[]) {
    this.#scope = scope;
    if (lengths?.some((n) => n !== lengths[0])) this.#lengths = [...lengths];
  }

  get length(): number {
    return this.#length;
  }

  append(k: Tensor, v?: Tensor): { k: Tensor; v: Tensor } {
    const rows = this.#lengths;
    const s = k.dim(1);
    const first = this.#length === 0;
    if (rows && !first && s !== 1) throw bug('rows of different lengths grow by one token at a time');
    if (rows && !first) rows.forEach((n, b) => (rows[b] = n + 1));
    const end = rows ? Math.max(...rows) : this.#length + s;
    const put = (held: Tensor | undefined, x: Tensor): Tensor => {
      const into = this.#room(held, x, Math.max(end, s));
      if (rows && !first)
        rows.forEach((n, b) => copyInto(into.slice(0, b, b + 1).slice(1, n - 1, n), x.slice(0, b, b + 1)));
      else copyInto(into.slice(1, this.#length, this.#length + s), x);
      return into;
    };
    this.#k = put(this.#k, k);
    if (v) this.#v = put(this.#v, v);
    this.#length = end;
    const keys = this.#k.slice(1, 0, end);
    return { k: keys, v: this.#v ? this.#v.slice(1, 0, end) : keys };
  }

  #room(held: Tensor | undefined, x: Tensor, length: number): Tensor {
    if (held && held.dim(1) >= length) return held;
    const capacity = Math.max(32, 2 ** Math.ceil(Math.log2(length)));
    const shape = [x.dim(0), capacity, x.dim(2), x.dim(3)];
    // Rows of different lengths have gaps, which are masked but must be finite.
    const grown = this.#lengths ? this.#scope.zeros(x.dtype, shape) : this.#scope.empty(x.dtype, shape);
    if (held) {
      copyInto(grown.slice(1, 0, held.dim(1)), held);
      this.#scope.free(held);
    }
    return grown;
  }
}
