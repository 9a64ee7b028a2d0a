import { badInput } from '../base/errors.js';
import { fieldsOf, Protobuf, text, type Field } from './protobuf.js';

/** Kinds of pieces, in SentencePiece's and llama.cpp's numbers. */
export const pieceKinds = { normal: 1, unknown: 2, control: 3, userDefined: 4, unused: 5, byte: 6 } as const;

export interface Piece {
  readonly text: string;
  readonly score: number;
  /** One of `pieceKinds`. */
  readonly kind: number;
}

/** A model of SentencePiece (`tokenizer.model`, sentencepiece_model.proto), with the proto's defaults. */
export interface SentencePieceModel {
  readonly kind: 'unigram' | 'bpe';
  readonly pieces: readonly Piece[];
  /** Ids; below 0: there is none. */
  readonly unknown: number;
  readonly bos: number;
  readonly eos: number;
  readonly padding: number;
  readonly byteFallback: boolean;
  /** Normalization, compiled to a trie; empty: none. */
  readonly charsmap: Buffer;
  readonly addDummyPrefix: boolean;
  readonly removeExtraWhitespaces: boolean;
}

/** Vocabularies of 256,000 pieces take 5 MB. */
const maxBytes = 64 * 2 ** 20;

/**
 * Reads the bytes of a `tokenizer.model`; `path` is what errors name.
 * Errors (kind 'input'): no such message, models of words or characters, spaces that are not written as U+2581 in front
 * of words.
 */
export function parseSentencePiece(bytes: Buffer, path: string): SentencePieceModel {
  const size = bytes.length;
  if (size > maxBytes) throw badInput('The SentencePiece model is too large', { where: path, got: `${size} bytes`, expected: `at most ${maxBytes}` }); // prettier-ignore
  const proto = new Protobuf(
    { path, size, read: (at, count) => bytes.subarray(at, at + count) },
    'SentencePiece model',
  );
  const pieces: Piece[] = [];
  const [words, reserved] = [new Set<string>(), new Set<string>()];
  const trainer = { kind: 1, suffix: 0, bytes: 0, unknown: 0, bos: 1, eos: 2, padding: -1 };
  const normalizer = { prefix: 1, merge: 1, escape: 1 };
  let charsmap: Buffer = Buffer.alloc(0);
  for (const field of fieldsOf(proto, 0, size)) {
    if (field.number === 1) {
      const piece = readPiece(proto, message(proto, field));
      pieces.push(piece);
      // Names of their own have, as in SentencePiece itself, what stands for text and what does not.
      const names = [pieceKinds.normal, pieceKinds.userDefined, pieceKinds.unused].some((k) => k === piece.kind) ? words : reserved; // prettier-ignore
      if (names.has(piece.text)) throw proto.fail(`a piece that is there twice, ${JSON.stringify(piece.text)}`, field.start); // prettier-ignore
      names.add(piece.text);
    } else if (field.number === 2) readIntegers(proto, message(proto, field), trainerFields, trainer);
    else if (field.number === 3) {
      readIntegers(proto, message(proto, field), normalizerFields, normalizer);
      for (const part of fieldsOf(proto, field.start, field.end))
        if (part.number === 2) charsmap = Buffer.from(proto.bytes(message(proto, part)));
    }
  }
  const fail = (what: string, got: string, expected: string): Error => badInput(`This SentencePiece model is not read: ${what}`, { where: path, got, expected }); // prettier-ignore
  if (pieces.length === 0) throw fail('it has no pieces', 'none', 'a tokenizer.model of SentencePiece');
  if (trainer.kind !== 1 && trainer.kind !== 2) throw fail('its kind', String(trainer.kind), '1 (Unigram) or 2 (BPE)');
  if (trainer.suffix !== 0 || normalizer.escape === 0) throw fail('its spaces', 'spaces behind words, or as they are', 'U+2581 in front of words'); // prettier-ignore
  if (trainer.unknown < 0 || trainer.unknown >= pieces.length)
    throw fail('the id of its unknown piece', String(trainer.unknown), `0 to ${pieces.length - 1}`);
  const { unknown, bos, eos, padding } = trainer;
  return {
    kind: trainer.kind === 1 ? 'unigram' : 'bpe',
    pieces,
    ...{ unknown, bos, eos, padding, charsmap },
    byteFallback: trainer.bytes !== 0,
    addDummyPrefix: normalizer.prefix !== 0,
    removeExtraWhitespaces: normalizer.merge !== 0,
  };
}

const trainerFields: Readonly<Record<number, string>> = { 3: 'kind', 24: 'suffix', 35: 'bytes', 40: 'unknown', 41: 'bos', 42: 'eos', 43: 'padding' }; // prettier-ignore
const normalizerFields: Readonly<Record<number, string>> = { 3: 'prefix', 4: 'merge', 5: 'escape' };

function message(proto: Protobuf, field: Field): Field {
  if (field.wire !== 2) throw proto.fail('a number where a message should be', field.start);
  return field;
}

function readIntegers(
  proto: Protobuf,
  { start, end }: Field,
  names: Readonly<Record<number, string>>,
  into: Record<string, number>,
): void {
  for (const { number, wire, value, start: at } of fieldsOf(proto, start, end)) {
    const name = names[number];
    if (name === undefined) continue;
    if (wire !== 0) throw proto.fail('a message where a number should be', at);
    into[name] = Number(BigInt.asIntN(32, value));
  }
}

function readPiece(proto: Protobuf, { start, end }: Field): Piece {
  let piece: Piece = { text: '', score: 0, kind: pieceKinds.normal };
  for (const field of fieldsOf(proto, start, end)) {
    if (field.number === 1) piece = { ...piece, text: text(proto, field) };
    else if (field.number === 2 && field.wire === 5) piece = { ...piece, score: proto.bytes(field).readFloatLE() };
    else if (field.number === 3 && field.wire === 0) piece = { ...piece, kind: Number(field.value) };
  }
  if (!Number.isFinite(piece.score)) throw proto.fail(`a piece with the score ${piece.score}`, start);
  if (piece.kind < pieceKinds.normal || piece.kind > pieceKinds.byte) throw proto.fail(`a piece of kind ${piece.kind}`, start); // prettier-ignore
  return piece;
}
