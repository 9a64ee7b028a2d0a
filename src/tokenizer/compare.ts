import type { Tokenizer } from './tokenizer.js';
import { textLines } from './train-text.js';
import { readVocabulary, textOf, type Meaning, type Vocabulary } from './vocabulary.js';

/** What texts take under both tokenizers; lines are encoded one by one. */
export interface Fertility {
  /** A file, or a script. */
  readonly name: string;
  readonly bytes: number;
  /** Unicode characters. */
  readonly characters: number;
  /** What white space separates. */
  readonly words: number;
  readonly tokens: readonly [a: number, b: number];
}
export interface TokenPlace {
  readonly token: string;
  /** Undefined: the tokenizer does not have it. */
  readonly ids: readonly [a: number | undefined, b: number | undefined];
}
export interface Comparison {
  readonly vocabSizes: readonly [a: number, b: number];
  /** Tokens that both have, and those of them that have one id. */
  readonly shared: number;
  readonly sameIds: number;
  readonly special: readonly TokenPlace[];
  /** Tokens that both have, under different ids. */
  readonly moved: readonly TokenPlace[];
  readonly files: readonly Fertility[];
  /** Each line counts for the script of most of its letters. */
  readonly scripts: readonly Fertility[];
  /** Words whose lengths in tokens differ most over all texts. */
  readonly words: readonly { readonly word: string; readonly count: number; readonly tokens: readonly [a: readonly string[], b: readonly string[]] }[];
} // prettier-ignore

const scripts = ['Latin', 'Han', 'Hiragana', 'Katakana', 'Hangul', 'Cyrillic', 'Greek', 'Arabic', 'Hebrew', 'Devanagari', 'Bengali', 'Tamil', 'Thai'].map((name) => [name, new RegExp(`\\p{Script=${name}}`, 'gu')] as const); // prettier-ignore
/** Words that are looked at for examples. */
const exampleWord = /(?<!\p{L})\p{L}{2,24}(?!\p{L})/gu;
const mostWords = 20_000;
const examples = 8;
const batch = 2000;

/** Compares two tokenizers, and what they make of texts. Errors: as `textLines`, `readVocabulary`. */
export async function compareTokenizers(
  tokenizers: readonly [Tokenizer, Tokenizer],
  texts: readonly string[],
): Promise<Comparison> {
  const [a, b] = [await readVocabulary(tokenizers[0]), await readVocabulary(tokenizers[1])];
  const files = new Map<string, Sum>();
  const byScript = new Map<string, Sum>();
  const words = new Map<string, number>();
  let lines: { file: string; line: string }[] = [];
  const count = async (): Promise<void> => {
    const texts = lines.map(({ line }) => line);
    const [x, y] = [await tokenizers[0].encodeAll(texts), await tokenizers[1].encodeAll(texts)];
    lines.forEach(({ file, line }, i) => {
      const found = line.match(/\S+/gu) ?? [];
      for (const word of line.match(exampleWord) ?? []) if (words.has(word) || words.size < mostWords) words.set(word, (words.get(word) ?? 0) + 1); // prettier-ignore
      const script = scriptOf(line);
      for (const [sums, name] of [[files, file], [byScript, script]] as const) {
        const sum = sums.get(name) ?? new Sum();
        sums.set(name, sum);
        sum.add(line, found.length, x[i]!.length, y[i]!.length);
      }
    }); // prettier-ignore
    lines = [];
  };
  for await (const { bytes, path } of textLines(texts)) {
    for (const line of Buffer.from(bytes)
      .toString()
      .split(/(?<=\n)/)) {
      if (line !== '' && lines.push({ file: path, line }) >= batch) await count();
    }
  }
  await count();
  const named = (sums: Map<string, Sum>) => [...sums].map(([name, sum]) => ({ name, ...sum.numbers() }));
  return {
    vocabSizes: [a.size, b.size],
    ...overlap(a, b),
    files: named(files),
    scripts: named(byScript).sort((p, q) => q.bytes - p.bytes),
    words: await differing(tokenizers, [a, b], words),
  };
}

class Sum {
  #bytes = 0;
  #characters = 0;
  #words = 0;
  readonly #tokens: [number, number] = [0, 0];
  add(line: string, words: number, a: number, b: number): void {
    this.#bytes += Buffer.byteLength(line);
    for (const _ of line) this.#characters++;
    this.#words += words;
    this.#tokens[0] += a;
    this.#tokens[1] += b;
  }
  numbers(): Omit<Fertility, 'name'> {
    return { bytes: this.#bytes, characters: this.#characters, words: this.#words, tokens: this.#tokens };
  }
}

function scriptOf(line: string): string {
  let [best, most] = ['no letters', 0];
  for (const [name, letters] of scripts) {
    const found = line.match(letters)?.length ?? 0;
    if (found > most) [best, most] = [name, found];
  }
  return best === 'no letters' && /\p{L}/u.test(line) ? 'another script' : best;
}

const shown = (meaning: Meaning): string =>
  textOf(meaning) ?? Array.from(meaning.bytes, (byte) => `<0x${byte.toString(16).padStart(2, '0')}>`).join('');

function overlap(a: Vocabulary, b: Vocabulary): Pick<Comparison, 'shared' | 'sameIds' | 'special' | 'moved'> {
  const special = new Map<string, TokenPlace>();
  const moved: TokenPlace[] = [];
  let [shared, sameIds] = [0, 0];
  for (const one of [...a.meanings, ...b.meanings]) {
    if (one?.special) special.set(one.key, { token: shown(one), ids: [a.ids.get(one.key), b.ids.get(one.key)] });
  }
  for (const [key, id] of a.ids) {
    const other = b.ids.get(key);
    if (other === undefined) continue;
    shared++;
    if (other === id) sameIds++;
    else if (moved.length < examples) moved.push({ token: shown(a.meanings[id]!), ids: [id, other] });
  }
  return { shared, sameIds, special: [...special.values()], moved };
}

async function differing(
  [a, b]: readonly [Tokenizer, Tokenizer],
  vocabularies: readonly [Vocabulary, Vocabulary],
  counts: ReadonlyMap<string, number>,
): Promise<Comparison['words']> {
  const words = [...counts.keys()];
  const inText = words.map((word) => ` ${word}`);
  const [x, y] = [await a.encodeAll(inText), await b.encodeAll(inText)];
  const rows = words.map((word, i) => ({ word, count: counts.get(word)!, ids: [x[i]!, y[i]!] as const }));
  const weight = ({ count, ids }: (typeof rows)[number]) => count * Math.abs(ids[0].length - ids[1].length);
  const most = rows.filter((row) => weight(row) > 0).sort((p, q) => weight(q) - weight(p)).slice(0, examples); // prettier-ignore
  const spelled = (i: 0 | 1, ids: Int32Array) => Array.from(ids, (id) => shown(vocabularies[i].meanings[id]!));
  return most.map(({ word, count, ids }) => ({ word, count, tokens: [spelled(0, ids[0]), spelled(1, ids[1])] }));
}
