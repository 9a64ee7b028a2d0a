import { basename } from 'node:path';
import { badInput } from '../base/errors.js';
import type { GgufFile, GgufValue } from '../formats/gguf.js';
import type { OnnxFile } from '../formats/onnx.js';
import { OpenFile } from '../formats/source.js';
import type { RandomAccess } from '../formats/source.js';
import type { ParsedFile, TensorEntry } from '../formats/types.js';
import { detectFormat, extensionNote } from './detect.js';
import type { FileFormat } from './detect.js';
import type { Located } from './locate.js';
import { refuseDuplicates } from './shard-index.js';

/** A file with weights, its header understood. */
export interface OpenedFile extends ParsedFile {
  readonly path: string;
  readonly format: FileFormat;
  readonly size: number;
  /** Time of the last change, ms since 1970. */
  readonly modified: number;
  /** Metadata of a GGUF file. */
  readonly gguf?: ReadonlyMap<string, GgufValue>;
  /** Nodes of an ONNX graph and the files with its external data. */
  readonly onnx?: Pick<OnnxFile, 'nodes' | 'externalFiles'>;
}

/** Loaded with the first file of the format. */
const parsers: Record<FileFormat, () => Promise<(source: RandomAccess) => ParsedFile>> = {
  safetensors: async () => (await import('../formats/safetensors.js')).readSafetensors,
  torch: async () => (await import('../formats/torch.js')).readTorch,
  gguf: async () => (await import('../formats/gguf.js')).readGguf,
  onnx: async () => (await import('../formats/onnx.js')).readOnnx,
};

export async function parseFile(path: string): Promise<OpenedFile> {
  using source = new OpenFile(path);
  const format = detectFormat(source);
  const parse = await parsers[format]();
  const parsed = parse(source);
  const note = extensionNote(path, format);
  const notes = note === undefined ? parsed.notes : [note, ...parsed.notes];
  const gguf = format === 'gguf' ? { gguf: (parsed as GgufFile).metadata } : {};
  const onnx = format === 'onnx' ? { onnx: parsed as OnnxFile } : {};
  const { tensors, headerHash } = parsed;
  return { tensors, headerHash, notes, path, format, size: source.size, modified: source.modified, ...gguf, ...onnx };
}

/** Reads the headers of all files; they must be of one format. */
export async function parseFiles(paths: readonly string[], where: string): Promise<OpenedFile[]> {
  const files: OpenedFile[] = [];
  for (const path of paths) files.push(await parseFile(path));
  if (files.some(({ format }) => format !== files[0]!.format)) {
    throw badInput('The files of one checkpoint have different formats', {
      where,
      got: files.slice(0, 4).map((file) => `${basename(file.path)}: ${file.format}`).join(', '),
    }); // prettier-ignore
  }
  return files;
}

/** All tensors by name; an index must agree with what the files hold. */
export function collectTensors(files: readonly OpenedFile[], { index }: Located): Map<string, TensorEntry> {
  const tensors = new Map<string, TensorEntry>();
  for (const file of files) {
    for (const tensor of file.tensors) {
      const before = tensors.size;
      if (tensors.set(tensor.name, tensor).size > before) continue;
      if (index) refuseDuplicates(index.path);
      const other = files.flatMap((one) => one.tensors).find(({ name }) => name === tensor.name)!;
      const where = `tensor ${JSON.stringify(tensor.name)}`;
      throw badInput('A tensor is in two files', { where, got: `${other.span.path} and ${file.path}` });
    }
  }
  const named = new Map(files.map((file) => [basename(file.path), file]));
  for (const [shard, names] of index?.shards ?? []) {
    const file = named.get(shard);
    let next = 0;
    for (const name of names) {
      // An index mostly lists a file's tensors in the file's order: of 100,000 few need to be looked up.
      if (file?.tensors[next]?.name === name) {
        next++;
        continue;
      }
      const tensor = tensors.get(name);
      if (tensor && tensor.span.path === file?.path) continue;
      refuseDuplicates(index!.path);
      throw badInput('A tensor of the index is not where it should be', {
        where: `tensor ${JSON.stringify(name)}`,
        expected: `in ${shard}`,
        got: tensor === undefined ? 'nowhere' : `in ${tensor.span.path}`,
        hint: 'Index and shards do not belong together: download or copy them again.',
      });
    }
  }
  if (tensors.size === 0) throw badInput('The checkpoint holds no tensors', { where: files[0]?.path ?? '' });
  return tensors;
}
