import { badInput } from '../base/errors.js';
import { Cursor } from './cursor.js';
import { unpickle } from './pickle.js';
import { PyGlobal, PyTuple } from './pickle-values.js';
import type { PyValue, RefusedGlobal } from './pickle-values.js';
import { slice } from './source.js';
import type { RandomAccess } from './source.js';
import { streamMagic, tarNames, tarText, torchContainer } from './torch-magic.js';
import { elementBytes, maxPickle } from './torch-state.js';
import type { StoredAt, TorchContents } from './torch-state.js';
import { describe, storageElement, torchAllows, torchConstruct, torchPersistent, TorchStorage, TorchTensor } from './torch-values.js'; // prettier-ignore

/**
 * Legacy stream, of torch.save(..., _use_new_zipfile_serialization=False) and everything before PyTorch 1.6: pickles of
 * the magic number, 1001, system info, the object and the list of storage keys; then the storages in the order of the
 * keys, each as a 64-bit count of elements and the data.
 */
export function readStream(source: RandomAccess, refused: RefusedGlobal[]): TorchContents {
  const { path } = source;
  const classes = new Map<string, string>();
  const remember = (id: PyValue): PyValue => {
    const storage = torchPersistent(id, path);
    const known = classes.get(storage.key);
    if (known !== undefined && known !== storage.className) {
      throw badInput('One storage with two element types', { where: path, got: `${known} and ${storage.className}` });
    }
    classes.set(storage.key, storage.className);
    return storage;
  };
  const cursor = new Cursor(source, 'pickle', 0);
  const next = (persistent = remember): PyValue => {
    const limited = new Cursor(source, 'pickle', cursor.position, Math.min(source.size, cursor.position + maxPickle));
    const value = unpickle(limited, { allows: torchAllows, construct: torchConstruct, persistent, refused });
    cursor.position = limited.position;
    return value;
  };
  if (torchContainer(source) !== 'stream' || next() !== streamMagic) {
    const got = source.read(0, Math.min(16, source.size), 'magic').toString('hex');
    throw badInput('Not a PyTorch file', { where: `${path}, byte 0`, got });
  }
  const version = next();
  if (version !== 1001) {
    throw badInput('Unknown version of the legacy format', { where: path, expected: '1001', got: describe(version) });
  }
  const info = next();
  if (info instanceof Map && info.get('little_endian') === false) {
    throw badInput('The file was saved on a big-endian machine', { where: path });
  }
  const root = next();
  const keys = next();
  if (!Array.isArray(keys)) throw badInput('The list of storages is missing', { where: cursor.where() });
  const head = source.read(0, cursor.position, 'header');
  const storages = new Map<string, StoredAt>();
  for (const key of keys) {
    const className = typeof key === 'string' ? classes.get(key) : undefined;
    const encoding = className === undefined ? undefined : storageElement(className);
    if (typeof key !== 'string' || encoding === undefined) {
      // Its element type, and so its size, is unknown: what follows cannot be found.
      const got = className === undefined ? `key ${describe(key)}, which nothing uses` : className;
      throw badInput('A storage of unknown element type', { where: cursor.where(), got });
    }
    if (storages.has(key)) throw badInput('A storage is listed twice', { where: cursor.where(), got: describe(key) });
    storages.set(key, readStored(cursor, elementBytes(encoding)));
  }
  return { root, storages, headers: [head] };
}

function readStored(cursor: Cursor, size: number): StoredAt {
  const bytes = cursor.u64() * size;
  const offset = cursor.position;
  if (offset + bytes > cursor.end) {
    throw badInput('A storage runs over the end of the file', {
      where: cursor.where(offset),
      expected: `${bytes} bytes`,
      got: `${cursor.end - offset} bytes`,
      hint: 'The file is truncated: download or copy it again.',
    });
  }
  cursor.position = offset + bytes;
  return { offset, bytes };
}

function tarMembers(source: RandomAccess): Map<string, { start: number; size: number }> {
  const members = new Map<string, { start: number; size: number }>();
  let at = 0;
  while (at + 512 <= source.size) {
    const header = source.read(at, 512, 'tar header');
    if (header.every((byte) => byte === 0)) break;
    const name = tarText(header.subarray(0, 100));
    const octal = tarText(header.subarray(124, 136)).trim();
    let sum = 8 * 32;
    for (let i = 0; i < 512; i++) sum += i >= 148 && i < 156 ? 0 : header[i]!;
    const where = `${source.path}, byte ${at}`;
    if (Number.parseInt(tarText(header.subarray(148, 156)).trim(), 8) !== sum) {
      throw badInput('Bad tar archive: wrong checksum of a header', { where });
    }
    if (!/^[0-7]{1,12}$/.test(octal)) throw badInput('Bad tar archive: malformed size', { where, got: octal });
    const kind = header[156]!;
    if ((kind !== 0 && kind !== 0x30) || !tarNames.includes(name) || members.has(name)) {
      throw badInput('Bad tar archive: a member that PyTorch does not write', { where, got: JSON.stringify(name) });
    }
    const size = Number.parseInt(octal, 8);
    slice(source, at + 512, size, name);
    members.set(name, { start: at + 512, size });
    at += 512 + Math.ceil(size / 512) * 512;
  }
  return members;
}

