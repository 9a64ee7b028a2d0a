import { ConvertError, badInput, badUsage } from '../base/errors.js';
import type { Log } from '../base/log.js';
import type { DigitCut, PreTokenizerName } from './splits.js';
import { stagesOf } from './splits.js';

/** The trainer of native/bpe.h. */
export interface NativeTrainer {
  /** Counts the words of UTF-8 text; gives its first byte that is not UTF-8, or -1. */
  count(text: Uint8Array): Promise<number>;
  /** left, right, merged: ids of each merge in turn. */
  merge(first: readonly string[], byteIds: Int32Array, vocabSize: number, minFrequency: number): Promise<Int32Array>;
  /** Tokens so far. */
  made(): number;
  stop(): void;
}
export type NativeTrainerClass = new (splits: readonly string[]) => NativeTrainer;

export interface BpeOptions {
  /** Tokens in all, special ones and the 256 bytes included; fewer where the text has no more pairs. */
  readonly vocabSize: number;
  /** Pairs that are rarer are not merged. */
  readonly minFrequency: number;
  /** Get the first ids, in order. */
  readonly special: readonly string[];
  readonly preTokenizer: PreTokenizerName;
  /** Cuts numbers into digits, or threes, before anything else. */
  readonly digits?: DigitCut | undefined;
}
export interface Bpe {
  /** Tokens by id, as the vocabulary spells them. */
  readonly tokens: readonly string[];
  /** The two parts of each merge, in order. */
  readonly merges: readonly (readonly [left: string, right: string])[];
}

/** Ids are native 32-bit integers; no vocabulary comes near. */
const largestVocabulary = 2 ** 24;

/** GPT-2's letters for bytes: printable ones stand for themselves, the others for what follows U+0100. */
export const byteLetters: readonly string[] = (() => {
  let next = 256;
  return Array.from({ length: 256 }, (_, byte) => {
    const printable = (byte > 32 && byte < 127) || (byte > 160 && byte !== 173);
    return String.fromCharCode(printable ? byte : next++);
  });
})();

/**
 * Learns byte-level BPE, merge for merge as the BpeTrainer of the Hugging Face tokenizers library on files of the same
 * text with the whole byte alphabet: the most frequent pair first, of equally frequent ones the one with the smaller
 * ids. Lines (with their ends) are cut into words one by one.
 * `texts` gives whole lines of UTF-8, and where they begin in which file.
 * Errors: usage (no room for bytes and special tokens), input (no text, not UTF-8), interrupted.
 */
export async function trainBpe(
  Trainer: NativeTrainerClass,
  texts: AsyncIterable<{ readonly bytes: Uint8Array; readonly path: string; readonly offset: number }>,
  options: BpeOptions,
  { log, signal }: { readonly log: Log; readonly signal: AbortSignal },
): Promise<Bpe> {
  const first = [...new Set([...options.special, ...[...byteLetters].sort()])];
  if (options.vocabSize < first.length || options.vocabSize > largestVocabulary) {
    throw badUsage('--vocab-size has no room for the bytes and the special tokens', {
      got: String(options.vocabSize),
      expected: `${first.length} (256 bytes and ${first.length - 256} special tokens) to ${largestVocabulary}`,
    });
  }
  const trainer = new Trainer(stagesOf(options.preTokenizer, options.digits).map(({ name }) => name));
  const stop = () => trainer.stop();
  signal.addEventListener('abort', stop);
  const watch = setInterval(() => {
    if (trainer.made() > 0) log.progress({ stage: 'merge', done: trainer.made(), total: options.vocabSize });
  }, 500);
  try {
    let size = 0;
    for await (const { bytes, path, offset } of texts) {
      stopIfAborted(signal);
      const bad = await trainer.count(bytes);
      if (bad >= 0) throw notUtf8(path, offset + bad);
      size += bytes.length;
    }
    if (size === 0) throw badInput('There is no text to learn from', { expected: 'files that are not empty' });
    const ids = new Map(first.map((token, id) => [token, id]));
    const byteIds = Int32Array.from(byteLetters, (letter) => ids.get(letter)!);
    const flat = await trainer.merge(first, byteIds, options.vocabSize, options.minFrequency);
    stopIfAborted(signal);
    return spelled(first, flat);
  } finally {
    clearInterval(watch);
    signal.removeEventListener('abort', stop);
  }
}

function spelled(first: readonly string[], flat: Int32Array): Bpe {
  const tokens = [...first];
  const merges = Array.from({ length: flat.length / 3 }, (_, i) => flat.subarray(3 * i, 3 * i + 3) as Merge);
  // A token that can be made in several ways was first made of older ones.
  for (const [left, right, merged] of merges.toSorted((a, b) => a[2] - b[2])) {
    if (merged >= first.length && left < merged && right < merged) tokens[merged] = tokens[left]! + tokens[right]!;
  }
  return { tokens, merges: merges.map(([left, right]) => [tokens[left]!, tokens[right]!]) };
}

type Merge = Int32Array & [left: number, right: number, merged: number];

function stopIfAborted(signal: AbortSignal): void {
  if (signal.aborted) throw new ConvertError('interrupted', 'Training was stopped', { hint: 'Nothing is kept of it: the same command begins anew.' });
} // prettier-ignore

const notUtf8 = (path: string, byte: number) =>
  badInput('The text is not UTF-8', {
    where: `${path}, byte ${byte}`,
    hint: `Convert it first: iconv -f LATIN1 -t UTF-8 ${path}`,
  });
