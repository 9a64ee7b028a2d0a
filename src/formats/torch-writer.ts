import { createHash } from 'node:crypto';
import { crc32 } from 'node:zlib';
import { badInput } from '../base/errors.js';
import { elementBytes } from './torch-state.js';
import { torchElementName } from './torch-values.js';
import { pickleStateDict } from './torch-pickle.js';
import type { Encoding } from './types.js';

export interface TorchTensorPlan {
  readonly name: string;
  readonly shape: readonly number[];
  /** plain, or opaque of whole bytes. */
  readonly encoding: Encoding;
  /** Another planned tensor of the same size whose storage this one shares (tied embeddings). */
  readonly tiedTo?: string;
}

/** Bytes with their place in the file. */
export interface Piece {
  readonly position: number;
  readonly bytes: Buffer;
}

export interface TorchLayout {
  /** Headers that are known before any weight is. */
  readonly pieces: readonly Piece[];
  /** Where each tensor's data goes; tied tensors share one place. */
  readonly offsets: ReadonlyMap<string, number>;
  /** Spans of data whose checksums `afterStorage` and `tail` need, in file order. */
  readonly storages: readonly { readonly position: number; readonly bytes: number }[];
  readonly size: number;
  /** The descriptor behind a storage's data, given the data's CRC-32. */
  readonly afterStorage: (index: number, crc: number) => Piece;
  /** The end of the file: serialization id and central directory. `crcs` in the order of `storages`. */
  readonly tail: (crcs: readonly number[]) => Piece[];
}

const alignment = 64;
const max32 = 0xffffffff;
/** Checksum and sizes follow the data, where there is any; names are UTF-8. */
const flagsOf = (entry: Entry): number => (entry.size > 0 ? 0x0808 : 0x0800);

interface Entry {
  readonly name: Buffer;
  readonly size: number;
  readonly header: number;
  readonly data: number;
  /** Known content; undefined for a storage. */
  readonly content?: Buffer;
}

const isWide = (entry: { size: number; header: number }): boolean => entry.size >= max32 || entry.header >= max32;
const descriptorBytes = (entry: Entry): number => (entry.size === 0 ? 0 : isWide(entry) ? 24 : 16);

/**
 * Lays out the zip file that torch.save would write for a dict of these tensors, byte for byte, except for its
 * serialization id. Data is aligned to 64 bytes; ZIP64 fields appear where 32 bits do not suffice.
 * @param stem the archive's inner folder: torch takes the file's name without its ending.
 */
export function layoutTorch(tensors: readonly TorchTensorPlan[], stem: string): TorchLayout {
  const keys = storageKeys(tensors);
  const pickle = pickleStateDict(
    tensors.map(({ name, shape, encoding }) => {
      const element = torchElementName(encoding);
      if (element === undefined) {
        throw badInput('PyTorch files cannot hold this element type', { where: `tensor ${JSON.stringify(name)}`, got: describeEncoding(encoding) }); // prettier-ignore
      }
      return { name, shape, element, key: keys.get(name)!, itemsize: elementBytes(encoding) };
    }),
  );
  const entries: Entry[] = [];
  let at = 0;
  const add = (name: string, size: number, content?: Buffer): Entry => {
    const entry = place(`${stem}/${name}`, size, at, content);
    entries.push(entry);
    at = entry.data + size + descriptorBytes(entry);
    return entry;
  };
  add('data.pkl', pickle.length, pickle);
  for (const [name, text] of [['.format_version', '1'], ['.storage_alignment', '64'], ['byteorder', 'little']] as const) {
    add(name, text.length, Buffer.from(text));
  } // prettier-ignore
  const offsets = new Map<string, number>();
  const storages: Entry[] = [];
  for (const tensor of tensors) {
    if (tensor.tiedTo !== undefined) continue;
    const bytes = tensor.shape.reduce((n, d) => n * d, 1) * elementBytes(tensor.encoding);
    const entry = add(`data/${keys.get(tensor.name)}`, bytes);
    offsets.set(tensor.name, entry.data);
    storages.push(entry);
  }
  for (const { name, tiedTo } of tensors) if (tiedTo !== undefined) offsets.set(name, offsets.get(tiedTo)!);
  add('version', 2, Buffer.from('3\n'));
  const id = add('.data/serialization_id', 40);
  const tailStart = at;
  const directorySize = entries.reduce((sum, entry) => sum + centralHeader(entry, 0).length, 0);
  return {
    pieces: entries.flatMap((entry) => {
      const header = { position: entry.header, bytes: localHeader(entry) };
      if (entry.content === undefined) return [header];
      const rest = Buffer.concat([entry.content, descriptor(entry, crc32(entry.content))]);
      return [header, { position: entry.data, bytes: rest }];
    }),
    offsets,
    storages: storages.map(({ data, size }) => ({ position: data, bytes: size })),
    size: tailStart + directorySize + 56 + 20 + 22,
    afterStorage: (index, crc) => {
      const storage = storages[index]!;
      return { position: storage.data + storage.size, bytes: descriptor(storage, crc) };
    },
    tail(crcs) {
      const digits = serializationId(entries, crcs);
      const crcOf = new Map<Entry, number>([[id, crc32(digits)], ...storages.map((s, i) => [s, crcs[i]!] as const)]);
      const crc = (entry: Entry): number => crcOf.get(entry) ?? crc32(entry.content!);
      const directory = Buffer.concat(entries.map((entry) => centralHeader(entry, crc(entry))));
      const end = endRecords(entries.length, directory.length, tailStart);
      return [
        { position: id.data, bytes: Buffer.concat([digits, descriptor(id, crc(id))]) },
        { position: tailStart, bytes: Buffer.concat([directory, end]) },
      ];
    },
  };
}

