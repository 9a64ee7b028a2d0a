import { badInput } from '../base/errors.js';

/** What stands in a tokenizer.json, as far as it is read here. */
interface TokenizerJson {
  readonly added_tokens?: readonly { readonly id: number; readonly content: string }[];
  readonly model?: {
    readonly type?: string;
    readonly vocab?: Readonly<Record<string, number>>;
    readonly merges?: readonly (string | readonly [string, string])[];
    readonly byte_fallback?: boolean;
    readonly continuing_subword_prefix?: string | null;
    readonly end_of_word_suffix?: string | null;
  };
}

/** Two ids as one number. */
const pairOf = (left: number, right: number): number => left * 2 ** 26 + right;

interface Candidate {
  readonly at: number;
  readonly rank: number;
  readonly made: number;
}

/**
 * The BPE of a tokenizer.json, word by word: for what the library does not offer, dropout with a seed and pieces that
 * are no valid text. Texts are cut into words by the library.
 */
export class BpeModel {
  /** Ids of the vocabulary, without added tokens. */
  readonly ids: ReadonlyMap<string, number>;
  /** Contents of added tokens (special ones and others) by id. */
  readonly added: ReadonlyMap<number, string>;
  readonly byteFallback: boolean;
  readonly #merges = new Map<number, { rank: number; made: number }>();

  /** Errors: input, another kind of model than BPE, or BPE whose tokens carry marks of their place in the word. */
  constructor(source: string, where: string) {
    const { model = {}, added_tokens: added = [] } = JSON.parse(source) as TokenizerJson;
    const { vocab, merges, continuing_subword_prefix: prefix, end_of_word_suffix: suffix } = model;
    if ((model.type ?? 'BPE') !== 'BPE' || !vocab || !merges || prefix || suffix) {
      throw badInput('The tokenizer is not plain BPE', {
        where,
        got: prefix || suffix ? `BPE with ${prefix ? 'a continuing_subword_prefix' : 'an end_of_word_suffix'}` : String(model.type),
        expected: 'a BPE model with vocabulary and merges',
      }); // prettier-ignore
    }
    this.ids = new Map(Object.entries(vocab));
    this.added = new Map(added.map(({ id, content }) => [id, content]));
    this.byteFallback = model.byte_fallback === true;
    merges.forEach((merge, rank) => {
      const [a, b] = typeof merge === 'string' ? (merge.split(' ') as [string, string]) : merge;
      const [left, right, made] = [a, b, a + b].map((token) => this.ids.get(token));
      if (left === undefined || right === undefined || made === undefined) {
        throw badInput('A merge of the tokenizer has a part that is no token', { where, got: `${a} ${b}` });
      }
      this.#merges.set(pairOf(left, right), { rank, made });
    });
  }

  /** The ids of a word's characters; undefined where one has none. */
  symbols(word: string): number[] | undefined {
    const ids = Array.from(word, (letter) => this.ids.get(letter));
    return ids.includes(undefined) ? undefined : (ids as number[]);
  }

  /**
   * Merges the symbols of one word, the merge that was learned first before others. With `dropped`, each merge that
   * comes up is left out where it says so, and has a new chance after the next one that is not (BPE-dropout, Provilkov
   * et al. 2020, as the Hugging Face library does it).
   */
  merge(symbols: readonly number[], dropped: () => boolean = () => false): number[] {
    const c = [...symbols];
    const next = c.map((_, i) => (i + 1 < c.length ? i + 1 : -1));
    const before = c.map((_, i) => i - 1);
    const gone = new Set<number>();
    const queue: Candidate[] = [];
    let skipped: Candidate[] = [];
    const enqueue = (at: number): void => {
      const found = next[at]! < 0 ? undefined : this.#merges.get(pairOf(c[at]!, c[next[at]!]!));
      if (found) push(queue, { at, ...found });
    };
    for (let i = 0; i < c.length; i++) enqueue(i);
    for (let top = pop(queue); top !== undefined; top = pop(queue)) {
      if (dropped()) {
        skipped.push(top);
        continue;
      }
      for (const one of skipped) push(queue, one);
      skipped = [];
      const { at, made } = top;
      const right = next[at]!;
      // Others were merged meanwhile.
      if (gone.has(at) || right < 0 || this.#merges.get(pairOf(c[at]!, c[right]!))?.made !== made) continue;
      c[at] = made;
      gone.add(right);
      next[at] = next[right]!;
      if (next[at] >= 0) before[next[at]] = at;
      if (before[at]! >= 0) enqueue(before[at]!);
      enqueue(at);
    }
    return c.filter((_, i) => !gone.has(i));
  }
}

const first = (a: Candidate, b: Candidate): boolean => a.rank < b.rank || (a.rank === b.rank && a.at < b.at);

function push(heap: Candidate[], item: Candidate): void {
  let at = heap.push(item) - 1;
  while (at > 0) {
    const parent = (at - 1) >> 1;
    if (!first(item, heap[parent]!)) break;
    heap[at] = heap[parent]!;
    at = parent;
  }
  heap[at] = item;
}

function pop(heap: Candidate[]): Candidate | undefined {
  const top = heap[0];
  const last = heap.pop();
  if (heap.length === 0 || last === undefined) return top;
  let at = 0;
  for (;;) {
    let child = 2 * at + 1;
    if (child >= heap.length) break;
    if (child + 1 < heap.length && first(heap[child + 1]!, heap[child]!)) child++;
    if (!first(heap[child]!, last)) break;
    heap[at] = heap[child]!;
    at = child;
  }
  heap[at] = last;
  return top;
}
