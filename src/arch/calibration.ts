import { createHash } from 'node:crypto';
import { readdir } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { join } from 'node:path';
import { badInput, badUsage } from '../base/errors.js';
import { Random } from '../base/rng.js';
import type { JobEnv } from '../backend/env.js';
import { dropoutEncoder, type Encoder } from '../tokenizer/dropout.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import type { OpenModel } from './open.js';
import { sampleTokens } from './sample.js';
import { openSources, type Piece, type TextSource } from './text-sources.js';

export interface CalibrationOptions {
  /**
   * Text files (.txt: one document; .jsonl: {"text"} a line), the small set that comes with the tool, or the model;
   * `self` among files: the model writes what they do not hold; `continue`: it goes on from pieces of them.
   */
  readonly source: readonly string[] | 'default' | 'self';
  readonly samples: number;
  readonly seqLen: number;
  readonly seed: number;
  /** Chance that a merge of the tokenizer is left out (BPE-dropout): other spellings of the same words. */
  readonly bpeDropout?: number;
}

/** Token windows for calibration, all of one length and without padding. */
export interface CalibrationSet {
  /** [n, seqLen], row by row. */
  readonly tokens: Int32Array;
  readonly n: number;
  readonly seqLen: number;
  /** SHA-256 (hex) over shape and tokens. */
  readonly hash: string;
  /** `128 x 512 tokens: a.txt 64, b.txt 64`. */
  readonly description: string;
  /** What was not as asked, one sentence each; shown to the user. */
  readonly notices: readonly string[];
}

/** Folder of the texts that come with the tool; the same from src/ and from dist/. */
export const defaultCalibrationFolder = fileURLToPath(new URL('../../calibration', import.meta.url));

/**
 * Token windows as asked: windows are spread evenly over the sources (files; kinds within a .jsonl file), and over the
 * length of each. A source that is too short gives what it has and leaves the rest to the others; when all together
 * are too short there are fewer windows, and a notice says so. Each window starts as the tokenizer starts a text
 * (BOS where it adds one).
 * Errors: files that do not exist, hold no text, or are no valid .jsonl; a length beyond the model's context; a tokenizer
 * of another model.
 */
export async function calibrationTokens(
  open: OpenModel,
  options: CalibrationOptions,
  env: JobEnv,
): Promise<CalibrationSet> {
  const { source, samples, seqLen, seed, bpeDropout = 0 } = options;
  for (const [name, value] of [
    ['--samples', samples],
    ['--seq-len', seqLen],
  ] as const) {
    if (!Number.isSafeInteger(value) || value < 1) throw badUsage(`${name} must be a positive whole number`, { got: String(value) }); // prettier-ignore
  }
  if (seqLen > open.model.context) {
    throw badUsage('--seq-len is longer than the context that the model was made for', {
      got: String(seqLen),
      expected: `at most ${open.model.context}`,
    });
  }
  const given = typeof source === 'string' ? [source] : source;
  const [self, goesOn] = [given.includes('self'), given.includes('continue')];
  const files = source === 'default' ? await defaultFiles() : given.filter((path) => path !== 'self' && path !== 'continue'); // prettier-ignore
  if (self && goesOn) throw badUsage('The model writes either from BOS on or from pieces of the files', { got: '--calibration self and continue' }); // prettier-ignore
  if (files.length === 0) {
    if (!self) throw badUsage('No calibration file given', { hint: 'Name one: --calibration text.txt' });
    if (bpeDropout > 0) throw badUsage('--bpe-dropout respells text from files', { got: '--calibration self' });
    return finish([await written(open, samples, options, env)], seqLen, samples, []);
  }
  const texts = await openSources(files);
  const packer = await Packer.make(await open.tokenizer(), seqLen, seed, bpeDropout);
  const { parts, rest } = await gather(texts, packer, samples);
  parts.forEach(({ windows }) => windows.forEach((window) => requireIds(window, open)));
  const total = parts.reduce((sum, { windows }) => sum + windows.length, 0);
  if ((self || goesOn) && total < samples) {
    const missing = samples - total;
    const prompts = goesOn && total > 0 ? packer.pieces(parts.flatMap(({ windows }) => windows), missing, seed) : undefined; // prettier-ignore
    return finish([...parts, await written(open, missing, options, env, prompts)], seqLen, samples, []);
  }
  if (total === 0) {
    requireIds(rest, open);
    return shorter(rest, parts, samples, seqLen);
  }
  const notices =
    total < samples
      ? [
          `The calibration text holds ${total} windows of ${seqLen} tokens (${total * seqLen} tokens in all), ${samples} were asked for: ` +
            `going on with ${total}. More text (--calibration file.txt), or text from the model itself (--calibration self), gives a better result.`,
        ]
      : [];
  return finish(parts, seqLen, total, notices);
}

