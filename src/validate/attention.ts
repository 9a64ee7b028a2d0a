import type { AttentionCall } from '../nn/calls.js';
import { attentionCompare, binary, copyInto, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { mean, round } from './stats.js';
import type { AttentionMode, HeadNumbers } from './report.js';

/** Whether two calls attend over the same positions with the same heads, so that their rows can be compared. */
export function sameGeometry(a: AttentionCall, b: AttentionCall): boolean {
  const [p, q] = [a.options, b.options];
  return (
    [0, 1, 2].every((d) => a.q.dim(d) === b.q.dim(d)) &&
    a.k.dim(1) === b.k.dim(1) &&
    (p.cap ?? 0) === 0 && // the comparison knows of none
    (q.cap ?? 0) === 0 &&
    (p.causal ?? true) === (q.causal ?? true) &&
    (p.offset ?? 0) === (q.offset ?? 0)
  );
}

/**
 * Sums over queries of what op attention_compare says of one call in both models: f32 [Hq, 3] (divergence, cosine,
 * overlap). Query 0 is left out: it has no key but the sink. A wider window of one side shows as divergence: both are
 * compared over the wider one.
 * @returns the sums, and the number of queries that went into them
 */
export function compareHeads(scope: Scope, a: AttentionCall, b: AttentionCall): { sums: Tensor; queries: number } {
  const [rows, length, heads] = a.q.shape as [number, number, number];
  const windows = [a.options.window ?? 0, b.options.window ?? 0];
  const window = windows.includes(0) ? 0 : Math.max(...windows);
  using inner = new Scope(scope.device);
  const all = attentionCompare(inner, side(a), side(b), {
    causal: a.options.causal ?? true,
    window,
    offset: a.options.offset ?? 0,
  });
  const queries = length - 1;
  const used = inner.empty('f32', [rows, heads, 3, queries]); // queries innermost: a GPU sums along rows
  copyInto(used, all.slice(2, 1, length).transpose());
  const perHead = reduce(inner, 'sum', reduce(inner, 'sum', used, 3), 0);
  const sums = scope.empty('f32', [heads, 3]);
  copyInto(sums, perHead);
  return { sums, queries: rows * queries };
}

const side = ({ q, k, options: { scale, cap = 0 } }: AttentionCall) => ({ q, k, scale, cap });

/** Largest absolute difference of the queries and keys of two calls, f32 [2]; undefined where shapes differ. */
export function largestDifference(scope: Scope, a: AttentionCall, b: AttentionCall): Tensor | undefined {
  const out = scope.empty('f32', [2]);
  for (const [i, [x, y]] of (
    [
      [a.q, b.q],
      [a.k, b.k],
    ] as const
  ).entries()) {
    if (x.shape.some((d, k) => d !== y.shape[k])) return undefined;
    using inner = new Scope(scope.device);
    const d = binary(inner, 'sub', x, y, { out: inner.empty('f32', x.shape) });
    copyInto(out.slice(0, i, i + 1), reduce(inner, 'absmax', d.view(-1), 0).view(1));
  }
  return out;
}

/** Head maps of one mode (teacher-forced or free-running), filled chunk by chunk. */
export class HeadMaps {
  readonly #layers: ({ sums: Float64Array; queries: number } | null)[];

  constructor(layers: number) {
    this.#layers = new Array<null>(layers).fill(null);
  }

  /** `sums`: [Hq, 3] as `compareHeads` gives. */
  add(layer: number, sums: Float32Array, queries: number): void {
    const held = (this.#layers[layer] ??= { sums: new Float64Array(sums.length), queries: 0 });
    sums.forEach((value, i) => (held.sums[i]! += value));
    held.queries += queries;
  }

  get empty(): boolean {
    return this.#layers.every((layer) => layer === null);
  }

  finish(): AttentionMode {
    const map = (part: number) =>
      this.#layers.map((layer) => {
        if (!layer) return null;
        const heads = layer.sums.length / 3;
        return Array.from({ length: heads }, (_, h) => round(layer.sums[3 * h + part]! / layer.queries));
      });
    const [divergence, cosine, overlap] = [map(0), map(1), map(2)];
    const heads = divergence.flatMap((row, layer) =>
      (row ?? []).map((value, head) => ({
        layer,
        head,
        divergence: value,
        cosine: cosine[layer]![head]!,
        overlap: overlap[layer]![head]!,
      })),
    );
    // A head whose divergence is not a number is the worst there is.
    const badness = (h: HeadNumbers): number => (Number.isNaN(h.divergence) ? Infinity : h.divergence);
    const worst = heads
      .toSorted((a, b) => badness(b) - badness(a) || a.layer - b.layer || a.head - b.head)
      .slice(0, Math.ceil(heads.length * 0.05));
    return { divergence, cosine, overlap, mean: average(heads), worst: { ...average(worst), heads: worst } };
  }
}

const average = (heads: readonly HeadNumbers[]): HeadNumbers => ({
  divergence: round(mean(heads.map((h) => h.divergence))),
  cosine: round(mean(heads.map((h) => h.cosine))),
  overlap: round(mean(heads.map((h) => h.overlap))),
});
