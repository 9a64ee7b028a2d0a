import { createRequire } from 'node:module';
import type onnxProto from 'onnx-proto';
import type { DType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import { encodedBytes } from './ggml.js';
import type { Encoding } from './types.js';

const require = createRequire(import.meta.url);

/** A small constant that lies in the graph itself: shapes, indices, limits. */
export interface OnnxConstant {
  readonly dtype: DType;
  readonly shape: readonly number[];
  readonly bytes: Uint8Array;
}

export type OnnxAttribute =
  | { readonly int: number }
  | { readonly float: number }
  | { readonly ints: readonly number[] }
  | { readonly text: string }
  | { readonly constant: OnnxConstant };

export interface OnnxNodeSpec {
  readonly op: string;
  /** '' is ONNX's own. */
  readonly domain: string;
  readonly name: string;
  /** '' leaves an optional input out. */
  readonly inputs: readonly string[];
  readonly outputs: readonly string[];
  readonly attributes: Readonly<Record<string, OnnxAttribute>>;
}

/** An input or output of the graph; text names a dimension that varies. */
export interface OnnxValue {
  readonly name: string;
  readonly dtype: DType;
  readonly shape: readonly (number | string)[];
}

/** A graph without its weights, which are external data and named by the tensors of the output. */
export interface OnnxGraph {
  readonly name: string;
  readonly nodes: readonly OnnxNodeSpec[];
  readonly inputs: readonly OnnxValue[];
  readonly outputs: readonly OnnxValue[];
  readonly opsets: Readonly<Record<string, number>>;
  readonly producer: { readonly name: string; readonly version: string };
  readonly metadata: Readonly<Record<string, string>>;
}

/** A weight in a file beside the model. */
export interface OnnxExternal {
  readonly name: string;
  readonly shape: readonly number[];
  readonly encoding: Encoding;
  readonly location: string;
  readonly offset: number;
}

/** TensorProto.DataType by our names. */
const typeNumbers: Partial<Record<DType, number>> = {
  f32: 1, u8: 2, i8: 3, u16: 4, i16: 5, i32: 6, i64: 7, bool: 9, f16: 10, f64: 11, u32: 12, u64: 13, bf16: 16,
}; // prettier-ignore

/** AttributeProto.AttributeType. */
const attributeTypes = { float: 1, int: 2, text: 3, constant: 4, ints: 7 };
/** IR 10 goes with opset 21, which onnxruntime has read since 1.18. */
const irVersion = 10;
/** The default of protobuf readers, and what protobuf itself can encode. */
const mostBytes = 2 ** 31 - 1;

function typeNumber(dtype: DType, where: string): number {
  const number = typeNumbers[dtype];
  if (number !== undefined) return number;
  throw badInput('ONNX cannot hold this element type here', { where, got: dtype });
}

function attribute(name: string, value: OnnxAttribute): object {
  if ('float' in value) return { name, type: attributeTypes.float, f: value.float };
  if ('int' in value) return { name, type: attributeTypes.int, i: value.int };
  if ('text' in value) return { name, type: attributeTypes.text, s: Buffer.from(value.text) };
  if ('ints' in value) return { name, type: attributeTypes.ints, ints: [...value.ints] };
  const { dtype, shape, bytes } = value.constant;
  const t = { dims: [...shape], dataType: typeNumber(dtype, name), rawData: bytes };
  return { name, type: attributeTypes.constant, t };
}

function valueInfo({ name, dtype, shape }: OnnxValue): object {
  const dim = shape.map((size) => (typeof size === 'number' ? { dimValue: size } : { dimParam: size }));
  return { name, type: { tensorType: { elemType: typeNumber(dtype, name), shape: { dim } } } };
}

function initializer({ name, shape, encoding, location, offset }: OnnxExternal): object {
  if (encoding.kind !== 'plain') throw badInput('ONNX holds plain tensors only', { where: `tensor ${name}` });
  const entries = { location, offset: String(offset), length: String(encodedBytes(shape, encoding)) };
  return {
    name,
    dims: [...shape],
    dataType: typeNumber(encoding.dtype, `tensor ${name}`),
    externalData: Object.entries(entries).map(([key, value]) => ({ key, value })),
    dataLocation: 1,
  };
}

/**
 * The bytes of a model file whose weights are external data.
 * Errors: element types that ONNX does not know; a graph of 2 GiB.
 */
export function encodeOnnx(graph: OnnxGraph, weights: readonly OnnxExternal[]): Buffer {
  // Here, not at the top: it takes longer to load than the rest of a command that writes no ONNX.
  const { onnx } = require('onnx-proto') as typeof onnxProto;
  const message = onnx.ModelProto.fromObject({
    irVersion,
    opsetImport: Object.entries(graph.opsets).map(([domain, version]) => ({ domain, version })),
    producerName: graph.producer.name,
    producerVersion: graph.producer.version,
    metadataProps: Object.entries(graph.metadata).map(([key, value]) => ({ key, value })),
    graph: {
      name: graph.name,
      node: graph.nodes.map(({ op, domain, name, inputs, outputs, attributes }) => ({
        opType: op,
        domain,
        name,
        input: [...inputs],
        output: [...outputs],
        attribute: Object.entries(attributes).map(([key, value]) => attribute(key, value)),
      })),
      initializer: weights.map(initializer),
      input: graph.inputs.map(valueInfo),
      output: graph.outputs.map(valueInfo),
    },
  });
  const bytes = onnx.ModelProto.encode(message).finish();
  if (bytes.length > mostBytes) throw badInput('The graph is too large for an ONNX file', { got: `${bytes.length} bytes` }); // prettier-ignore
  return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length);
}
