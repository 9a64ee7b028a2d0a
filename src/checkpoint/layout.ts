import { extname } from 'node:path';
import { badInput, bug } from '../base/errors.js';
import { encodedBytes, encodingName } from '../formats/ggml.js';
import { buildGgufHeader } from '../formats/gguf.js';
import type { GgufValue } from '../formats/gguf.js';
import { encodeOnnx } from '../formats/onnx-writer.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { buildSafetensorsHeader, safetensorsDtype } from '../formats/safetensors.js';
import { layoutTorch } from '../formats/torch-writer.js';
import type { Encoding } from '../formats/types.js';
import { stemOf } from './config.js';
import { planKey } from './types.js';
import type { PlannedTensor } from './types.js';

/** Formats that the writer makes. `deepseek-native`: safetensors shards that each planned tensor names itself. */
export type OutputFormat = 'safetensors' | 'torch' | 'gguf' | 'onnx' | 'deepseek-native';

/** Bytes with their place in a file. */
export interface Piece {
  readonly position: number;
  readonly bytes: Buffer;
}

/** A run of data in a file, in file order. */
export interface Extent {
  /** Tensors stored here, by `planKey`: one, or several tied ones. */
  readonly names: readonly string[];
  readonly position: number;
  readonly bytes: number;
}

/** One output file with everything fixed but the data. */
export interface FileLayout {
  readonly name: string;
  readonly size: number;
  readonly extents: readonly Extent[];
  readonly pieces: readonly Piece[];
  /** The file whose headers describe this one's data; default itself. */
  readonly readThrough?: string;
  /** What follows an extent's data (`i`-th in file order) and depends on its CRC-32; undefined where nothing does. */
  readonly afterExtent?: (i: number, crc: number) => Piece;
  /** What ends the file, given all CRC-32s. */
  readonly tail?: (crcs: readonly number[]) => readonly Piece[];
}

export interface OutputLayout {
  readonly files: readonly FileLayout[];
  /** The index file of several shards. */
  readonly index: { readonly name: string; readonly json: object } | undefined;
}

export const plannedEncoding = ({ dtype, encoding }: PlannedTensor): Encoding => encoding ?? { kind: 'plain', dtype };

export function plannedBytes(tensor: PlannedTensor): number {
  const bytes = encodedBytes(tensor.shape, plannedEncoding(tensor));
  if (Number.isSafeInteger(bytes)) return bytes;
  throw badInput('The shape does not fit the element type', {
    where: `tensor ${JSON.stringify(tensor.name)}`,
    got: `[${tensor.shape.join(', ')}] as ${encodingName(plannedEncoding(tensor))}`,
  });
}

const baseNames = {
  safetensors: { stem: 'model', ending: 'safetensors' },
  torch: { stem: 'pytorch_model', ending: 'bin' },
  gguf: { stem: 'model', ending: 'gguf' },
};

export interface LayoutOptions {
  readonly format: OutputFormat;
  readonly tensors: readonly PlannedTensor[];
  /** Largest size of a shard, bytes; a single larger tensor gets a shard of its own. */
  readonly shardSize: number;
  /** Name of the one output file; undefined for a folder, which may hold shards. */
  readonly fileName: string | undefined;
  readonly metadata: Readonly<Record<string, string>>;
  /** safetensors: data in the order of `tensors`; false: in the order of the reference's writer. */
  readonly inPlanOrder?: boolean | undefined;
  /** Only for GGUF: architecture, tokenizer ... */
  readonly gguf?: ReadonlyMap<string, GgufValue> | undefined;
  /** Only for ONNX: the graph whose weights the tensors are. */
  readonly onnx?: OnnxGraph | undefined;
}

/** Fixes files, headers and the place of every tensor before anything is computed. */
export function planLayout(options: LayoutOptions): OutputLayout {
  const { format, tensors, fileName, shardSize } = options;
  requireDistinct(tensors);
  if (format === 'deepseek-native') return { files: nativeFiles(options), index: undefined };
  if (format === 'onnx') return { files: onnxFiles(options), index: undefined };
  const shards = fileName === undefined && format !== 'gguf' ? split(tensors, shardSize) : [tensors];
  const { stem, ending } = baseNames[format];
  const nameOf = (i: number): string => {
    if (fileName !== undefined) return fileName;
    if (shards.length === 1) return `${stem}.${ending}`;
    const [number, total] = [i + 1, shards.length].map((n) => String(n).padStart(5, '0'));
    return `${stem}-${number}-of-${total}.${ending}`;
  };
  const build = { torch: torchFile, safetensors: safetensorsFile, gguf: ggufFile }[format];
  const files = shards.map((shard, i) => build(nameOf(i), shard, options));
  if (shards.length === 1) return { files, index: undefined };
  const weightMap = Object.fromEntries(shards.flatMap((shard, i) => shard.map(({ name }) => [name, nameOf(i)])));
  const total = tensors.filter(({ tiedTo }) => tiedTo === undefined).reduce((sum, t) => sum + plannedBytes(t), 0);
  const json = { metadata: { total_size: total }, weight_map: weightMap };
  return { files, index: { name: `${stem}.${ending}.index.json`, json } };
}

function requireDistinct(tensors: readonly PlannedTensor[]): void {
  const seen = new Set<string>();
  for (const tensor of tensors) {
    const key = planKey(tensor);
    if (seen.has(key)) throw bug('A tensor is planned twice', { where: `tensor ${JSON.stringify(key)}` });
    seen.add(key);
  }
  if (tensors.length === 0) throw bug('No tensors are planned');
}

