import { realpathSync } from 'node:fs';
import { readdir, realpath, stat } from 'node:fs/promises';
import { basename, dirname, join, sep } from 'node:path';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';
import { readIndex, type ShardIndex } from './shard-index.js';

/** Files with weights, and which of them must hold which tensor. */
export interface Located {
  /** The folder itself, or the folder of the lone file. */
  readonly folder: string;
  /** The lone file, when the path named one. */
  readonly file: string | undefined;
  readonly files: readonly string[];
  /** The index, where there is one, and its path. */
  readonly index: { readonly path: string; readonly shards: ShardIndex } | undefined;
  readonly notes: readonly string[];
}

const indexNames = ['model.safetensors.index.json', 'pytorch_model.bin.index.json'];
const singleNames = ['model.safetensors', 'pytorch_model.bin'];
const weightEndings = ['.safetensors', '.gguf', '.onnx', '.bin', '.pt', '.pth'];
const nativeShard = /^model(\d+)-mp(\d+)\.safetensors$/;
/** Whether a file is a shard of DeepSeek's native layout, by its name. */
export const isNativeShard = (path: string): boolean => nativeShard.test(basename(path));
const numberedShard = /^(.*)-(\d{5})-of-(\d{5})\.(safetensors|bin|gguf)$/;
/** Files that end like weights but are none. */
const notWeights =
  /^(training_args\.bin|optimizer\.(bin|pt)|scheduler\.(bin|pt)|rng_state.*|.*\.onnx_data|tokenizer\..*)$/;

/** Finds the weight files of a path: a file, an index file, or a folder in any of the usual layouts. */
export async function locate(path: string): Promise<Located> {
  let isFolder: boolean;
  try {
    isFolder = (await stat(path)).isDirectory();
  } catch (error) {
    throw ioError(error, 'open the checkpoint', path);
  }
  if (isFolder) return locateFolder(path);
  const name = basename(path);
  if (name.endsWith('.index.json')) return locateIndex(dirname(path), name);
  const base = { folder: dirname(path), file: path, index: undefined, notes: [] };
  if (nativeShard.test(name)) {
    const all = (await readdir(dirname(path))).filter((other) => nativeShard.test(other));
    return { ...base, file: undefined, files: nativeFiles(dirname(path), all) };
  }
  const shard = numberedShard.exec(name);
  if (shard !== null && shard[4] === 'gguf' && shard[3] !== '00001') {
    return { ...base, files: await numberedFiles(dirname(path), shard) };
  }
  return { ...base, files: [path] };
}

async function locateFolder(folder: string): Promise<Located> {
  let names: string[];
  try {
    names = (await readdir(folder)).sort();
  } catch (error) {
    throw ioError(error, 'list', folder);
  }
  const base = { folder, file: undefined, index: undefined, notes: [] };
  for (const index of indexNames) {
    if (names.includes(index)) return locateIndex(folder, index);
    const single = singleNames[indexNames.indexOf(index)]!;
    if (names.includes(single)) return { ...base, files: [join(folder, single)] };
  }
  const native = names.filter((name) => nativeShard.test(name));
  if (native.length > 0) return { ...base, files: nativeFiles(folder, native) };
  const otherIndex = names.filter((name) => /\.(safetensors|bin)\.index\.json$/.test(name));
  if (otherIndex.length === 1) return locateIndex(folder, otherIndex[0]!);
  for (const ending of weightEndings) {
    const weights = names.filter((name) => name.endsWith(ending) && !notWeights.test(name));
    const first = weights[0];
    if (first === undefined) continue;
    if (weights.length === 1 && !numberedShard.test(first)) return { ...base, files: [join(folder, first)] };
    const shard = numberedShard.exec(first);
    if (shard !== null && weights.every((name) => numberedShard.exec(name)?.[1] === shard[1])) {
      const notes = ending === '.gguf' ? [] : [`The folder has no index; all ${weights.length} shards were read.`];
      return { ...base, files: await numberedFiles(folder, shard), notes };
    }
    throw badInput('The folder has several files with weights and no index that says which to read', {
      where: folder,
      got: weights.slice(0, 6).join(', '),
      hint: `Name the file: ${join(folder, first)}`,
    });
  }
  throw badInput('No weights in the folder', {
    where: folder,
    expected: [...singleNames, ...indexNames].join(', '),
    got: names.slice(0, 8).join(', ') || 'an empty folder',
  });
}

/** Shards `model{i}-mp{n}.safetensors` of DeepSeek's own layout, in order of i. */
function nativeFiles(folder: string, names: readonly string[]): string[] {
  const parts = names.map((name) => nativeShard.exec(name)!);
  const count = Number(parts[0]![2]);
  const complete = parts.length === count && parts.every((part) => Number(part[2]) === count);
  const order = parts.map((part) => Number(part[1]));
  if (!complete || !order.every((i) => i < count)) {
    throw badInput("Shards of DeepSeek's native layout are missing or mixed", {
      where: folder,
      expected: `model0-mp${count}.safetensors to model${count - 1}-mp${count}.safetensors`,
      got: names.slice(0, 8).join(', '),
    });
  }
  return Array.from({ length: count }, (_, i) => join(folder, `model${i}-mp${count}.safetensors`));
}

async function numberedFiles(folder: string, shard: RegExpExecArray): Promise<string[]> {
  const [, stem, , total, ending] = shard as unknown as [string, string, string, string, string];
  const names = new Set(await readdir(folder));
  return Array.from({ length: Number(total) }, (_, i) => {
    const name = `${stem}-${String(i + 1).padStart(5, '0')}-of-${total}.${ending}`;
    if (names.has(name)) return join(folder, name);
    throw badInput('A shard is missing', {
      where: folder,
      expected: name,
      hint: 'Download or copy the missing shard.',
    });
  });
}

async function locateIndex(folder: string, indexName: string): Promise<Located> {
  const path = join(folder, indexName);
  const shards = readIndex(path);
  const files: string[] = [];
  const inside = await allowedRoots(folder);
  for (const name of shards.keys()) {
    const file = join(folder, name);
    let real: string;
    try {
      real = realpathSync.native(file);
    } catch (cause) {
      throw badInput('A shard that the index names is missing', {
        where: path,
        expected: file,
        hint: 'Download or copy the missing shard.',
        cause,
      });
    }
    if (!inside.some((root) => real.startsWith(root + sep))) {
      throw badInput('A shard is a link out of the folder', { where: file, got: real, expected: `inside ${folder}` });
    }
    files.push(file);
  }
  return { folder, file: undefined, files: files.sort(), index: { path, shards }, notes: [] };
}

/** Files of a model that are copied as they are must not be links to other files of this machine: outputs are published. */
export async function refuseLinksOut(folder: string, files: readonly string[]): Promise<void> {
  const inside = await allowedRoots(folder);
  for (const file of files) {
    const real = await realpath(file);
    if (inside.some((root) => real.startsWith(root + sep))) continue;
    throw badInput('A file of the model is a link out of its folder', { where: file, got: real, expected: `inside ${folder}`, hint: 'Put a copy in its place, if it belongs there.' }); // prettier-ignore
  }
}

/** The folder, and the blobs folder that the Hugging Face cache's snapshots link to. */
async function allowedRoots(folder: string): Promise<string[]> {
  const real = await realpath(folder);
  const snapshots = dirname(real);
  return basename(snapshots) === 'snapshots' ? [real, join(dirname(snapshots), 'blobs')] : [real];
}
