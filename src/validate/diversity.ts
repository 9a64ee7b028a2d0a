import { mean, pairedBootstrap, round, sum } from './stats.js';
import type { Difference, DiversityNumbers, DiversityResult, Interval } from './report.js';

/** One generation: the new tokens' ids, without the prompt and without the end token. */
export type Response = ArrayLike<number>;

/** All n-grams of a response as small integers, the same ones for equal n-grams of any response indexed here. */
class NgramIndex {
  readonly #ids = new Map<string, number>();

  get size(): number {
    return this.#ids.size;
  }

  grams(response: Response, n: number): Int32Array {
    const out = new Int32Array(Math.max(0, response.length - n + 1));
    for (let i = 0; i < out.length; i++) {
      let key = '';
      for (let j = i; j < i + n; j++) key += `${response[j]!},`;
      let id = this.#ids.get(key);
      if (id === undefined) this.#ids.set(key, (id = this.#ids.size));
      out[i] = id;
    }
    return out;
  }
}

/** distinct-n (Li et al. 2016): unique n-grams over n-grams of one response; NaN when it has none. */
export function distinct(response: Response, n: number): number {
  const grams = new NgramIndex().grams(response, n);
  return new Set(grams).size / grams.length;
}

/** distinct-n of all responses together. */
export function corpusDistinct(responses: readonly Response[], n: number): number {
  const index = new NgramIndex();
  const total = sum(responses.map((r) => index.grams(r, n).length));
  return index.size / total;
}

/**
 * Expectation-adjusted distinct (Liu et al. 2022, eq. 3): unique / (V (1 - ((V - 1) / V)^C)), where C tokens are
 * drawn from a vocabulary of V. Unlike distinct-1 it does not fall with length.
 */
export function expectationAdjustedDistinct(responses: readonly Response[], vocabulary: number): number {
  const unique = new Set(responses.flatMap((r) => Array.from(r))).size;
  const tokens = sum(responses.map((r) => r.length));
  return unique / (vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** tokens));
}

/**
 * Self-BLEU (Zhu et al. 2018): mean over responses of BLEU-4 against all other responses as references. BLEU as
 * Papineni et al. 2002 with the closest reference length; an order without a match counts 0.1 matches (Chen & Cherry
 * 2014, method 1), and one that shares no word with the others has 0. Responses shorter than four tokens are left out.
 */
export function selfBleu(responses: readonly Response[]): number[] {
  const long = responses.filter((r) => r.length >= 4);
  if (long.length < 2) return [];
  const logs = new Float64Array(long.length);
  for (let n = 1; n <= 4; n++) {
    const index = new NgramIndex();
    const grams = long.map((r) => index.grams(r, n));
    // A response is clipped by the largest count among the others: the two largest over all, and whose the first is.
    const [first, second, owner] = [new Int32Array(index.size), new Int32Array(index.size), new Int32Array(index.size)];
    const counts = grams.map((g, r) => {
      const count = new Map<number, number>();
      for (const id of g) count.set(id, (count.get(id) ?? 0) + 1);
      for (const [id, c] of count) {
        if (c > first[id]!) [second[id], first[id], owner[id]] = [first[id]!, c, r];
        else if (c > second[id]!) second[id] = c;
      }
      return count;
    });
    counts.forEach((count, r) => {
      let matches = 0;
      for (const [id, c] of count) matches += Math.min(c, owner[id] === r ? second[id]! : first[id]!);
      const least = n === 1 ? 0 : 0.1;
      logs[r]! += Math.log((matches === 0 ? least : matches) / grams[r]!.length) / 4;
    });
  }
  return long.map((response, r) => {
    const length = response.length;
    const others = long.filter((_, i) => i !== r).map((other) => other.length);
    const closest = others.reduce((best, l) => {
      const [d, b] = [Math.abs(l - length), Math.abs(best - length)];
      return d < b || (d === b && l < best) ? l : best;
    });
    return Math.exp(logs[r]! + (length >= closest ? 0 : 1 - closest / length));
  });
}

const finiteMean = (values: readonly number[]): number => {
  const finite = values.filter((v) => !Number.isNaN(v));
  return finite.length === 0 ? 0 : mean(finite);
};
const orders = [1, 2, 3] as const;
const repetitionOrders = [2, 3, 4] as const;

