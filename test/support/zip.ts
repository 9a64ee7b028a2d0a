import { crc32 } from 'node:zlib';

export interface ZipMember {
  name: string;
  data: Buffer;
  method?: number;
  flags?: number;
  /** What the local header says instead. */
  local?: { name?: string; size?: number; crc?: number; method?: number; flags?: number };
  /** What the central directory says instead. */
  central?: { size?: number; stored?: number; offset?: number; disk?: number };
}

/** A plain zip archive, or one that lies. */
export function zip(
  members: readonly ZipMember[],
  end: { count?: number; start?: number; comment?: string } = {},
): Buffer {
  const parts: Buffer[] = [];
  const directory: Buffer[] = [];
  let at = 0;
  for (const { name, data, method = 0, flags = 0, local = {}, central = {} } of members) {
    const crc = crc32(data);
    const header = Buffer.alloc(30);
    const localName = Buffer.from(local.name ?? name);
    header.writeUInt32LE(0x04034b50, 0);
    header.writeUInt16LE(local.flags ?? flags, 6);
    header.writeUInt16LE(local.method ?? method, 8);
    header.writeUInt32LE(local.crc ?? crc, 14);
    header.writeUInt32LE(local.size ?? data.length, 18);
    header.writeUInt32LE(local.size ?? data.length, 22);
    header.writeUInt16LE(localName.length, 26);
    const entry = Buffer.alloc(46);
    entry.writeUInt32LE(0x02014b50, 0);
    entry.writeUInt16LE(flags, 8);
    entry.writeUInt16LE(method, 10);
    entry.writeUInt32LE(crc, 16);
    entry.writeUInt32LE(central.stored ?? central.size ?? data.length, 20);
    entry.writeUInt32LE(central.size ?? data.length, 24);
    entry.writeUInt16LE(Buffer.byteLength(name), 28);
    entry.writeUInt16LE(central.disk ?? 0, 34);
    entry.writeUInt32LE(central.offset ?? at, 42);
    parts.push(header, localName, data);
    directory.push(entry, Buffer.from(name));
    at += 30 + localName.length + data.length;
  }
  const central = Buffer.concat(directory);
  const record = Buffer.alloc(22);
  record.writeUInt32LE(0x06054b50, 0);
  record.writeUInt16LE(end.count ?? members.length, 8);
  record.writeUInt16LE(end.count ?? members.length, 10);
  record.writeUInt32LE(central.length, 12);
  record.writeUInt32LE(end.start ?? at, 16);
  record.writeUInt16LE(end.comment?.length ?? 0, 20);
  return Buffer.concat([...parts, central, record, Buffer.from(end.comment ?? '')]);
}

/** A PyTorch file of this pickle and these storages. */
export const torchZip = (pickle: Buffer, storages: Record<string, Buffer> = {}, more: ZipMember[] = []): Buffer =>
  zip([
    { name: 'x/data.pkl', data: pickle },
    ...Object.entries(storages).map(([key, data]) => ({ name: `x/data/${key}`, data })),
    ...more,
  ]);
