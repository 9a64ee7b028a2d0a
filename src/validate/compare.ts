import { pairedBootstrap, round } from './stats.js';
import type { Interval, ValidateReport, WindowNumbers } from './report.js';

export const comparisonSchema = 'deepseek-convert/comparison';

/** Two candidates on the same windows: differences are the first's minus the second's. */
export interface Duel {
  readonly first: number;
  readonly second: number;
  readonly kl: { readonly difference: number; readonly interval: Interval };
  /** Of the mean losses: exp of it is the ratio of the two perplexities. */
  readonly loss: { readonly difference: number; readonly interval: Interval };
  /** Index of the candidate with the lower KL where the interval leaves out zero. */
  readonly better: number | null;
}

export interface Recommendation {
  /** Index of the candidate; null: none passes. */
  readonly candidate: number | null;
  readonly because: string;
}

/** How the recommendation is found, in words: shown with every comparison. */
export const rule =
  'the smallest of those that pass every gate; among those within 2% of its size, one whose KL is lower by more than chance (95%, paired bootstrap over windows)';

/**
 * Every pair of candidates, by windows that all of them saw.
 * @throws RangeError where the reports are not of the same windows
 */
export function duels(
  reports: readonly ValidateReport[],
  bootstrap: { readonly resamples: number; readonly seed: number },
): Duel[] {
  const windows = reports.map(({ logits }) => logits.windows);
  for (const other of windows) if (other.length !== windows[0]!.length) throw new RangeError('other windows');
  return windows.flatMap((a, first) =>
    windows.slice(first + 1).map((b, i): Duel => duel(a, b, first, first + 1 + i, bootstrap)),
  );
}

function duel(
  a: readonly WindowNumbers[],
  b: readonly WindowNumbers[],
  first: number,
  second: number,
  bootstrap: { readonly resamples: number; readonly seed: number },
): Duel {
  const means = (draw: ArrayLike<number>): [number, number] => {
    let [kl, loss, tokens] = [0, 0, 0];
    for (let d = 0; d < draw.length; d++) {
      const [p, q] = [a[draw[d]!]!, b[draw[d]!]!];
      kl += p.tokens * (p.kl - q.kl);
      loss += p.tokens * (p.loss.candidate - q.loss.candidate);
      tokens += p.tokens;
    }
    return [kl / tokens, loss / tokens];
  };
  const [kl, loss] = means(a.map((_, i) => i));
  const [klInterval, lossInterval] = pairedBootstrap(a.length, means, bootstrap).map(({ low, high }) => ({ low: round(low), high: round(high) })); // prettier-ignore
  const { low, high } = klInterval!;
  const better = high < 0 ? first : low > 0 ? second : null;
  return {
    first,
    second,
    kl: { difference: round(kl), interval: klInterval! },
    loss: { difference: round(loss), interval: lossInterval! },
    better,
  };
}

/** Applies `rule`. */
export function recommend(reports: readonly ValidateReport[], pairs: readonly Duel[]): Recommendation {
  const size = (i: number): number => reports[i]!.candidate.storedBytes;
  const passing = reports.flatMap(({ passed }, i) => (passed ? [i] : [])).sort((a, b) => size(a) - size(b) || a - b);
  const [smallest] = passing;
  if (smallest === undefined) return { candidate: null, because: 'none passes every gate' };
  const name = (i: number): string => reports[i]!.candidate.path;
  const beats = (i: number, j: number): boolean =>
    pairs.some(({ first, second, better }) => better === i && ((first === i && second === j) || (first === j && second === i))); // prettier-ignore
  let best = smallest;
  for (const i of passing) if (size(i) <= 1.02 * size(smallest) && beats(i, best)) best = i;
  if (best !== smallest) {
    return { candidate: best, because: `as small as ${name(smallest)}, with a KL that is lower by more than chance` };
  }
  const others = passing.length - 1;
  return {
    candidate: best,
    because:
      others === 0 ? 'the only one that passes every gate' : `the smallest of ${others + 1} that pass every gate`,
  };
}