/** Text from the model itself, which goes on from `prompts` where they are given. */
async function written(
  open: OpenModel,
  samples: number,
  { seqLen, seed }: CalibrationOptions,
  env: JobEnv,
  prompts?: readonly Int32Array[],
): Promise<Share> {
  const tokens = await sampleTokens(open, { samples, seqLen, seed, ...(prompts && { prompts }) }, env);
  return { name: `the model itself (${prompts ? 'continued, ' : ''}seed ${seed})`, windows: rowsOf(tokens, seqLen) };
}

/** Errors: input, an id without a row in the embedding. A GPU would read what lies behind it. */
function requireIds(tokens: Int32Array, { model, checkpoint }: OpenModel): void {
  const odd = tokens.find((id) => id >= model.vocab);
  if (odd === undefined) return;
  throw badInput('The tokenizer makes a token that the model does not have', {
    where: checkpoint.path,
    got: `id ${odd}`,
    expected: `0 to ${model.vocab - 1}`,
    hint: 'The tokenizer files belong to another model.',
  });
}

async function defaultFiles(): Promise<string[]> {
  const names = (await readdir(defaultCalibrationFolder)).filter((name) => name.endsWith('.jsonl')).sort();
  return names.map((name) => join(defaultCalibrationFolder, name));
}

const rowsOf = (tokens: Int32Array, seqLen: number): Int32Array[] =>
  Array.from({ length: tokens.length / seqLen }, (_, i) => tokens.subarray(i * seqLen, (i + 1) * seqLen));

interface Share {
  readonly name: string;
  readonly windows: readonly Int32Array[];
}

/** At most `samples` windows, and the tokens at the end that fill none. */
async function gather(
  texts: readonly TextSource[],
  packer: Packer,
  samples: number,
): Promise<{ parts: readonly Share[]; rest: Int32Array }> {
  // A source that cannot fill its share is `dry`; what it misses is spread over the others, again and again.
  const dry = new Map<TextSource, { windows: readonly Int32Array[]; rest: Int32Array }>();
  let shares = new Map<TextSource, readonly Int32Array[]>();
  for (;;) {
    const missing = samples - [...dry.values()].reduce((sum, { windows }) => sum + windows.length, 0);
    const wet = texts.filter((text) => !dry.has(text));
    const before = dry.size;
    shares = new Map();
    for (const [i, text] of wet.entries()) {
      const wanted = Math.floor(missing / wet.length) + (i < missing % wet.length ? 1 : 0);
      const windows = await packer.spread(text, wanted);
      if (windows) shares.set(text, windows);
      else {
        const packed = await packer.packAll(text);
        if (packed.windows.length < wanted) dry.set(text, packed);
        else shares.set(text, evenly(packed.windows, wanted));
      }
    }
    if (dry.size === before) break;
  }
  const parts: Share[] = texts.map((text) => ({
    name: text.name,
    windows: shares.get(text) ?? dry.get(text)?.windows ?? [],
  }));
  const had = parts.reduce((sum, { windows }) => sum + windows.length, 0);
  if (had >= samples) return { parts, rest: new Int32Array() };
  const ends = packer.packTails([...dry.values()].map(({ rest }) => rest));
  if (ends.windows.length > 0) parts.push({ name: 'ends of the above', windows: ends.windows.slice(0, samples - had) });
  return { parts, rest: ends.rest };
}

/** Less text than one window: one shorter window. */
function shorter(rest: Int32Array, parts: readonly Share[], samples: number, seqLen: number): CalibrationSet {
  if (rest.length === 0) {
    throw badInput('The calibration files hold no text', { where: parts.map(({ name }) => name).join(', ') });
  }
  const notice =
    `The calibration text holds only ${rest.length} tokens, ${samples} x ${seqLen} were asked for: ` +
    `going on with one window of ${rest.length}. Expect a poor result; add text with --calibration.`;
  return finish([{ name: parts.map(({ name }) => name).join(' + '), windows: [rest] }], rest.length, 1, [notice]);
}

/** `hash` of a set: SHA-256 (hex) over shape and tokens. */
export const hashOfTokens = ({ buffer, byteOffset, byteLength }: Int32Array, n: number, seqLen: number): string =>
  createHash('sha256').update(`${n} x ${seqLen}\n`).update(new Uint8Array(buffer, byteOffset, byteLength)).digest('hex'); // prettier-ignore