/** Storage keys in order of first use, as torch numbers them. */
function storageKeys(tensors: readonly TorchTensorPlan[]): Map<string, string> {
  const keys = new Map<string, string>();
  let next = 0;
  for (const { name, tiedTo } of tensors) {
    if (tiedTo === undefined) keys.set(name, `${next++}`);
    else if (keys.has(tiedTo)) keys.set(name, keys.get(tiedTo)!);
    else throw badInput('A tied tensor must be planned after the one that it shares', { where: `tensor ${name}` });
  }
  return keys;
}

const describeEncoding = (encoding: Encoding): string =>
  encoding.kind === 'opaque' ? encoding.name : encoding.kind === 'ggml' ? encoding.type : encoding.kind;

/** Fixes where an entry's header and data go: the extra field "FB" pads so that the data is aligned. */
function place(name: string, size: number, header: number, content?: Buffer): Entry {
  const bytes = Buffer.from(name);
  const unpadded = header + 30 + bytes.length + zip64Extra({ size, header }).length + 4;
  const data = Math.ceil(unpadded / alignment) * alignment;
  return { name: bytes, size, header, data, ...(content && { content }) };
}

function localHeader(entry: Entry): Buffer {
  const { name, header, data } = entry;
  const buffer = Buffer.alloc(data - header, 'Z');
  const wide = zip64Extra(entry);
  buffer.fill(0, 0, 30);
  buffer.writeUInt32LE(0x04034b50, 0);
  buffer.writeUInt16LE(flagsOf(entry), 6);
  buffer.writeUInt16LE(name.length, 26);
  const extra = 30 + name.length;
  buffer.writeUInt16LE(data - header - extra, 28);
  name.copy(buffer, 30);
  wide.copy(buffer, extra);
  buffer.write('FB', extra + wide.length, 'latin1');
  buffer.writeUInt16LE(data - header - extra - wide.length - 4, extra + wide.length + 2);
  return buffer;
}

/** Extra field 1: 64-bit sizes and offset, those of them that do not fit into 32 bits. */
function zip64Extra({ size, header }: { size: number; header: number }): Buffer {
  const values = [...(size >= max32 ? [size, size] : []), ...(header >= max32 ? [header] : [])];
  if (values.length === 0) return Buffer.alloc(0);
  const buffer = Buffer.alloc(4 + 8 * values.length);
  buffer.writeUInt16LE(1, 0);
  buffer.writeUInt16LE(8 * values.length, 2);
  values.forEach((value, i) => buffer.writeBigUInt64LE(BigInt(value), 4 + 8 * i));
  return buffer;
}

function descriptor(entry: Entry, crc: number): Buffer {
  const buffer = Buffer.alloc(descriptorBytes(entry));
  if (buffer.length === 0) return buffer;
  buffer.writeUInt32LE(0x08074b50, 0);
  buffer.writeUInt32LE(crc, 4);
  for (const i of [0, 1]) {
    if (isWide(entry)) buffer.writeBigUInt64LE(BigInt(entry.size), 8 + 8 * i);
    else buffer.writeUInt32LE(entry.size, 8 + 4 * i);
  }
  return buffer;
}

function centralHeader(entry: Entry, crc: number): Buffer {
  const { name, size, header } = entry;
  const extra = zip64Extra(entry);
  const buffer = Buffer.alloc(46);
  buffer.writeUInt32LE(0x02014b50, 0);
  buffer.writeUInt16LE(flagsOf(entry), 8);
  buffer.writeUInt32LE(crc, 16);
  buffer.writeUInt32LE(Math.min(size, max32), 20);
  buffer.writeUInt32LE(Math.min(size, max32), 24);
  buffer.writeUInt16LE(name.length, 28);
  buffer.writeUInt16LE(extra.length, 30);
  buffer.writeUInt32LE(Math.min(header, max32), 42);
  return Buffer.concat([buffer, name, extra]);
}

function endRecords(count: number, size: number, start: number): Buffer {
  const buffer = Buffer.alloc(56 + 20 + 22);
  buffer.writeUInt32LE(0x06064b50, 0);
  buffer.writeBigUInt64LE(44n, 4);
  buffer.writeUInt16LE(0x031e, 12);
  buffer.writeUInt16LE(45, 14);
  buffer.writeBigUInt64LE(BigInt(count), 24);
  buffer.writeBigUInt64LE(BigInt(count), 32);
  buffer.writeBigUInt64LE(BigInt(size), 40);
  buffer.writeBigUInt64LE(BigInt(start), 48);
  buffer.writeUInt32LE(0x07064b50, 56);
  buffer.writeBigUInt64LE(BigInt(start + size), 64);
  buffer.writeUInt32LE(1, 72);
  buffer.writeUInt32LE(0x06054b50, 76);
  buffer.writeUInt16LE(Math.min(count, 0xffff), 84);
  buffer.writeUInt16LE(Math.min(count, 0xffff), 86);
  buffer.writeUInt32LE(Math.min(size, max32), 88);
  buffer.writeUInt32LE(Math.min(start, max32), 92);
  return buffer;
}

/** 40 digits that differ when names or contents do. */
function serializationId(entries: readonly Entry[], crcs: readonly number[]): Buffer {
  const hash = createHash('sha256').update(crcs.join());
  for (const { name, size } of entries) hash.update(name).update(`\0${size}\0`);
  const digits = BigInt(`0x${hash.digest('hex')}`) % 10n ** 40n;
  return Buffer.from(digits.toString().padStart(40, '0'));
}
