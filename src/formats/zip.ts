import { badInput } from '../base/errors.js';
import type { ConvertError } from '../base/errors.js';
import { safeU64 } from './source.js';
import type { RandomAccess } from './source.js';

export interface ZipEntry {
  readonly name: string;
  /** Where the entry's data begins in the file, bytes. */
  readonly offset: number;
  readonly size: number;
}

export interface ZipFile {
  readonly entries: ReadonlyMap<string, ZipEntry>;
  /** The central directory as it stands: names, sizes and checksums of everything. */
  readonly directory: Buffer;
}

const signatures = { local: 0x04034b50, central: 0x02014b50, end: 0x06054b50, end64: 0x06064b50, locator: 0x07064b50 };
const [max16, max32] = [0xffff, 0xffffffff];
const maxDirectory = 256 * 2 ** 20;

/**
 * Lists the entries of a zip archive as PyTorch writes it: stored, not compressed. Local headers must agree with the
 * central directory, and entries may not overlap, so that no other reader can see other contents than we do.
 */
export function readZip(source: RandomAccess): ZipFile {
  const { path } = source;
  const end = findEnd(source);
  if (end.start + end.size !== end.limit) throw bad(path, 'the central directory is not where it should be', end.start);
  if (end.size > maxDirectory) throw bad(path, `a central directory of ${end.size} bytes`, end.start);
  const directory = source.read(end.start, end.size, 'central directory');
  const entries = new Map<string, ZipEntry>();
  const extents: { start: number; end: number; name: string }[] = [];
  let at = 0;
  for (let i = 0; i < end.count; i++) {
    const central = readCentral(directory, at, path, end.start);
    at = central.next;
    if (entries.has(central.name)) throw bad(path, `two entries named ${JSON.stringify(central.name)}`, central.header);
    const offset = checkLocal(source, central);
    entries.set(central.name, { name: central.name, offset, size: central.size });
    extents.push({ start: central.header, end: offset + central.size, name: central.name });
  }
  if (at !== directory.length) throw bad(path, 'bytes between the central directory and its end', end.start + at);
  let last = 0;
  for (const { start, end: stop, name } of extents.sort((a, b) => a.start - b.start || a.end - b.end)) {
    if (start < last || stop > end.start) throw bad(path, `entry ${JSON.stringify(name)} overlaps another`, start);
    last = stop;
  }
  return { entries, directory };
}

interface End {
  count: number;
  size: number;
  start: number;
  /** Where the end records begin. */
  limit: number;
}

function findEnd(source: RandomAccess): End {
  const { path, size } = source;
  const tailStart = Math.max(0, size - 22 - max16);
  const tail = source.read(tailStart, size - tailStart, 'end of the archive');
  for (let at = tail.length - 22; at >= 0; at--) {
    // The comment must reach to the very end, or two readers could disagree on where the archive ends.
    if (tail.readUInt32LE(at) !== signatures.end || at + 22 + tail.readUInt16LE(at + 20) !== tail.length) continue;
    const disks = tail.readUInt16LE(at + 4) | tail.readUInt16LE(at + 6);
    if (disks !== 0 && disks !== max16) throw bad(path, 'an archive of several volumes', tailStart + at);
    const end = {
      count: tail.readUInt16LE(at + 10),
      size: tail.readUInt32LE(at + 12),
      start: tail.readUInt32LE(at + 16),
      limit: tailStart + at,
    };
    const locator = at - 20;
    if (locator >= 0 && tail.readUInt32LE(locator) === signatures.locator) {
      return readEnd64(source, end, safeU64(tail, locator + 8), tailStart + locator);
    }
    if (end.count === max16 || end.size === max32 || end.start === max32) {
      throw bad(path, 'the ZIP64 end record is missing', tailStart + at);
    }
    return end;
  }
  throw badInput('The zip archive has no end record', {
    where: path,
    hint: 'The file is truncated: download or copy it again.',
  });
}

function readEnd64(source: RandomAccess, small: End, at: number, limit: number): End {
  if (at + 56 > limit) throw bad(source.path, 'the ZIP64 end record is out of place', limit);
  const record = source.read(at, 56, 'ZIP64 end record');
  if (record.readUInt32LE() !== signatures.end64) throw bad(source.path, 'no ZIP64 end record where it should be', at);
  const end = { count: safeU64(record, 32), size: safeU64(record, 40), start: safeU64(record, 48), limit: at };
  const agrees = (value: number, short: number, sentinel: number): boolean => short === sentinel || short === value;
  const same =
    agrees(end.count, small.count, max16) &&
    agrees(end.size, small.size, max32) &&
    agrees(end.start, small.start, max32);
  if (!same || safeU64(record, 24) !== end.count) throw bad(source.path, 'the two end records disagree', at);
  return end;
}

interface Central {
  name: string;
  flags: number;
  crc: number;
  size: number;
  /** Where the local header is. */
  header: number;
  next: number;
}

