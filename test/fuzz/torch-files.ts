import type { Random } from '../../src/base/rng.js';
import { zip, type ZipMember } from '../support/zip.js';
import { edge, oddTexts, pick, shuffled, u64 } from './bytes.js';
import { opcodes, reshapePickle } from './pickle.js';

const number = (random: Random): number => Number(BigInt.asUintN(32, edge(random)));
const cache = new WeakMap<Buffer, unknown>();
function once<T>(file: Buffer, make: () => T): T {
  if (!cache.has(file)) cache.set(file, make());
  return cache.get(file) as T;
}

/** The members of an archive that torch.save wrote, by its local headers; none when they are damaged. */
function members(file: Buffer): ZipMember[] {
  const out: ZipMember[] = [];
  for (let at = 0; at + 30 <= file.length && file.readUInt32LE(at) === 0x04034b50;) {
    const [size, name, extra] = [file.readUInt32LE(at + 22), file.readUInt16LE(at + 26), file.readUInt16LE(at + 28)];
    const start = at + 30 + name + extra;
    out.push({ name: file.toString('utf8', at + 30, at + 30 + name), data: file.subarray(start, start + size) });
    at = start + size;
    // A data descriptor may follow.
    if (at + 4 <= file.length && file.readUInt32LE(at) === 0x08074b50) at += file.length > at + 20 && file.readUInt32LE(at + 16) === 0x04034b50 ? 16 : 24; // prettier-ignore
  }
  return out;
}

/** Mostly another pickle in a sound archive; now and then an archive that lies. */
export function reshapeZip(random: Random, file: Buffer): Buffer {
  const all = once(file, () => members(file));
  const pickle = all.findIndex(({ name }) => name.endsWith('data.pkl'));
  if (pickle < 0) return file;
  if (random.below(4) > 0) {
    const next = [...all];
    next[pickle] = { ...all[pickle]!, data: reshapePickle(random, all[pickle]!.data) };
    return zip(next);
  }
  const end = random.below(8) === 0 ? pick(random, [{ count: number(random) & 0xffff }, { start: number(random) }, { comment: 'PK\x05\x06'.repeat(6) }]) : {}; // prettier-ignore
  return zip(shuffled(random, all, (member) => lie(random, member)), end); // prettier-ignore
}

function lie(random: Random, member: ZipMember): ZipMember {
  switch (random.below(8)) {
    case 0:
      return { ...member, name: random.below(2) ? pick(random, oddTexts) : `x/data/${random.below(4)}` };
    case 1:
      return { ...member, method: pick(random, [8, 9, 99]) };
    case 2:
      return { ...member, flags: pick(random, [1, 8, 64, 0x800, 0x2000]) };
    case 3:
      return { ...member, local: { size: number(random), ...(random.below(2) && { name: pick(random, oddTexts) }) } };
    case 4:
      return { ...member, central: { size: number(random) } };
    case 5:
      return { ...member, central: { offset: number(random), disk: random.below(2) } };
    case 6:
      return { ...member, central: { stored: number(random) } };
    default:
      return { ...member, data: Buffer.alloc(random.below(2 * member.data.length + 2)) };
  }
}

/** The five pickles of a legacy stream, and the storages behind them. */
export function reshapeStream(random: Random, file: Buffer): Buffer {
  const parts = once(file, () => {
    const pickles: Buffer[] = [];
    let at = 0;
    for (let i = 0; i < 5; i++) {
      const bytes = Buffer.concat(opcodes(file, at));
      pickles.push(bytes);
      at += bytes.length;
    }
    return { pickles, data: file.subarray(at) };
  });
  const pickles = [...parts.pickles];
  const which = random.below(8) === 0 ? random.below(5) : 3 + random.below(2);
  pickles[which] = reshapePickle(random, pickles[which]!);
  const data = random.below(8) === 0 ? Buffer.concat([u64(edge(random)), parts.data.subarray(8)]) : parts.data;
  return Buffer.concat([...pickles, data]);
}

interface Member {
  readonly name: string;
  readonly data: Buffer;
}

export function tarMembers(file: Buffer): Member[] {
  const out: Member[] = [];
  for (let at = 0; at + 512 <= file.length && file[at] !== 0;) {
    const size = Number.parseInt(file.toString('latin1', at + 124, at + 135), 8) || 0;
    const name = file.toString('latin1', at, at + 100).replace(/\0.*$/s, '');
    out.push({ name, data: file.subarray(at + 512, at + 512 + size) });
    at += 512 + Math.ceil(size / 512) * 512;
  }
  return out;
}

export function tar(all: readonly Member[], size?: bigint): Buffer {
  const parts = all.flatMap(({ name, data }) => {
    const header = Buffer.alloc(512);
    header.write(name.slice(0, 99), 0, 'latin1');
    header.write((size ?? BigInt(data.length)).toString(8).padStart(11, '0').slice(0, 12), 124, 'latin1');
    header.write('ustar', 257, 'latin1');
    header.fill(0x20, 148, 156);
    header[156] = 0x30;
    const sum = header.reduce((a, b) => a + b, 0);
    header.write(sum.toString(8).padStart(6, '0'), 148, 'latin1');
    header[154] = 0;
    return [header, data, Buffer.alloc((512 - (data.length % 512)) % 512)];
  });
  return Buffer.concat([...parts, Buffer.alloc(1024)]);
}

/** A pickle of one member, a member itself, or a size that is not true; the checksums follow. */
export function reshapeTar(random: Random, file: Buffer): Buffer {
  const all = once(file, () => tarMembers(file));
  const change = (member: Member): Member => {
    if (random.below(10) === 0)
      return { ...member, name: pick(random, [...oddTexts, 'pickle', 'tensors', 'storages']) };
    return { ...member, data: within(random, member.data) };
  };
  return tar(shuffled(random, all, change), random.below(30) === 0 ? edge(random) : undefined);
}

/** Pickles and raw numbers follow each other: one pickle, or the numbers behind it. */
function within(random: Random, data: Buffer): Buffer {
  const first = Buffer.concat(opcodes(data));
  const rest = data.subarray(first.length);
  if (rest.length === 0 || random.below(3) === 0) return Buffer.concat([reshapePickle(random, first), rest]);
  if (random.below(2) === 0) return Buffer.concat([first, within(random, rest)]);
  const at = random.below(rest.length);
  const bytes = Buffer.from(rest);
  u64(random.below(2) ? random.below(20) : edge(random)).copy(bytes, at, 0, Math.min(8, bytes.length - at));
  return Buffer.concat([first, bytes]);
}