/** Shards in the order of the plan, which is the order of the layers; tied tensors stay with their partner. */
function split(tensors: readonly PlannedTensor[], shardSize: number): PlannedTensor[][] {
  const shards: PlannedTensor[][] = [];
  const shardOf = new Map<string, PlannedTensor[]>();
  let size = Infinity;
  for (const tensor of tensors) {
    const partner = tensor.tiedTo === undefined ? undefined : shardOf.get(tensor.tiedTo);
    if (partner !== undefined) {
      partner.push(tensor);
      continue;
    }
    const bytes = plannedBytes(tensor);
    if (size + bytes > shardSize) {
      shards.push([]);
      size = 0;
    }
    shards.at(-1)!.push(tensor);
    shardOf.set(tensor.name, shards.at(-1)!);
    size += bytes;
  }
  return shards;
}

function safetensorsFile(
  name: string,
  tensors: readonly PlannedTensor[],
  { metadata, inPlanOrder }: LayoutOptions,
): FileLayout {
  const plan = tensors.map((tensor) => {
    const dtype = safetensorsDtype(plannedEncoding(tensor));
    if (dtype !== undefined && tensor.tiedTo === undefined) return { name: tensor.name, shape: tensor.shape, dtype };
    throw badInput('safetensors cannot hold this tensor', {
      where: `tensor ${JSON.stringify(tensor.name)}`,
      got: tensor.tiedTo === undefined ? encodingName(plannedEncoding(tensor)) : `tied to ${tensor.tiedTo}`,
    });
  });
  const { header, offsets, size } = buildSafetensorsHeader(plan, metadata, inPlanOrder);
  const extents = tensors.map((tensor) => ({
    names: [planKey(tensor)],
    position: offsets.get(tensor.name)!,
    bytes: plannedBytes(tensor),
  }));
  return { name, size, extents: inOrder(extents), pieces: [{ position: 0, bytes: header }] };
}

/** One safetensors file for each file name that the tensors say. */
function nativeFiles(options: LayoutOptions): FileLayout[] {
  const byFile = new Map<string, PlannedTensor[]>();
  for (const tensor of options.tensors) {
    const { file } = tensor;
    if (file === undefined) throw bug('A tensor of a native shard names no file', { where: `tensor ${tensor.name}` });
    const group = byFile.get(file);
    if (group === undefined) byFile.set(file, [tensor]);
    else group.push(tensor);
  }
  return [...byFile].map(([file, tensors]) => safetensorsFile(file, tensors, options));
}

/** Weights begin at whole pages from this size on, so that they can be mapped. */
const mapped = 2 ** 20;

/** model.onnx.data with all weights, and model.onnx, the graph that points into it. */
function onnxFiles({ tensors, onnx }: LayoutOptions): FileLayout[] {
  if (onnx === undefined) throw bug('ONNX output without a graph');
  const location = 'model.onnx.data';
  let end = 0;
  const extents = tensors.map((tensor): Extent => {
    const bytes = plannedBytes(tensor);
    const step = bytes >= mapped ? 4096 : 64;
    const position = Math.ceil(end / step) * step;
    end = position + bytes;
    return { names: [tensor.name], position, bytes };
  });
  const weights = tensors.map((tensor, i) => ({
    ...{ name: tensor.name, shape: tensor.shape, encoding: plannedEncoding(tensor), location },
    offset: extents[i]!.position,
  }));
  const bytes = encodeOnnx(onnx, weights);
  return [
    { name: location, size: end, extents, pieces: [], readThrough: 'model.onnx' },
    { name: 'model.onnx', size: bytes.length, extents: [], pieces: [{ position: 0, bytes }] },
  ];
}

function ggufFile(name: string, tensors: readonly PlannedTensor[], { gguf }: LayoutOptions): FileLayout {
  if (gguf === undefined) throw bug('GGUF output without metadata');
  const plan = tensors.map((tensor) => ({ ...tensor, encoding: plannedEncoding(tensor) }));
  const { header, offsets, size } = buildGgufHeader(gguf, plan);
  const extents = tensors.map((tensor) => ({
    names: [tensor.name],
    position: offsets.get(tensor.name)!,
    bytes: plannedBytes(tensor),
  }));
  return { name, size, extents, pieces: [{ position: 0, bytes: header }] };
}

function torchFile(name: string, tensors: readonly PlannedTensor[]): FileLayout {
  const plan = tensors.map((tensor) => ({ ...tensor, encoding: plannedEncoding(tensor) }));
  const layout = layoutTorch(plan, extname(name) === '' ? name : stemOf(name));
  const namesAt = new Map<number, string[]>(layout.storages.map(({ position }) => [position, []]));
  for (const [tensor, position] of layout.offsets) namesAt.get(position)!.push(tensor);
  const extents = layout.storages.map((storage) => ({ names: namesAt.get(storage.position)!, ...storage }));
  return {
    name,
    size: layout.size,
    extents,
    pieces: layout.pieces,
    afterExtent: layout.afterStorage,
    tail: layout.tail,
  };
}

const inOrder = (extents: readonly Extent[]): Extent[] =>
  [...extents].sort((a, b) => a.position - b.position || a.bytes - b.bytes);