function readCentral(directory: Buffer, at: number, path: string, start: number): Central {
  const fail = (what: string): ConvertError => bad(path, what, start + at);
  if (at + 46 > directory.length || directory.readUInt32LE(at) !== signatures.central) {
    throw fail('the central directory has fewer entries than it says');
  }
  const [flags, method] = [directory.readUInt16LE(at + 8), directory.readUInt16LE(at + 10)];
  const nameLength = directory.readUInt16LE(at + 28);
  const extraLength = directory.readUInt16LE(at + 30);
  const extraStart = at + 46 + nameLength;
  const next = extraStart + extraLength + directory.readUInt16LE(at + 32);
  if (next > directory.length) throw fail('a central directory entry runs over its end');
  const name = directory.toString('utf8', at + 46, extraStart);
  requireStored(flags, method, name, path);
  const compressed = directory.readUInt32LE(at + 20);
  const short = { size: directory.readUInt32LE(at + 24), header: directory.readUInt32LE(at + 42) };
  const wide = zip64(directory.subarray(extraStart, extraStart + extraLength), [short.size, compressed, short.header]);
  if (wide === undefined) throw fail(`entry ${JSON.stringify(name)} has a damaged ZIP64 field`);
  const [size, stored, header] = wide as [number, number, number];
  if (size !== stored) throw fail(`entry ${JSON.stringify(name)} is stored in another size than its own`);
  if (directory.readUInt16LE(at + 34) !== 0) throw fail('an archive of several volumes');
  return { name, flags, crc: directory.readUInt32LE(at + 16), size, header, next };
}

/** Replaces 32-bit sentinels by the 64-bit values of extra field 1, in order; undefined when one is missing. */
function zip64(extra: Buffer, fields: readonly number[]): number[] | undefined {
  if (!fields.includes(max32)) return [...fields];
  for (let at = 0; at + 4 <= extra.length;) {
    const [id, length] = [extra.readUInt16LE(at), extra.readUInt16LE(at + 2)];
    if (at + 4 + length > extra.length) return undefined;
    if (id === 1) {
      let value = at + 4;
      const result: number[] = [];
      for (const field of fields) {
        if (field !== max32) result.push(field);
        else if (value + 8 > at + 4 + length) return undefined;
        else [result[result.length], value] = [safeU64(extra, value), value + 8];
      }
      return result;
    }
    at += 4 + length;
  }
  return undefined;
}

function requireStored(flags: number, method: number, name: string, path: string): void {
  if ((flags & 0x2041) !== 0) {
    throw badInput('An entry of the archive is encrypted', { where: `${path}, ${JSON.stringify(name)}` });
  }
  if (method === 0) return;
  throw badInput('An entry of the archive is compressed, which PyTorch never does', {
    where: `${path}, ${JSON.stringify(name)}`,
    expected: 'method 0 (stored)',
    got: `method ${method}`,
    hint: 'If it is an archive of model files, unpack it first.',
  });
}

/** Checks the local header against the central directory; returns where the data begins. */
function checkLocal(source: RandomAccess, { name, flags, crc, size, header }: Central): number {
  const { path } = source;
  const fail = (what: string): ConvertError => bad(path, `entry ${JSON.stringify(name)}: ${what}`, header);
  const nameBytes = Buffer.from(name);
  const local = source.read(header, Math.min(source.size - header, 30 + nameBytes.length), 'local header');
  if (local.length < 30 || local.readUInt32LE() !== signatures.local) throw fail('no local header');
  requireStored(local.readUInt16LE(6), local.readUInt16LE(8), name, path);
  const [nameLength, extraLength] = [local.readUInt16LE(26), local.readUInt16LE(28)];
  if (nameLength !== nameBytes.length || !local.subarray(30).equals(nameBytes)) {
    throw fail('the local header has another name');
  }
  if (local.readUInt16LE(6) !== flags) throw fail('the local header has other flags');
  const [localCrc, stored, localSize] = [local.readUInt32LE(14), local.readUInt32LE(18), local.readUInt32LE(22)];
  const extra =
    extraLength === 0 ? Buffer.alloc(0) : source.read(header + 30 + nameLength, extraLength, 'local header');
  // With bit 3 the sizes may follow the data; zeros stand in the header then.
  const deferred = (flags & 8) !== 0 && localCrc === 0 && stored === 0 && localSize === 0;
  const wide = zip64(extra, [localSize, stored]);
  if (!deferred && (wide?.[0] !== size || wide[1] !== size || localCrc !== crc)) {
    throw fail('local header and central directory disagree on size or checksum');
  }
  const offset = header + 30 + nameLength + extraLength;
  if (offset + size > source.size) throw fail('the data runs over the end of the file');
  return offset;
}

const bad = (path: string, what: string, at: number): ConvertError =>
  badInput(`Bad zip archive: ${what}`, {
    where: `${path}, byte ${at}`,
    hint: 'The file is damaged or was made to deceive: get it again from its source.',
  });
