import { Random } from '../base/rng.js';
import type { Rotation } from '../formats/types.js';
import { binary, cast, copyInto, gemm } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

/** Values that are rotated at once: bounds what lies in memory beside the matrix itself. */
const chunk = 2 ** 24;
/** Largest power of two that is one factor: products with a few small matrices instead of one large. */
const largestPower = 64;

function isPrime(n: number): boolean {
  for (let d = 2; d * d <= n; d++) if (n % d === 0) return false;
  return n > 1;
}

/**
 * Paley's Hadamard matrices (1933) as rows of +-1: of order q + 1 for a prime q = 3 mod 4, of order 2 (q + 1) for a
 * prime q = 1 mod 4. Undefined: the order is neither.
 */
function paley(order: number): number[][] | undefined {
  const squares = (q: number) => new Set(Array.from({ length: q - 1 }, (_, i) => (i + 1) ** 2 % q));
  /** [[0, 1], [+-1, chi(j - i)]] */
  const bordered = (q: number, left: number) => {
    const square = squares(q);
    const chi = (x: number) => (x === 0 ? 0 : square.has(x) ? 1 : -1);
    return Array.from({ length: q + 1 }, (_, i) =>
      Array.from({ length: q + 1 }, (_, j) => (i === 0 ? Number(j > 0) : j === 0 ? left : chi((j - i + q) % q))),
    );
  };
  const first = order - 1;
  if (first % 4 === 3 && isPrime(first)) return bordered(first, -1).map((row, i) => row.map((x, j) => x + Number(i === j))); // prettier-ignore
  const second = order / 2 - 1;
  if (second % 4 !== 1 || !isPrime(second)) return undefined;
  const c = bordered(second, 1);
  const [off, diagonal] = [[[1, 1], [1, -1]], [[1, -1], [-1, -1]]] as const; // prettier-ignore
  return Array.from({ length: order }, (_, i) =>
    Array.from({ length: order }, (_, j) => {
      const [r, s] = [i >> 1, j >> 1];
      return r === s ? diagonal[i & 1]![j & 1]! : c[r]![s]! * off[i & 1]![j & 1]!;
    }),
  );
}

/** Sylvester's, of a power of two. */
const sylvester = (order: number): number[][] =>
  Array.from({ length: order }, (_, i) =>
    Array.from({ length: order }, (_, j) => {
      let ones = i & j;
      for (let shift = 16; shift > 0; shift >>= 1) ones ^= ones >> shift;
      return ones & 1 ? -1 : 1;
    }),
  );

/** Small Hadamard matrices whose Kronecker product has this order; undefined: none is known here. */
export function hadamardFactors(order: number): number[][][] | undefined {
  let twos = 0;
  while (Number.isInteger(order / 2 ** (twos + 1))) twos++;
  const odd = order / 2 ** twos;
  for (let rest = twos; rest >= 0; rest--) {
    const core = order / 2 ** rest;
    if (odd > 1 && core > 2048) return undefined;
    const own = odd === 1 ? [] : paley(core);
    if (!own) continue;
    const factors = odd === 1 ? [] : [own];
    for (let left = 2 ** rest; left > 1; left /= Math.min(left, largestPower)) factors.push(sylvester(Math.min(left, largestPower))); // prettier-ignore
    return factors;
  }
  return undefined;
}

/** The largest order that divides `size`: `size` itself where it can be. */
export function hadamardOrder(size: number): number {
  for (let blocks = 1; ; blocks++) if (size % blocks === 0 && hadamardFactors(size / blocks)) return size / blocks;
}

/** X Q for rows X f32 [N, size], in place. */
export function rotateRows(x: Tensor, { size, order, seed, stream }: Rotation): void {
  using scope = new Scope(x.device);
  const random = new Random(seed, stream);
  const signs = scope.from(
    'f32',
    [1, size],
    Float32Array.from({ length: size }, () => (random.bits() & 1 ? 1 : -1)),
  );
  const factors = hadamardFactors(order)!.map((rows) =>
    scope.from(
      'f32',
      [rows.length, rows.length],
      Float32Array.from(rows.flat(), (one) => one / Math.sqrt(rows.length)),
    ),
  );
  const step = Math.max(1, Math.floor(chunk / size));
  for (let from = 0; from < x.dim(0); from += step) {
    using work = new Scope(x.device);
    const rows = x.slice(0, from, Math.min(x.dim(0), from + step));
    let y = binary(work, 'mul', rows, signs);
    // Each factor takes the last axis and sends it to the front: after all of them the axes are where they were.
    for (const factor of factors.toReversed()) {
      const f = factor.dim(0);
      const product = gemm(work, y.view(-1, f), factor).view(-1, order / f, f);
      y = cast(work, product.transpose(), 'f32');
    }
    copyInto(rows, y.view(...rows.shape));
  }
}

/** Q' W for the `size` rows from `from` on of each `width` rows of W f32 [N, K] (or [N]), in place. */
export function rotateOutputs(
  w: Tensor,
  { rotation, width, from }: { readonly rotation: Rotation; readonly width: number; readonly from: number },
): void {
  const columns = w.shape.length === 1 ? 1 : w.dim(1);
  const parts = w.view(-1, width, columns);
  const step = Math.max(1, Math.floor(chunk / rotation.size));
  for (let part = 0; part < parts.dim(0); part++) {
    const rows = parts.at(part).slice(0, from, from + rotation.size);
    for (let column = 0; column < columns; column += step) {
      using work = new Scope(w.device);
      const piece = rows.slice(1, column, Math.min(columns, column + step)).transpose();
      const turned = cast(work, piece, 'f32');
      rotateRows(turned, rotation);
      copyInto(piece, turned);
    }
  }
}
