import { createHash } from 'node:crypto';
import type { Hash } from 'node:crypto';
import { realpathSync, statSync } from 'node:fs';
import { dirname, isAbsolute, join, sep } from 'node:path';
import { badInput } from '../base/errors.js';
import type { ConvertError } from '../base/errors.js';
import { ioError } from '../base/files.js';
import { encodedBytes } from './ggml.js';
import { fieldsOf, Protobuf, text, varints } from './protobuf.js';
import type { Field } from './protobuf.js';
import type { RandomAccess } from './source.js';
import type { Encoding, ParsedFile, TensorEntry } from './types.js';

export interface OnnxNode {
  readonly op: string;
  readonly domain: string;
  readonly name: string;
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  /** Integer attributes (transB, bits, block_size, K, N ...). */
  readonly integers: ReadonlyMap<string, number>;
}

export interface OnnxFile extends ParsedFile {
  readonly nodes: readonly OnnxNode[];
  readonly externalFiles: readonly ExternalFile[];
}

/** A file with external data; `modified` in ms since 1970. */
export interface ExternalFile {
  readonly path: string;
  readonly size: number;
  readonly modified: number;
}

/** TensorProto.DataType. */
const elementTypes: readonly (Encoding | undefined)[] = [
  undefined,
  { kind: 'plain', dtype: 'f32' },
  { kind: 'plain', dtype: 'u8' },
  { kind: 'plain', dtype: 'i8' },
  { kind: 'plain', dtype: 'u16' },
  { kind: 'plain', dtype: 'i16' },
  { kind: 'plain', dtype: 'i32' },
  { kind: 'plain', dtype: 'i64' },
  undefined, // string
  { kind: 'plain', dtype: 'bool' },
  { kind: 'plain', dtype: 'f16' },
  { kind: 'plain', dtype: 'f64' },
  { kind: 'plain', dtype: 'u32' },
  { kind: 'plain', dtype: 'u64' },
  { kind: 'opaque', name: 'C64', bits: 64 },
  { kind: 'opaque', name: 'C128', bits: 128 },
  { kind: 'plain', dtype: 'bf16' },
  { kind: 'plain', dtype: 'f8_e4m3' },
  { kind: 'opaque', name: 'F8_E4M3FNUZ', bits: 8 },
  { kind: 'plain', dtype: 'f8_e5m2' },
  { kind: 'opaque', name: 'F8_E5M2FNUZ', bits: 8 },
  { kind: 'opaque', name: 'U4', bits: 4 },
  { kind: 'opaque', name: 'I4', bits: 4 },
  { kind: 'opaque', name: 'F4', bits: 4 },
  { kind: 'opaque', name: 'F8_E8M0', bits: 8 },
];
/** The largest exported models have some 20,000 nodes and 100,000 initializers. */
const limits = { nodes: 200_000, initializers: 400_000, attributes: 256, dims: 16, nodeBytes: 2 ** 24 };
const noIntegers: ReadonlyMap<string, number> = new Map();

/**
 * Reads the initializers and nodes of an ONNX model. The file is walked field by field: protobuf libraries want all of
 * it in memory (or refuse beyond 2 GiB) and descend without limit. Weights stay where they are, in the file or in
 * external files of the same folder. Constants that are not stored as raw bytes are left out with a note.
 */
export function readOnnx(source: RandomAccess): OnnxFile {
  const proto = new Protobuf(source, 'ONNX model');
  const graph = findGraph(proto);
  const nodes: OnnxNode[] = [];
  const tensors: TensorEntry[] = [];
  const names = new Set<string>();
  const external = new Map<string, ExternalFile>();
  const headers = createHash('sha256').update(`${source.size}\n`);
  let unread = 0;
  for (const field of fieldsOf(proto, graph.start, graph.end)) {
    if (field.number === 1) {
      if (nodes.length >= limits.nodes) throw bad(proto, field, `more than ${limits.nodes} nodes`);
      nodes.push(readNode(proto, field, headers));
    } else if (field.number === 5) {
      if (tensors.length >= limits.initializers)
        throw bad(proto, field, `more than ${limits.initializers} initializers`);
      const tensor = readTensor(proto, field, source.path, external, headers);
      if (tensor === undefined) {
        unread++;
        continue;
      }
      if (names.has(tensor.name)) throw bad(proto, field, `two initializers named ${JSON.stringify(tensor.name)}`);
      names.add(tensor.name);
      tensors.push(tensor);
    }
  }
  const notes = unread > 0 ? [`${unread} constants that are not stored as raw data were left out.`] : [];
  for (const { path, size } of external.values())
    headers.update(`${path.slice(dirname(source.path).length)} ${size}\n`);
  return {
    tensors,
    nodes,
    notes,
    externalFiles: [...external.values()],
    headerHash: headers.digest('hex'),
  };
}