/** Tar, as the first PyTorch releases wrote it, uncompressed: storages and tensors are numbered; the object's pickle refers to them by number. */
export function readTar(source: RandomAccess, refused: RefusedGlobal[]): TorchContents {
  const { path } = source;
  const members = tarMembers(source);
  const open = (name: string): Cursor => {
    const member = members.get(name);
    if (member === undefined) throw badInput(`The archive has no member "${name}"`, { where: path });
    return new Cursor(source, name, member.start, member.start + member.size);
  };
  const rules = { allows: torchAllows, construct: torchConstruct, refused };
  const noneStored = (id: PyValue): never => {
    throw badInput('Bad pickle: a reference to a stored object out of place', { where: path, got: describe(id) });
  };
  const read = (cursor: Cursor): PyValue => unpickle(cursor, { ...rules, persistent: noneStored });
  const storages = new Map<string, StoredAt>();
  const objects = new Map<string, TorchStorage | TorchTensor>();

  const inStorages = open('storages');
  for (let left = counted(read(inStorages), path); left > 0; left--) {
    const [key, , type] = fields(read(inStorages), 3, path);
    const element = type instanceof PyGlobal ? storageElement(type.name) : undefined;
    if (element === undefined) throw badInput('A storage of unknown element type', { where: inStorages.where() });
    const stored = readStored(inStorages, elementBytes(element));
    storages.set(idText(key), stored);
    objects.set(
      idText(key),
      new TorchStorage(idText(key), (type as PyGlobal).name, stored.bytes / elementBytes(element)),
    );
  }
  const views = read(inStorages);
  for (const view of Array.isArray(views) ? views : []) {
    const [target, root, offset, count] = fields(view, 4, path);
    const base = objects.get(idText(root));
    if (!(base instanceof TorchStorage)) throw badInput('A view of a storage that is not there', { where: path });
    objects.set(
      idText(target),
      new TorchStorage(base.key, base.className, counted(count, path), counted(offset, path)),
    );
  }

  const inTensors = open('tensors');
  for (let left = counted(read(inTensors), path); left > 0; left--) {
    const [key, storageId] = fields(read(inTensors), 3, path);
    const storage = objects.get(idText(storageId));
    if (!(storage instanceof TorchStorage)) throw badInput('A tensor without storage', { where: inTensors.where() });
    const dims = inTensors.i32();
    inTensors.bytes(4); // the count of dimensions was once written as 8 bytes
    if (dims < 0 || dims > 16)
      throw badInput('Impossible number of dimensions', { where: inTensors.where(), got: `${dims}` });
    const numbers = Array.from({ length: 2 * dims + 1 }, () => nonNegative(inTensors));
    const [shape, strides] = [numbers.slice(0, dims), numbers.slice(dims, 2 * dims)];
    objects.set(idText(key), new TorchTensor(storage, numbers[2 * dims]!, shape, strides));
  }

  const persistent = (id: PyValue): PyValue => {
    // (class, source file, source text): a container class; only its name is kept.
    if (id instanceof PyTuple) return id.items[0] ?? null;
    return objects.get(idText(id)) ?? noneStored(id);
  };
  const root = unpickle(open('pickle'), { ...rules, persistent });
  const first = Math.min(...[...storages.values()].map(({ offset }) => offset), source.size);
  const heads = ['tensors', 'pickle'].map((name) => {
    const { start, size } = members.get(name)!;
    return source.read(start, Math.min(size, maxPickle), name);
  });
  return { root, storages, headers: [source.read(0, Math.min(first, maxPickle), 'header'), ...heads] };
}

function fields(value: PyValue, count: number, path: string): PyValue[] {
  const items = value instanceof PyTuple ? value.items : Array.isArray(value) ? value : [];
  if (items.length !== count) {
    throw badInput('Bad tar checkpoint', { where: path, expected: `${count} fields`, got: describe(value) });
  }
  return [...items];
}

const idText = (id: PyValue | undefined): string => (typeof id === 'bigint' ? id.toString() : describe(id ?? null)).replaceAll('"', ''); // prettier-ignore

function counted(value: PyValue | undefined, path: string): number {
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0) return value;
  throw badInput('Bad tar checkpoint', { where: path, expected: 'a count', got: describe(value ?? null) });
}

function nonNegative(cursor: Cursor): number {
  const value = cursor.i64();
  if (value >= 0n && value <= BigInt(Number.MAX_SAFE_INTEGER)) return Number(value);
  throw badInput('Bad size, stride or offset of a tensor', { where: cursor.where(), got: `${value}` });
}
