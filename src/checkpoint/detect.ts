import { badInput } from '../base/errors.js';
import { safeU64 } from '../formats/source.js';
import type { RandomAccess } from '../formats/source.js';
import { torchContainer } from '../formats/torch-magic.js';
import type { ContainerFormat } from './types.js';

export type FileFormat = Exclude<ContainerFormat, 'deepseek-native'>;

/** What users hand over by mistake, by its first bytes, and what to do about it. */
const mistakes: readonly (readonly [magic: string, what: string, hint: string])[] = [
  ['version https://git-lfs', 'a Git LFS pointer', 'Fetch the real file: git lfs pull'],
  ['<!DOCTYPE', 'a web page', 'The download went to a login or error page: download the file again.'],
  ['<html', 'a web page', 'The download went to a login or error page: download the file again.'],
  ['\x89HDF', 'an HDF5 file (Keras, TensorFlow)', 'Export the weights as safetensors first.'],
  ['\x1f\x8b', 'a gzip archive', 'Unpack it first: gunzip FILE'],
  ['(\xb5/\xfd', 'a Zstandard archive', 'Unpack it first: zstd -d FILE'],
  ['ggjt', 'a GGML file of before August 2023', 'Download the model as GGUF, or convert it from its source.'],
  ['tjgg', 'a GGML file of before August 2023', 'Download the model as GGUF, or convert it from its source.'],
  ['lmgg', 'a GGML file of before August 2023', 'Download the model as GGUF, or convert it from its source.'],
  ['fmgg', 'a GGML file of before August 2023', 'Download the model as GGUF, or convert it from its source.'],
  ['\x93NUMPY', 'a NumPy array', 'Save the weights with names, as safetensors.'],
];

const extensions: Record<FileFormat, readonly string[]> = {
  safetensors: ['.safetensors'],
  torch: ['.bin', '.pt', '.pth', '.ckpt'],
  gguf: ['.gguf'],
  onnx: ['.onnx'],
};

/** The format of a file by its first bytes; its name does not matter. */
export function detectFormat(source: RandomAccess): FileFormat {
  const { path, size } = source;
  if (size === 0) throw badInput('The file is empty', { where: path, hint: 'Download or copy it again.' });
  const head = source.read(0, Math.min(64, size), 'magic');
  const text = head.toString('latin1');
  if (text.startsWith('GGUF')) return 'gguf';
  for (const [magic, what, hint] of mistakes) {
    if (text.startsWith(magic)) throw badInput(`This is ${what}, not a checkpoint`, { where: path, hint });
  }
  if (torchContainer(source) !== undefined) return 'torch';
  // A real header begins within a few spaces of byte 8; a length that is impossible is reported by the reader.
  const header = text.slice(8).trimStart();
  if (size >= 8 && (header.startsWith('{') || (header === '' && size < 64 && safeU64(head, 0) === size - 8))) {
    return 'safetensors';
  }
  if (looksLikeOnnx(head)) return 'onnx';
  throw badInput('Unknown file format', {
    where: `${path}, byte 0`,
    expected: 'safetensors, PyTorch, GGUF or ONNX',
    got: head.subarray(0, 16).toString('hex'),
    hint: 'Check that the download is complete and that the path names a file with weights.',
  });
}

/** ModelProto: field 1 (ir_version, a small varint), then a field that a model can have. */
function looksLikeOnnx(head: Buffer): boolean {
  const modelFields = [0x12, 0x1a, 0x22, 0x28, 0x32, 0x3a, 0x42, 0x72, 0xa2, 0xca];
  return head[0] === 0x08 && head[1]! > 0 && head[1]! < 64 && (head.length < 3 || modelFields.includes(head[2]!));
}

/** A note when a file's ending belongs to another format than its content. */
export function extensionNote(path: string, format: FileFormat): string | undefined {
  const name = path.toLowerCase();
  const named = (Object.keys(extensions) as FileFormat[]).find((key) => extensions[key].some((e) => name.endsWith(e)));
  if (named === undefined || named === format) return undefined;
  return `${path} is named like a ${named} file but is a ${format} file; it was read as ${format}.`;
}