function findGraph(proto: Protobuf): Field {
  let graph: Field | undefined;
  let count = 0;
  for (const field of fieldsOf(proto, 0, proto.source.size))
    if (field.number === 7) [graph, count] = [field, count + 1];
  if (graph?.wire === 2 && count === 1) return graph;
  throw badInput('Not an ONNX model: it has no graph, or several', { where: proto.source.path });
}

const bad = (proto: Protobuf, { start }: Field, what: string): ConvertError =>
  badInput(`Bad ONNX file: ${what}`, { where: `${proto.source.path}, byte ${start}` });

function readNode(proto: Protobuf, field: Field, headers: Hash): OnnxNode {
  if (field.end - field.start > limits.nodeBytes) {
    // A constant's value lies inside of its node; it is no weight.
    return { op: 'Constant', domain: '', name: '', inputs: [], outputs: [], integers: noIntegers };
  }
  headers.update(proto.bytes(field));
  let [op, domain, name] = ['', '', ''];
  const inputs: string[] = [];
  const outputs: string[] = [];
  let integers: Map<string, number> | undefined;
  for (const part of fieldsOf(proto, field.start, field.end)) {
    if (part.number === 1) inputs.push(text(proto, part));
    else if (part.number === 2) outputs.push(text(proto, part));
    else if (part.number === 3) name = text(proto, part);
    else if (part.number === 4) op = text(proto, part);
    else if (part.number === 7) domain = text(proto, part);
    else if (part.number === 5) {
      const [key, value] = readAttribute(proto, part);
      if (value === undefined) continue;
      integers ??= new Map();
      if (integers.size >= limits.attributes) throw bad(proto, part, `more than ${limits.attributes} attributes`);
      integers.set(key, value);
    }
  }
  return { op, domain, name, inputs, outputs, integers: integers ?? noIntegers };
}

/** Name and integer value of an attribute; other kinds of values do not matter here. */
function readAttribute(proto: Protobuf, field: Field): [name: string, value: number | undefined] {
  let name = '';
  let value: number | undefined;
  for (const part of fieldsOf(proto, field.start, field.end)) {
    if (part.number === 1) name = text(proto, part);
    else if (part.number === 3 && part.wire === 0) value = Number(BigInt.asIntN(64, part.value));
  }
  return [name, value];
}

interface Draft {
  name: string;
  dims: number[];
  type: number;
  raw: Field | undefined;
  floats: Field | undefined;
  external: Map<string, string>;
  isExternal: boolean;
}

