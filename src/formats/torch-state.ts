import { dtypeSize } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import { PyObject } from './pickle-values.js';
import type { PyDict, PyValue } from './pickle-values.js';
import { describe, dtypeElement, storageElement, TorchTensor } from './torch-values.js';
import type { Encoding, TensorEntry } from './types.js';

export interface StoredAt {
  readonly offset: number;
  readonly bytes: number;
}

/** What a reader of one of the three containers finds. */
export interface TorchContents {
  readonly root: PyValue;
  /** Where each storage's data lies, by key. */
  readonly storages: ReadonlyMap<string, StoredAt>;
  /** Header bytes, for the fingerprint. */
  readonly headers: readonly Uint8Array[];
}

/** Larger than any real checkpoint's pickle; the weights lie outside of it. */
export const maxPickle = 128 * 2 ** 20;

/** Keys under which training frameworks keep the weights, best first. */
const nests = ['state_dict', 'model_state_dict', 'model', 'module', 'weights'];
/** Wrappers' prefixes (DistributedDataParallel, torch.compile). */
const prefixes = ['module.', '_orig_mod.'];
/**
 * Tied and broadcast weights view one storage more than once; a file in which views claim more than so many times
 * their storage was made to blow up its reader.
 */
const claim = { times: 64, free: 16 * 2 ** 20 };

/** The tensors of a checkpoint's state dict, checked against the storages; notes say what was passed over. */
export function stateEntries(
  root: PyValue,
  storages: ReadonlyMap<string, StoredAt>,
  path: string,
): { tensors: TensorEntry[]; notes: string[] } {
  const notes: string[] = [];
  const state = findState(root, path, notes);
  const names = new Map<string, TorchTensor>();
  const ignored: string[] = [];
  for (const [key, value] of state) {
    const name = keyText(key);
    if (value instanceof TorchTensor && name !== undefined) {
      if (names.has(name)) throw badInput('Two tensors of one name', { where: `${path}, ${JSON.stringify(name)}` });
      names.set(name, value);
    } else if (value instanceof PyObject && value.callee.name.startsWith('_rebuild')) {
      throw badInput('A tensor of a kind that holds no plain weights', {
        where: `${path}, tensor ${describe(key)}`,
        got: value.callee.toString(),
        expected: 'a dense tensor',
        hint: 'Save dense weights: quantized, sparse and meta tensors are not read.',
      });
    } else ignored.push(name ?? describe(key));
  }
  if (ignored.length > 0) notes.push(`Ignored beside the tensors: ${list(ignored)}.`);
  const claimed = new Map<string, number>();
  const prefix = commonPrefix([...names.keys()]);
  if (prefix !== '') notes.push(`Dropped the prefix "${prefix}" of all names.`);
  const tensors: TensorEntry[] = [];
  for (const [name, tensor] of names) {
    const entry = toEntry(name.slice(prefix.length), tensor, storages, path);
    tensors.push(entry);
    requireModestClaim(entry, tensor, storages, claimed, path);
  }
  return { tensors, notes };
}

const keyText = (key: PyValue): string | undefined => {
  if (key instanceof Uint8Array) return Buffer.from(key).toString('utf8');
  return typeof key === 'string' ? key : undefined;
};
const list = (names: readonly string[]): string =>
  names.length > 8 ? `${names.slice(0, 8).join(', ')} and ${names.length - 8} more` : names.join(', ');
const countTensors = (dict: PyDict): number =>
  [...dict.values()].filter((value) => value instanceof TorchTensor).length;

/** The most tensors of a dictionary or of one nested in it; `known` are those looked at, which may hold each other. */
function mostTensors(dict: PyDict, known: Map<PyDict, number>): number {
  const before = known.get(dict);
  if (before !== undefined) return before;
  let most = countTensors(dict);
  known.set(dict, most);
  for (const key of nests) {
    const inner = known.size < 64 ? dict.get(key) : undefined;
    if (inner instanceof Map) most = Math.max(most, mostTensors(inner, known));
  }
  known.set(dict, most);
  return most;
}

function findState(root: PyValue, path: string, notes: string[]): PyDict {
  let dict = root;
  const nested: string[] = [];
  const known = new Map<PyDict, number>();
  for (let depth = 0; depth < 4 && dict instanceof Map; depth++) {
    const here = countTensors(dict);
    const inner = nests.find((key) => {
      const value = (dict as PyDict).get(key);
      return value instanceof Map && mostTensors(value, known) > here;
    });
    if (inner === undefined) {
      if (here === 0) break;
      if (nested.length > 0) notes.push(`The weights were under ${nested.map((key) => `"${key}"`).join('.')}.`);
      return dict;
    }
    const others = [...dict.keys()].filter((key) => key !== inner).map((key) => keyText(key) ?? describe(key));
    if (others.length > 0) notes.push(`Ignored beside the weights: ${list(others)}.`);
    nested.push(inner);
    dict = dict.get(inner)!;
  }
  const keys = root instanceof Map ? `a dictionary with ${list([...root.keys()].map(describe))}` : describe(root);
  throw badInput('The file holds no state dict', {
    where: path,
    expected: `tensors by name, perhaps under ${nests.join(', ')}`,
    got: root instanceof Map && root.size === 0 ? 'an empty dictionary' : keys,
    hint: 'Save the weights alone: torch.save(model.state_dict(), path).',
  });
}

