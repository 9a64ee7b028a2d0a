import { basename } from 'node:path';
import { badInput } from '../base/errors.js';
import { scanner } from '../base/scanner.js';
import type { GgufFile, GgufValue } from '../formats/gguf.js';
import type { OnnxFile } from '../formats/onnx.js';
import { OpenFile } from '../formats/source.js';
import type { RandomAccess } from '../formats/source.js';
import type { NamesInFile, ParsedFile } from '../formats/types.js';
import { byName } from './by-name.js';
import { detectFormat, extensionNote } from './detect.js';
import type { FileFormat } from './detect.js';
import type { Located } from './locate.js';
import { namesOf } from './shard-index.js';

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

type Parser = (source: RandomAccess) => ParsedFile;
/** Loaded with the first file of the format. */
const loaders: Record<FileFormat, () => Promise<Parser>> = {
  safetensors: async () => (await import('../formats/safetensors.js')).readSafetensors,
  torch: async () => (await import('../formats/torch.js')).readTorch,
  gguf: async () => (await import('../formats/gguf.js')).readGguf,
  onnx: async () => (await import('../formats/onnx.js')).readOnnx,
};

const loaded: Partial<Record<FileFormat, Parser>> = {};

export async function parseFile(path: string): Promise<OpenedFile> {
  using source = new OpenFile(path);
  const format = detectFormat(source);
  const parse = (loaded[format] ??= await loaders[format]());
  const parsed = parse(source);
  const note = extensionNote(path, format);
  const notes = note === undefined ? parsed.notes : [note, ...parsed.notes];
  const gguf = format === 'gguf' ? { gguf: (parsed as GgufFile).metadata } : {};
  const onnx = format === 'onnx' ? { onnx: parsed as OnnxFile } : {};
  const { tensors, names, headerHash } = parsed;
  return {
    tensors,
    ...(names && { names }),
    headerHash,
    notes,
    path,
    format,
    size: source.size,
    modified: source.modified,
    ...gguf,
    ...onnx,
  };
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

const holdsEach = (names: NamesInFile, others: NamesInFile): boolean =>
  scanner()?.holdsEach(names.bytes, names.places, others.bytes, others.places) === true;

/** Refuses an index that does not agree with what the files hold; one tensor in two files is for `byName` to see. */
export function checkIndex(files: readonly OpenedFile[], { shards }: NonNullable<Located['index']>): void {
  const named = new Map(files.map((file) => [basename(file.path), file]));
  for (const [shard, listed] of shards) {
    const file = named.get(shard);
    if (file?.names && 'places' in listed && holdsEach(file.names, listed)) continue;
    const names = namesOf(listed);
    const expected = new Set(names);
    let found = 0;
    for (const { name } of file?.tensors ?? []) if (expected.has(name)) found++;
    if (found === names.length) continue;
    byName(files.flatMap(({ tensors }) => tensors));
    for (const { name } of file?.tensors ?? []) expected.delete(name);
    const [name] = expected;
    const elsewhere = files.find(({ tensors }) => tensors.some((tensor) => tensor.name === name));
    throw badInput('A tensor of the index is not where it should be', {
      where: `tensor ${JSON.stringify(name)}`,
      expected: `in ${shard}`,
      got: elsewhere === undefined ? 'nowhere' : `in ${elsewhere.path}`,
      hint: 'Index and shards do not belong together: download or copy them again.',
    });
  }
}