/** All diversity metrics of one model's responses. */
export function measureDiversity(responses: readonly Response[], vocabulary: number): DiversityNumbers {
  const full = responses.filter((r) => r.length > 0);
  const corpus = orders.map((n) => (full.length === 0 ? 0 : corpusDistinct(full, n)));
  return {
    distinct: {
      perResponse: orders.map((n) => round(finiteMean(full.map((r) => distinct(r, n))))),
      corpus: corpus.map((value) => round(Number.isNaN(value) ? 0 : value)),
    },
    ead: full.length === 0 ? 0 : round(expectationAdjustedDistinct(full, vocabulary)),
    repetition: repetitionOrders.map((n) => round(finiteMean(full.map((r) => 1 - distinct(r, n))))),
    selfBleu: round(finiteMean(selfBleu(full))),
    meanLength: round(responses.length === 0 ? 0 : mean(responses.map((r) => r.length))),
    empty: responses.length - full.length,
  };
}

/**
 * Both models' responses to the same prompts and seeds, response i to prompt i. Intervals come from drawing prompts;
 * corpus values are counted anew in each draw. A prompt drawn twice lowers distinct-n by itself, so their intervals
 * are moved to where the draws' mean meets the measured value. Self-BLEU has none: its units depend on each other.
 */
export function compareDiversity(
  reference: readonly Response[],
  candidate: readonly Response[],
  vocabulary: number,
  bootstrap: { readonly resamples: number; readonly seed: number },
): Pick<DiversityResult, 'reference' | 'candidate' | 'differences' | 'distinctRatio'> {
  const [a, b] = [measureDiversity(reference, vocabulary), measureDiversity(candidate, vocabulary)];
  const sides = [reference, candidate] as const;
  const pools = orders.map((n) => sides.map((responses) => corpusCounter(responses, n)));
  const perResponse = [
    ...orders.map((n) => sides.map((side) => side.map((r) => distinct(r, n)))),
    ...repetitionOrders.map((n) => sides.map((side) => side.map((r) => 1 - distinct(r, n)))),
  ];
  const over = (values: readonly number[], draw: Int32Array): number => finiteMean(Array.from(draw, (i) => values[i]!));
  const ratioOf = (p: number, q: number): number => (p === 0 ? 1 : q / p);
  const corpusRows = orders.map(
    (n, i) => [`distinct-${n} corpus`, a.distinct.corpus[i]!, b.distinct.corpus[i]!] as const,
  );
  const rows: (readonly [string, number, number])[] = [
    ...orders.map(
      (n, i) => [`distinct-${n} per response`, a.distinct.perResponse[i]!, b.distinct.perResponse[i]!] as const,
    ),
    ...repetitionOrders.map((n, i) => [`rep-${n}`, a.repetition[i]!, b.repetition[i]!] as const),
    ...corpusRows,
  ];
  const ratio = ratioOf(a.distinct.corpus[1]!, b.distinct.corpus[1]!);
  const intervals = pairedBootstrap(
    reference.length,
    (draw) => {
      const corpus = pools.map(([p, q]) => [p!(draw), q!(draw)] as const);
      return [
        ...perResponse.map(([p, q]) => over(q!, draw) - over(p!, draw)),
        ...corpus.map(([p, q]) => q - p),
        ratioOf(...corpus[1]!),
      ];
    },
    bootstrap,
    [...perResponse.map(() => undefined), ...corpusRows.map(([, p, q]) => q - p), ratio],
  ).map((interval): Interval => ({ low: round(interval.low), high: round(interval.high) }));
  const differences = rows.map(([metric, p, q], i): Difference => {
    return { metric, reference: p, candidate: q, difference: round(q - p), interval: intervals[i]! };
  });
  return {
    reference: a,
    candidate: b,
    differences,
    distinctRatio: { value: round(ratio), interval: intervals[rows.length]! },
  };
}

/** distinct-n of the corpus that a draw makes of the responses. */
function corpusCounter(responses: readonly Response[], n: number): (draw: Int32Array) => number {
  const index = new NgramIndex();
  const grams = responses.map((r) => index.grams(r, n));
  const seen = new Int32Array(index.size);
  let round = 0;
  return (draw) => {
    round++;
    let [unique, total] = [0, 0];
    for (const i of draw) {
      const g = grams[i]!;
      total += g.length;
      for (const id of g) {
        if (seen[id] === round) continue;
        seen[id] = round;
        unique++;
      }
    }
    return total === 0 ? 0 : unique / total;
  };
}
