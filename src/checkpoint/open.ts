import { createHash } from 'node:crypto';
import { stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { badInput } from '../base/errors.js';
import { ioError } from '../base/files.js';
import { closeFiles } from '../base/io.js';
import { readSafetensors } from '../formats/safetensors.js';
import { OpenFile } from '../formats/source.js';
import type { RandomAccess } from '../formats/source.js';
import { readTorch } from '../formats/torch.js';
import type { ParsedFile, TensorEntry } from '../formats/types.js';
import { findCompanions, findConfig, missingConfig } from './config.js';
import { detectFormat, extensionNote } from './detect.js';
import type { FileFormat } from './detect.js';
import { locate } from './locate.js';
import type { Located } from './locate.js';
import type { Checkpoint } from './types.js';

export interface OpenOptions {
  /** Path of the config, where it does not lie beside the weights. */
  readonly config?: string | undefined;
  /** Opens checkpoints without a config too (`inspect`); their `config` is empty. */
  readonly configOptional?: boolean;
}

/**
 * Opens a checkpoint for reading: a file, an index, or a folder. Reads headers only; formats are told by content.
 * Errors (kind 'input') name file, byte or tensor: missing files, damaged or hostile headers, no config.
 */
export async function openCheckpoint(path: string, options: OpenOptions = {}): Promise<Checkpoint> {
  const { located, files, tensors } = await readContainers(path);
  const { found, tried } = await findConfig(located.folder, located.file, options.config);
  if (found === undefined && !options.configOptional) throw missingConfig(path, tried);
  const notes = [...located.notes, ...new Set(files.flatMap((file) => file.notes))];
  const hash = createHash('sha256');
  for (const file of files) hash.update(`${basename(file.path)}\0${file.headerHash}\n`);
  hash.update(found?.bytes ?? '');
  return {
    path,
    format: files[0]!.format,
    config: found?.config ?? {},
    configPath: found?.path,
    tensors,
    files: located.files,
    companions: await findCompanions(located.folder, located.file),
    notes,
    fingerprint: hash.digest('hex'),
    assertUnchanged: () => assertUnchanged(files),
    close: () => closeFiles(located.files),
  };
}

/** The tensors of a checkpoint's files as they are stored, by name; index and files must agree. */
export async function readContainers(
  path: string,
): Promise<{ located: Located; files: OpenedFile[]; tensors: Map<string, TensorEntry> }> {
  const located = await locate(path);
  const files = located.files.map(parseFile);
  if (files.some(({ format }) => format !== files[0]!.format)) {
    throw badInput('The files of one checkpoint have different formats', {
      where: path,
      got: files.slice(0, 4).map((file) => `${basename(file.path)}: ${file.format}`).join(', '),
    }); // prettier-ignore
  }
  return { located, files, tensors: collect(files, located) };
}

interface OpenedFile extends ParsedFile {
  readonly path: string;
  readonly format: FileFormat;
  readonly size: number;
  readonly modified: number;
}

function parseFile(path: string): OpenedFile {
  using source = new OpenFile(path);
  const format = detectFormat(source);
  const parsed = parsers[format](source);
  const note = extensionNote(path, format);
  const notes = note === undefined ? parsed.notes : [note, ...parsed.notes];
  return { ...parsed, notes, path, format, size: source.size, modified: source.modified };
}

const parsers: Record<FileFormat, (source: RandomAccess) => ParsedFile> = {
  safetensors: readSafetensors,
  torch: readTorch,
  gguf: notYet,
  onnx: notYet,
};

function notYet(source: RandomAccess): ParsedFile {
  throw badInput('This format is not read yet', { where: source.path });
}

/** All tensors by name; an index must agree with what the files hold. */
function collect(files: readonly OpenedFile[], { weightMap }: Located): Map<string, TensorEntry> {
  const tensors = new Map<string, TensorEntry>();
  for (const file of files) {
    for (const tensor of file.tensors) {
      const other = tensors.get(tensor.name);
      if (other !== undefined) {
        const where = `tensor ${JSON.stringify(tensor.name)}`;
        throw badInput('A tensor is in two files', { where, got: `${other.span.path} and ${file.path}` });
      }
      tensors.set(tensor.name, tensor);
    }
  }
  for (const [name, path] of weightMap ?? []) {
    const tensor = tensors.get(name);
    if (tensor?.span.path === path) continue;
    throw badInput('A tensor of the index is not where it should be', {
      where: `tensor ${JSON.stringify(name)}`,
      expected: `in ${path}`,
      got: tensor === undefined ? 'nowhere' : `in ${tensor.span.path}`,
      hint: 'Index and shards do not belong together: download or copy them again.',
    });
  }
  if (tensors.size === 0) throw badInput('The checkpoint holds no tensors', { where: files[0]?.path ?? '' });
  return tensors;
}

async function assertUnchanged(files: readonly OpenedFile[]): Promise<void> {
  for (const { path, size, modified } of files) {
    const now = await stat(path).catch((error: unknown) => {
      throw ioError(error, 'look again at', path);
    });
    if (now.size === size && now.mtimeMs === modified) continue;
    throw badInput('An input file was changed while it was read', {
      where: path,
      expected: `${size} bytes, of ${new Date(modified).toISOString()}`,
      got: `${now.size} bytes, of ${now.mtime.toISOString()}`,
      hint: 'Run the command again with --restart when nothing writes to the file any more.',
    });
  }
}