/** Windows of the sources in turn, each as often as its share, so that any part of the set is mixed as the whole is. */
function finish(parts: readonly Share[], seqLen: number, n: number, notices: readonly string[]): CalibrationSet {
  const tokens = new Int32Array(n * seqLen);
  const order = parts.flatMap(({ windows }) =>
    windows.map((window, i) => ({ window, at: (i + 0.5) / windows.length })),
  );
  order.sort((a, b) => a.at - b.at); // stable: at one place in the order of the sources
  order.forEach(({ window }, row) => tokens.set(window, seqLen * row));
  const hash = hashOfTokens(tokens, n, seqLen);
  const used = parts.filter(({ windows }) => windows.length > 0);
  const from = used.map(({ name, windows }) => `${name} ${windows.length}`).join(', ');
  return { tokens, n, seqLen, hash, description: `${n} x ${seqLen} tokens: ${from}`, notices };
}

const evenly = <T>(items: readonly T[], n: number): T[] =>
  Array.from({ length: n }, (_, i) => items[Math.floor((i * items.length) / n)]!);

/** Cuts text into windows of tokens. */
class Packer {
  /** What the tokenizer puts before every text (BOS), after every text (EOS). */
  readonly #lead: readonly number[];
  readonly #phase: number;

  private constructor(
    readonly encoder: Encoder,
    readonly seqLen: number,
    seed: number,
    lead: readonly number[],
  ) {
    this.#lead = lead;
    // Other seeds begin elsewhere within the first half of each stretch.
    this.#phase = seed === 0 ? 0 : (Math.imul(seed, 0x9e3779b1) >>> 0) / 2 ** 33;
  }

  static async make(tokenizer: Tokenizer, seqLen: number, seed: number, bpeDropout: number): Promise<Packer> {
    const plain = await tokenizer.encode('a');
    const special = await tokenizer.encode('a', { special: true });
    const at = special.findIndex((_, i) => plain.every((id, j) => special[i + j] === id));
    const encoder = bpeDropout > 0 ? await dropoutEncoder(tokenizer, bpeDropout, seed) : tokenizer;
    return new Packer(encoder, seqLen, seed, at > 0 ? [...special.subarray(0, at)] : []);
  }

  /** `n` windows, one at the start of each of n equal stretches; undefined when a stretch is too short for one. */
  async spread(text: TextSource, n: number): Promise<Int32Array[] | undefined> {
    const windows: Int32Array[] = [];
    for (let i = 0; i < n; i++) {
      const tokens = await this.#fill(text.from((i + this.#phase) / n, (i + 1) / n));
      if (tokens.length < this.seqLen) return undefined;
      windows.push(tokens);
    }
    return windows;
  }

  /** All of a (short) source, cut into windows one after another, and what is left over. */
  async packAll(text: TextSource): Promise<{ windows: Int32Array[]; rest: Int32Array }> {
    return this.#cut(await this.#encode(text.from(0, 1), Infinity));
  }

  /** `n` pieces of windows, an eighth as long, from random places of as many different ones as there are. */
  pieces(windows: readonly Int32Array[], n: number, seed: number): Int32Array[] {
    const random = new Random(seed, 2);
    const length = Math.max(this.#lead.length + 1, Math.floor(this.seqLen / 8));
    return Array.from({ length: n }, (_, i) => {
      const window = windows[Math.floor((i * windows.length) / n)]!;
      const at = random.below(this.seqLen - length + 1);
      const piece = window.slice(at, at + length);
      piece.set(this.#lead);
      return piece;
    });
  }

  packTails(tails: readonly Int32Array[]): { windows: Int32Array[]; rest: Int32Array } {
    return this.#cut(tails.flatMap((tail) => [...tail]));
  }

  async #fill(pieces: Iterable<Piece>): Promise<Int32Array> {
    const { windows, rest } = this.#cut(await this.#encode(pieces, this.seqLen));
    return windows[0] ?? rest;
  }

  /** Documents begin with the lead; the continuation of one does not. */
  async #encode(pieces: Iterable<Piece>, enough: number): Promise<number[]> {
    const ids: number[] = [];
    for (const { text, begins } of pieces) {
      if (begins) ids.push(...this.#lead);
      for (const id of await this.encoder.encode(text)) ids.push(id);
      if (ids.length >= enough) break;
    }
    return ids;
  }

  /** Windows one after another, each with the lead in front where the text does not bring it. */
  #cut(ids: readonly number[]): { windows: Int32Array[]; rest: Int32Array } {
    const windows: Int32Array[] = [];
    let at = 0;
    for (;;) {
      const opened = this.#lead.every((id, i) => ids[at + i] === id);
      const lead = opened || this.#lead.length >= this.seqLen ? [] : this.#lead;
      const end = at + this.seqLen - lead.length;
      if (end > ids.length) return { windows, rest: Int32Array.from(ids.slice(at)) };
      windows.push(Int32Array.from([...lead, ...ids.slice(at, end)]));
      at = end;
    }
  }
}
