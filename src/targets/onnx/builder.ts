import { bug } from '../../base/errors.js';
import type { DType } from '../../base/dtype.js';
import type { OnnxAttribute, OnnxConstant, OnnxNodeSpec } from '../../formats/onnx-writer.js';
import type { LinearSpec } from '../../nn/calls.js';
import type { OutputTensor } from '../types.js';

/** onnxruntime's own operators. */
export const microsoft = 'com.microsoft';

/** Linears of one input that became one matrix. */
export interface FusedLinears {
  readonly kind: 'qkv' | 'gate-up';
  readonly linears: readonly LinearSpec[];
}

export interface NodeOptions {
  readonly domain?: string;
  readonly attributes?: Readonly<Record<string, OnnxAttribute>>;
  /** How many outputs, or their names ('' leaves one out); default one. */
  readonly outputs?: number | readonly string[];
}

/** Collects nodes and weights of a graph. Values are named after the node that makes them. */
export class GraphBuilder {
  readonly nodes: OnnxNodeSpec[] = [];
  readonly weights: OutputTensor[] = [];
  /** What was decided on the way, one sentence each. */
  readonly notes = new Set<string>();
  readonly fused: FusedLinears[] = [];
  readonly #names = new Set<string>();
  readonly #constants = new Map<string, string>();
  readonly #weightNames = new Set<string>();

  /** `dtype`: what the graph computes in. */
  constructor(readonly dtype: 'f32' | 'f16') {}

  /** Adds a node; gives the names of its outputs. `name` is a path: `/model/layers.0/mlp/Mul`. */
  many(op: string, name: string, inputs: readonly string[], options: NodeOptions = {}): string[] {
    const own = this.#unique(name);
    const { outputs = 1 } = options;
    const values = typeof outputs === 'number' ? Array.from({ length: outputs }, (_, i) => `${own}/output_${i}`) : [...outputs]; // prettier-ignore
    this.nodes.push({
      ...{ op, name: own, inputs, outputs: values, domain: options.domain ?? '', attributes: options.attributes ?? {} },
    });
    return values;
  }

  node(op: string, name: string, inputs: readonly string[], options: NodeOptions = {}): string {
    return this.many(op, name, inputs, options)[0]!;
  }

  /** Integers in the graph itself; a scalar where `shape` is []. */
  ints(values: readonly number[], shape: readonly number[] = [values.length]): string {
    const data = BigInt64Array.from(values, BigInt);
    return this.#constant({ dtype: 'i64', shape, bytes: new Uint8Array(data.buffer) }, `i64_${values.join('_')}`);
  }

  /** Numbers of the graph's own precision. */
  scalar(value: number, dtype: 'f32' | 'f16' = this.dtype): string {
    const bytes = dtype === 'f32' ? new Uint8Array(Float32Array.of(value).buffer) : new Uint8Array(Uint16Array.of(halfBits(value)).buffer); // prettier-ignore
    return this.#constant({ dtype, shape: [], bytes }, `${dtype}_${value}`);
  }

  /** A tensor of the output; the same one may be asked for again. */
  weight(tensor: OutputTensor): string {
    const { name } = tensor.planned;
    if (!this.#weightNames.has(name)) {
      this.#weightNames.add(name);
      this.weights.push(tensor);
    }
    return name;
  }

  cast(x: string, name: string, to: DType): string {
    const types: Partial<Record<DType, number>> = { f32: 1, i32: 6, i64: 7, f16: 10, bool: 9 };
    const int = types[to];
    if (int === undefined) throw bug(`cast to ${to}`);
    return this.node('Cast', name, [x], { attributes: { to: { int } } });
  }

  reshape(x: string, name: string, shape: readonly number[]): string {
    return this.node('Reshape', name, [x, this.ints(shape)]);
  }

  /** Pieces of the last dimension. */
  split(x: string, name: string, sizes: readonly number[], axis = -1): string[] {
    return this.many('Split', name, [x, this.ints(sizes)], {
      outputs: sizes.length,
      attributes: { axis: { int: axis } },
    });
  }

  /** Constants are nodes, not initializers: shape inference sees them, and readers of weights do not. */
  #constant(constant: OnnxConstant, label: string): string {
    const key = `${label}_${constant.shape.join('x')}`;
    let value = this.#constants.get(key);
    if (value === undefined) {
      const name = `/constants/${key.slice(0, 80)}`;
      value = this.node('Constant', name, [], { attributes: { value: { constant } } });
      this.#constants.set(key, value);
    }
    return value;
  }

  #unique(name: string): string {
    let own = name;
    for (let i = 1; this.#names.has(own); i++) own = `${name}_${i}`;
    this.#names.add(own);
    return own;
  }
}

/** The nearest fp16 of a small constant, as bits; ties and subnormals do not occur here, values beyond become infinite. */
export function halfBits(value: number): number {
  const bits = new Uint32Array(Float32Array.of(value).buffer)[0]!;
  const sign = (bits >>> 16) & 0x8000;
  const exponent = ((bits >>> 23) & 255) - 127 + 15;
  if (exponent >= 31) return sign | 0x7c00;
  if (exponent <= 0) return sign;
  const rounded = ((exponent << 10) | ((bits & 0x7fffff) >>> 13)) + ((bits >>> 12) & 1);
  return sign | rounded;
}
