import { badInput } from '../base/errors.js';
import { Cursor } from './cursor.js';
import { unpickle } from './pickle.js';
import { refusedGlobals } from './pickle-values.js';
import type { RefusedGlobal } from './pickle-values.js';
import { hashHeaders } from './source.js';
import type { RandomAccess } from './source.js';
import { maxPickle, stateEntries } from './torch-state.js';
import type { StoredAt, TorchContents } from './torch-state.js';
import { readStream, readTar } from './torch-legacy.js';
import { torchContainer, type TorchContainer } from './torch-magic.js';
import { torchAllows, torchConstruct, torchPersistent } from './torch-values.js';
import type { ParsedFile } from './types.js';
import { readZip } from './zip.js';

export interface TorchFile extends ParsedFile {
  readonly container: TorchContainer;
}

/**
 * Reads what torch.save wrote: the zip form, the legacy stream, or the oldest tar. Finds the state dict (also inside
 * `model`, `state_dict`, `module` ...), and checks each tensor's shape, strides and offset against its storage.
 * Nothing in the pickle is imported or called.
 */
export function readTorch(source: RandomAccess): TorchFile {
  const refused: RefusedGlobal[] = [];
  const { container, root, storages, headers } = readContents(source, refused);
  if (refused.length > 0) throw refusedGlobals(refused, source.path);
  const { tensors, notes } = stateEntries(root, storages, source.path);
  return { container, tensors, notes, headerHash: hashHeaders(source.size, headers) };
}

/** The globals of a PyTorch file that are outside the allow-list, for `inspect --security`. */
export function torchRefusals(source: RandomAccess): RefusedGlobal[] {
  const refused: RefusedGlobal[] = [];
  readContents(source, refused);
  return refused;
}

function readContents(source: RandomAccess, refused: RefusedGlobal[]): TorchContents & { container: TorchContainer } {
  const container = torchContainer(source) ?? 'stream'; // whose reader says what is wrong
  const read = { zip: readZipForm, tar: readTar, stream: readStream }[container];
  return { container, ...read(source, refused) };
}

function readZipForm(source: RandomAccess, refused: RefusedGlobal[]): TorchContents {
  const { path } = source;
  const { entries, directory } = readZip(source);
  const pickles = [...entries.keys()].filter((name) => /^[^/]+\/data\.pkl$/.test(name));
  const [pickleName] = pickles;
  if (pickleName === undefined || pickles.length > 1) {
    const numpy = [...entries.keys()].some((name) => name.endsWith('.npy'));
    throw badInput('Not a PyTorch checkpoint: a zip archive without one <name>/data.pkl', {
      where: path,
      got: [...entries.keys()].slice(0, 4).join(', '),
      hint: numpy ? 'This is a NumPy .npz file; save the weights with torch.save or safetensors.' : 'Unpack it first.',
    });
  }
  const prefix = pickleName.slice(0, -'data.pkl'.length);
  if (entries.has(`${prefix}constants.pkl`)) {
    throw badInput('This is a TorchScript archive (torch.jit.save): a program, not a checkpoint', {
      where: path,
      hint: 'Save its weights: torch.save(torch.jit.load(path).state_dict(), other_path).',
    });
  }
  const byteorder = entries.get(`${prefix}byteorder`);
  if (byteorder !== undefined && byteorder.size <= 16) {
    const order = source.read(byteorder.offset, byteorder.size, 'byteorder').toString('latin1');
    if (order !== 'little') throw badInput('The file was saved on a big-endian machine', { where: path, got: order });
  }
  const pickle = entries.get(pickleName)!;
  if (pickle.size > maxPickle) {
    throw badInput('The pickle is larger than any checkpoint needs', {
      where: `${path}, ${pickleName}`,
      expected: `at most ${maxPickle} bytes`,
      got: `${pickle.size} bytes`,
    });
  }
  const bytes = source.read(pickle.offset, pickle.size, 'data.pkl');
  const cursor = new Cursor(source, 'data.pkl', pickle.offset, pickle.offset + pickle.size);
  const root = unpickle(cursor, {
    allows: torchAllows,
    construct: torchConstruct,
    persistent: (id) => torchPersistent(id, path),
    refused,
  });
  if (cursor.position !== cursor.end) throw badInput('Bytes after the pickle', { where: cursor.where() });
  const storages = new Map<string, StoredAt>();
  const data = `${prefix}data/`;
  for (const [name, entry] of entries) {
    if (name.startsWith(data)) storages.set(name.slice(data.length), { offset: entry.offset, bytes: entry.size });
  }
  return { root, storages, headers: [directory, bytes] };
}