function commonPrefix(names: readonly string[]): string {
  let prefix = '';
  // Real wrappers nest twice or so.
  for (let depth = 0; depth < 8; depth++) {
    const next = prefixes.map((p) => prefix + p).find((p) => names.every((name) => name.startsWith(p) && name !== p));
    if (next === undefined || names.length === 0) break;
    prefix = next;
  }
  return prefix;
}

export const elementBytes = (encoding: Encoding): number =>
  encoding.kind === 'plain' ? dtypeSize(encoding.dtype) : encoding.kind === 'opaque' ? encoding.bits / 8 : NaN;

function toEntry(
  name: string,
  tensor: TorchTensor,
  storages: ReadonlyMap<string, StoredAt>,
  path: string,
): TensorEntry {
  const where = `${path}, tensor ${JSON.stringify(name)}`;
  const { storage, shape, strides } = tensor;
  const stored = storages.get(storage.key);
  if (stored === undefined) {
    throw badInput('The data of a tensor is missing', { where, expected: `storage ${JSON.stringify(storage.key)}` });
  }
  const encoding = elementOf(tensor, where);
  const size = elementBytes(encoding);
  const declared = (storage.offset + storage.count) * (storageElement(storage.className) ? size : 1);
  if (declared > stored.bytes) {
    throw badInput('A storage is smaller than the pickle says', {
      where,
      expected: `${declared} bytes`,
      got: `${stored.bytes} bytes`,
    });
  }
  if (shape.length !== strides.length) {
    throw badInput('Shape and strides have different lengths', {
      where,
      got: `[${shape.join()}] and [${strides.join()}]`,
    });
  }
  const empty = shape.includes(0);
  const count = shape.reduce((n, d) => n * d, 1);
  const last = empty ? -1 : shape.reduce((at, d, i) => at + (d - 1) * strides[i]!, 0);
  const first = storage.offset + tensor.offset;
  // A view may begin within its own storage only, even where the file's storage is longer.
  const limit = storageElement(storage.className) ? storage.offset + storage.count : storage.count / size;
  if (!Number.isSafeInteger(count) || !Number.isSafeInteger(last) || first + last + 1 > limit) {
    throw badInput('A tensor reaches beyond its storage', {
      where: `${where}, shape [${shape.join()}], strides [${strides.join()}], offset ${tensor.offset}`,
      expected: `at most element ${limit}`,
      got: `element ${first + last + 1}`,
    });
  }
  const contiguous = empty || isContiguous(shape, strides);
  const span = { path, offset: stored.offset + first * size, bytes: (last + 1) * size };
  return { name, shape, encoding, span, ...(contiguous ? {} : { strides }) };
}

function elementOf({ storage, dtypeName }: TorchTensor, where: string): Encoding {
  const encoding = dtypeName === undefined ? storageElement(storage.className) : dtypeElement(dtypeName);
  if (encoding !== undefined) return encoding;
  throw badInput('Unknown element type of a tensor', { where, got: dtypeName ?? storage.className });
}

function isContiguous(shape: readonly number[], strides: readonly number[]): boolean {
  let expected = 1;
  for (let i = shape.length - 1; i >= 0; i--) {
    if (shape[i] !== 1 && strides[i] !== expected) return false;
    expected *= shape[i]!;
  }
  return true;
}

function requireModestClaim(
  entry: TensorEntry,
  tensor: TorchTensor,
  storages: ReadonlyMap<string, StoredAt>,
  claimed: Map<string, number>,
  path: string,
): void {
  const { key } = tensor.storage;
  const bytes = entry.shape.reduce((n, d) => n * d, 1) * elementBytes(entry.encoding);
  const sum = (claimed.get(key) ?? 0) + bytes;
  claimed.set(key, sum);
  const limit = Math.max(claim.free, claim.times * storages.get(key)!.bytes);
  if (sum <= limit) return;
  throw badInput('Tensors claim one storage far more often than it has bytes', {
    where: `${path}, tensor ${JSON.stringify(entry.name)}, storage ${JSON.stringify(key)}`,
    expected: `at most ${limit} bytes in all`,
    got: `${sum} bytes`,
  });
}