function readTensor(
  proto: Protobuf,
  field: Field,
  path: string,
  external: Map<string, ExternalFile>,
  headers: Hash,
): TensorEntry | undefined {
  const draft: Draft = { name: '', dims: [], type: 0, raw: undefined, floats: undefined, external: new Map(), isExternal: false }; // prettier-ignore
  for (const part of fieldsOf(proto, field.start, field.end)) {
    if (part.number === 1) draft.dims.push(...varints(proto, part));
    else if (part.number === 2 && part.wire === 0) draft.type = Number(part.value);
    else if (part.number === 4 && part.wire === 2) draft.floats = part;
    else if (part.number === 8) draft.name = text(proto, part);
    else if (part.number === 9 && part.wire === 2) draft.raw = part;
    else if (part.number === 13) readExternal(proto, part, draft.external);
    else if (part.number === 14 && part.wire === 0) draft.isExternal = part.value === 1n;
    else if (part.number === 3) throw bad(proto, part, 'a tensor in segments');
  }
  const { name, dims } = draft;
  const where = `${path}, initializer ${JSON.stringify(name)}`;
  if (dims.length > limits.dims || !Number.isSafeInteger(dims.reduce((n, d) => n * d, 64))) {
    throw badInput('Bad ONNX file: the shape of a tensor overflows', {
      where,
      got: `[${dims.slice(0, 20).join(', ')}]`,
    });
  }
  headers.update(JSON.stringify([name, dims, draft.type, [...draft.external]]));
  const encoding = elementTypes[draft.type];
  if (encoding === undefined) {
    if (draft.type === 8) return undefined;
    throw badInput('Unknown element type of an ONNX tensor', { where, got: `${draft.type}` });
  }
  const bits = encoding.kind === 'opaque' ? encoding.bits : 8 * encodedBytes([1], encoding);
  const bytes = Math.ceil((dims.reduce((n, d) => n * d, 1) * bits) / 8);
  if (draft.isExternal) {
    const span = externalSpan(draft.external, bytes, path, where, external);
    return { name, shape: dims, encoding, span };
  }
  const stored = draft.raw ?? (draft.type === 1 ? draft.floats : undefined);
  if (stored === undefined) return bytes === 0 ? { name, shape: dims, encoding, span: { path, offset: 0, bytes: 0 } } : undefined; // prettier-ignore
  if (stored.end - stored.start !== bytes) {
    throw badInput('Size of an ONNX tensor disagrees with its shape', {
      where,
      expected: `${bytes} bytes for [${dims.join(', ')}]`,
      got: `${stored.end - stored.start} bytes`,
    });
  }
  return { name, shape: dims, encoding, span: { path, offset: stored.start, bytes } };
}

function readExternal(proto: Protobuf, field: Field, into: Map<string, string>): void {
  const pair = { key: '', value: '' };
  for (const part of fieldsOf(proto, field.start, field.end)) {
    if (part.number === 1) pair.key = text(proto, part);
    else if (part.number === 2) pair.value = text(proto, part);
  }
  into.set(pair.key, pair.value);
}

/** A span of a file in the model's own folder: no absolute path, no `..`, no link out of it. */
function externalSpan(
  entries: ReadonlyMap<string, string>,
  bytes: number,
  path: string,
  where: string,
  files: Map<string, ExternalFile>,
): TensorEntry['span'] {
  const location = entries.get('location') ?? '';
  const parts = location.split(/[/\\]/);
  if (
    location === '' ||
    isAbsolute(location) ||
    /^[a-zA-Z]:/.test(location) ||
    parts.includes('..') ||
    location.includes('\0')
  ) {
    throw badInput('External data must lie in the folder of the model', {
      where,
      got: JSON.stringify(location.slice(0, 200)),
    });
  }
  const file = join(dirname(path), location);
  let known = files.get(file);
  if (known === undefined) {
    try {
      const [real, root] = [realpathSync(file), realpathSync(dirname(path))];
      if (!real.startsWith(root + sep)) {
        throw badInput('External data is a link out of the folder', {
          where: file,
          got: real,
          expected: `inside ${root}`,
        });
      }
      const { size, mtimeMs } = statSync(real);
      known = { path: file, size, modified: mtimeMs };
    } catch (error) {
      throw ioError(error, 'open the external data', file);
    }
    files.set(file, known);
  }
  const { size } = known;
  const number = (key: string, otherwise: number): number => {
    const value = entries.get(key);
    if (value === undefined) return otherwise;
    if (/^\d{1,15}$/.test(value)) return Number(value);
    throw badInput(`Bad ${key} of external data`, { where, got: JSON.stringify(value.slice(0, 80)) });
  };
  const offset = number('offset', 0);
  const length = number('length', bytes);
  if (length !== bytes || offset + length > size) {
    throw badInput('External data disagrees with the tensor or its file', {
      where: `${where}, ${file}`,
      expected: `${bytes} bytes within ${size}`,
      got: `${length} bytes from byte ${offset}`,
    });
  }
  return { path: file, offset, bytes };
}
