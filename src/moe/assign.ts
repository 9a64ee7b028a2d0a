import { bug } from '../base/errors.js';

export interface AssignOptions {
  /** In units of the scores; default 1/1000 of their standard deviation. */
  readonly epsilon?: number;
  /** Of each place, from an assignment with like scores (zeros: from none): this one starts there and leaves its own. */
  readonly prices?: Float64Array;
}

/**
 * Assigns n items to E places with capacities (their sum is n) so that the sum of scores is largest: an auction with
 * epsilon-scaling in which the seats of one place are alike (Bertsekas & Castanon 1989). The result is within
 * n epsilon of the optimum; with integer scores and epsilon < 1/n it is optimal.
 *
 * `scores` [n, E]. Returns the place of each item.
 */
export function assignBalanced(
  scores: Float32Array,
  capacities: Int32Array,
  { epsilon, prices }: AssignOptions = {},
): Int32Array {
  const places = capacities.length;
  const n = scores.length / places;
  if (capacities.reduce((a, b) => a + b, 0) !== n) {
    throw bug('assignment of items to places', { got: `${n} items, capacities ${capacities.join(', ')}` });
  }
  const spread = deviation(scores);
  const last = epsilon ?? (spread > 0 ? spread * 1e-3 : 1);
  const auction = new Auction(scores, capacities, prices);
  // Prices that are far from right have to be overtaken step by step: the first steps are as large as they are.
  const start = prices?.some((price) => price !== 0) ? Math.max(spread, Math.max(...prices) - Math.min(...prices)) / 25 : spread; // prettier-ignore
  let step = Math.max(start, last);
  for (;;) {
    auction.round(step);
    if (step <= last) return auction.placeOf;
    step = Math.max(step / 5, last);
  }
}

function deviation(values: Float32Array): number {
  let [sum, squares] = [0, 0];
  for (let i = 0; i < values.length; i++) {
    const v = values[i]!;
    sum += v;
    squares += v * v;
  }
  if (!Number.isFinite(squares)) throw bug('assignment with scores that are not finite');
  const mean = sum / values.length;
  return Math.sqrt(Math.max(squares / values.length - mean * mean, 0));
}

/** Prices survive from one round to the next, which is what makes the later, finer rounds short. */
class Auction {
  readonly placeOf: Int32Array;
  readonly #prices: Float64Array;
  readonly #seats: Seats[];

  constructor(
    readonly scores: Float32Array,
    readonly capacities: Int32Array,
    prices: Float64Array = new Float64Array(capacities.length),
  ) {
    this.placeOf = new Int32Array(scores.length / capacities.length);
    this.#prices = prices;
    this.#seats = Array.from(capacities, (size) => new Seats(size));
  }

  round(epsilon: number): void {
    const { scores, capacities, placeOf } = this;
    const places = capacities.length;
    const prices = this.#prices;
    this.#seats.forEach((seats) => (seats.taken = 0));
    const waiting = Int32Array.from(this.placeOf, (_, i) => i);
    let left = waiting.length;
    while (left > 0) {
      const item = waiting[--left]!;
      const row = item * places;
      let best = -Infinity;
      let place = -1;
      let second = -Infinity;
      for (let e = 0; e < places; e++) {
        const value = scores[row + e]! - prices[e]!;
        if (value <= second || capacities[e] === 0) continue;
        if (value > best) {
          second = best;
          best = value;
          place = e;
        } else second = value;
      }
      // A single place has no rival: any bid wins.
      const bid = prices[place]! + (second === -Infinity ? 0 : best - second) + epsilon;
      const seats = this.#seats[place]!;
      const evicted = seats.take(bid, item);
      placeOf[item] = place;
      if (evicted >= 0) waiting[left++] = evicted;
      if (seats.full) prices[place] = seats.lowest;
    }
  }
}

/** The seats of one place: a heap of bids, the lowest on top. */
class Seats {
  taken = 0;
  readonly #bids: Float64Array;
  readonly #items: Int32Array;

  constructor(readonly size: number) {
    this.#bids = new Float64Array(size);
    this.#items = new Int32Array(size);
  }
  get full(): boolean {
    return this.taken === this.size;
  }
  get lowest(): number {
    return this.#bids[0]!;
  }

  /** Seats an item; the one with the lowest bid has to go when all seats are taken (-1: none). */
  take(bid: number, item: number): number {
    if (!this.full) {
      let i = this.taken++;
      for (let up = (i - 1) >> 1; i > 0 && this.#bids[up]! > bid; i = up, up = (i - 1) >> 1) this.#move(up, i);
      this.#put(i, bid, item);
      return -1;
    }
    const evicted = this.#items[0]!;
    let i = 0;
    for (;;) {
      let child = 2 * i + 1;
      if (child >= this.size) break;
      if (child + 1 < this.size && this.#bids[child + 1]! < this.#bids[child]!) child++;
      if (this.#bids[child]! >= bid) break;
      this.#move(child, i);
      i = child;
    }
    this.#put(i, bid, item);
    return evicted;
  }

  #move(from: number, to: number): void {
    this.#put(to, this.#bids[from]!, this.#items[from]!);
  }
  #put(i: number, bid: number, item: number): void {
    this.#bids[i] = bid;
    this.#items[i] = item;
  }
}
