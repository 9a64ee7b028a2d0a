import { crossEntropy, klRows } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import { mean, pairedBootstrap, quantile, round, sum } from './stats.js';
import type { LogitsNumbers, LogitsResult } from './report.js';

/** What one position said: all in nats. */
export interface Positions {
  readonly kl: Float32Array;
  readonly lossReference: Float32Array;
  readonly lossCandidate: Float32Array;
  readonly topReference: Int32Array;
  readonly topCandidate: Int32Array;
}

/**
 * Compares next-token distributions row by row.
 * @param p, q logits of reference and candidate, [T, V]
 * @param targets i32 [T], the text's own next tokens; -1 where there is none
 */
export async function comparePositions(scope: Scope, p: Tensor, q: Tensor, targets: Tensor): Promise<Positions> {
  const rows = p.dim(0);
  const topP = scope.empty('i32', [rows]);
  const topQ = scope.empty('i32', [rows]);
  const { kl } = klRows(scope, p, q);
  const [lossP, lossQ] = [
    crossEntropy(scope, p, targets, { top: topP }),
    crossEntropy(scope, q, targets, { top: topQ }),
  ];
  const [a, b, c, d, e] = await Promise.all([
    kl.float32(),
    lossP.float32(),
    lossQ.float32(),
    topP.int32(),
    topQ.int32(),
  ]);
  return { kl: a, lossReference: b, lossCandidate: c, topReference: d, topCandidate: e };
}

/** One position that counts, and where it is. */
interface Point {
  readonly text: number;
  readonly window: number;
  readonly position: number;
  readonly kl: number;
}

/** A position with a large divergence, as ids; texts are put in by the caller. */
export interface WorstPosition extends Point {
  readonly target: number;
  readonly reference: number;
  readonly candidate: number;
}

const keepWorst = 10;
const edges = Array.from({ length: 45 }, (_, i) => Number((10 ** (-8 + i / 4)).toPrecision(6)));

interface Unit {
  kl: number;
  reference: number;
  candidate: number;
  same: number;
  count: number;
}
const emptyUnit = (): Unit => ({ kl: 0, reference: 0, candidate: 0, same: 0, count: 0 });

/** Collects positions of all windows and turns them into the report's numbers. */
export class LogitsMeter {
  readonly #names: readonly string[];
  /** Divergences by text. */
  readonly #kl: number[][];
  /** Sums by text and window. */
  readonly #units: Map<number, Unit>[];
  readonly #counts = new Array<number>(edges.length - 1).fill(0);
  #worst: WorstPosition[] = [];
  #flips = { rightToWrong: 0, wrongToRight: 0 };
  #nonFinite = { reference: 0, candidate: 0 };

  constructor(names: readonly string[]) {
    this.#names = names;
    this.#kl = names.map(() => []);
    this.#units = names.map(() => new Map<number, Unit>());
  }

  /**
   * Rows of windows of one text.
   * @param first window and position of row 0; rows go on through the windows, `length` positions each
   */
  add(
    text: number,
    first: { window: number; position: number },
    length: number,
    targets: Int32Array,
    p: Positions,
  ): void {
    for (let row = 0; row < targets.length; row++) {
      const target = targets[row]!;
      if (target < 0) continue;
      const at = first.position + row;
      const [window, position] = [first.window + Math.floor(at / length), at % length];
      const [lossP, lossQ] = [p.lossReference[row]!, p.lossCandidate[row]!];
      // Rounding of two equal distributions can end a hair below zero.
      const kl = Math.max(0, p.kl[row]!);
      const [finiteP, finiteQ] = [Number.isFinite(lossP), Number.isFinite(lossQ) && Number.isFinite(p.kl[row]!)];
      if (!finiteP) this.#nonFinite.reference++;
      else if (!finiteQ) this.#nonFinite.candidate++;
      if (!finiteP || !finiteQ) continue;
      const [topP, topQ] = [p.topReference[row]!, p.topCandidate[row]!];
      let unit = this.#units[text]!.get(window);
      if (!unit) this.#units[text]!.set(window, (unit = emptyUnit()));
      unit.kl += kl;
      unit.reference += lossP;
      unit.candidate += lossQ;
      unit.same += topP === topQ ? 1 : 0;
      unit.count++;
      this.#kl[text]!.push(kl);
      if (topP === target && topQ !== target) this.#flips.rightToWrong++;
      if (topP !== target && topQ === target) this.#flips.wrongToRight++;
      const bin = Math.floor((Math.log10(Math.max(kl, 1e-12)) + 8) * 4);
      this.#counts[Math.min(this.#counts.length - 1, Math.max(0, bin))]!++;
      if (kl > (this.#worst.at(-1)?.kl ?? 0) || (kl > 0 && this.#worst.length < keepWorst)) {
        this.#worst.push({ text, window, position, kl: round(kl), target, reference: topP, candidate: topQ });
        this.#worst.sort((a, b) => b.kl - a.kl);
        this.#worst.length = Math.min(this.#worst.length, keepWorst);
      }
    }
  }

  get worst(): readonly WorstPosition[] {
    return this.#worst;
  }

  finish(bootstrap: { readonly resamples: number; readonly seed: number }): Omit<LogitsResult, 'worst'> {
    const units = this.#units.flatMap((windows) => [...windows.values()]);
    const positions = sum(units.map((u) => u.count));
    const intervals =
      units.length === 0
        ? [
            { low: 0, high: 0 },
            { low: 1, high: 1 },
          ]
        : pairedBootstrap(
            units.length,
            (draw) => {
              let [kl, loss, count] = [0, 0, 0];
              for (const i of draw) {
                const unit = units[i]!;
                kl += unit.kl;
                loss += unit.candidate - unit.reference;
                count += unit.count;
              }
              return [kl / count, Math.exp(loss / count)];
            },
            bootstrap,
          ).map(({ low, high }) => ({ low: round(low), high: round(high) }));
    return {
      ...numbers(units, this.#kl.flat()),
      intervals: { kl: intervals[0]!, ratio: intervals[1]! },
      flips: {
        rightToWrong: round(this.#flips.rightToWrong / Math.max(positions, 1)),
        wrongToRight: round(this.#flips.wrongToRight / Math.max(positions, 1)),
      },
      texts: this.#names.map((name, i) => ({ name, ...numbers([...this.#units[i]!.values()], this.#kl[i]!) })),
      nonFinite: this.#nonFinite,
      windows: this.#units.flatMap((windows, text) =>
        [...windows.values()].map(({ count, kl, reference, candidate }) => ({
          text,
          tokens: count,
          kl: round(kl / count),
          loss: { reference: round(reference / count), candidate: round(candidate / count) },
        })),
      ),
      histogram: { edges, counts: this.#counts },
    };
  }
}

function numbers(units: readonly Unit[], kl: readonly number[]): LogitsNumbers {
  const sorted = Float64Array.from(kl).sort();
  const count = sorted.length;
  const [p, q] = [sum(units.map((u) => u.reference)) / count, sum(units.map((u) => u.candidate)) / count];
  return {
    tokens: count,
    kl: {
      mean: round(count === 0 ? 0 : mean(sorted)),
      median: round(quantile(sorted, 0.5)),
      p99: round(quantile(sorted, 0.99)),
      max: round(sorted.at(-1) ?? NaN),
    },
    top1: round(sum(units.map((u) => u.same)) / count),
    perplexity: { reference: round(Math.exp(p)), candidate: round(Math.exp(q)), ratio: round(Math.exp(q - p)) },
  };
}
