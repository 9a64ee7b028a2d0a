import { badInput } from '../base/errors.js';
import { dtypeSize, elementCount, type FloatDType } from '../base/dtype.js';
import type { OpenModel } from '../arch/open.js';
import type { StoredWeight } from '../arch/stored.js';
import type { LinearSpec } from '../nn/calls.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { assembled, asStored } from '../formats/assembly.js';
import { matMulNBitsWriter, nBitsBlock } from '../layout/matmulnbits-writer.js';
import type { LinearShape, Scheme } from '../layout/types.js';
import { buildOnnx } from '../targets/onnx/decoder.js';
import { genaiConfig } from '../targets/onnx/genai.js';
import type { Fusing } from '../targets/onnx/linear.js';
import type { Fusion } from './fusion.js';
import type { OutputTensor, SharedRows } from '../targets/types.js';
import type { PlannedTensor } from '../checkpoint/types.js';
import { planTensor, type PlannedConversion } from './convert-tensor.js';

export interface OnnxPlan {
  readonly tensors: readonly PlannedConversion[];
  readonly outputs: readonly PlannedTensor[];
  readonly computed: ReadonlyMap<string, Float32Array>;
  readonly onnx: OnnxGraph;
  readonly extraFiles: ReadonlyMap<string, string>;
  readonly config: Readonly<Record<string, unknown>>;
  readonly notes: readonly string[];
  /** Tensors of the graph that are several of the source. */
  readonly joined: ReadonlyMap<string, StoredWeight>;
  readonly fusions: readonly Fusion[];
}

/**
 * A model as an ONNX graph in `dtype` (f16, or f32 by default: CPUs multiply nothing else). Linears that are stored as
 * codes which MatMulNBits can say stay codes.
 */
export function planOnnxOutput(
  open: OpenModel,
  wanted: FloatDType | undefined,
  fuse: ReadonlySet<Fusing> = new Set(),
): OnnxPlan {
  if (wanted === 'bf16') {
    throw badInput('onnxruntime computes in f32 or f16', { got: '--dtype bf16', expected: '--dtype f32 or f16' });
  }
  const dtype = wanted ?? 'f32';
  const { model } = open;
  const schemes = new Map<string, Scheme>();
  const refusals = new Set<string>();
  const schemeOf = ({ name, inFeatures, outFeatures }: LinearSpec): Scheme | undefined => {
    const scheme = open.tensors.get(`${name}.weight`)?.linear?.scheme;
    if (scheme === undefined) return undefined;
    const reason = matMulNBitsWriter.refuse({ name, inFeatures, outFeatures }, scheme);
    if (reason === undefined) schemes.set(name, scheme);
    else refusals.add(`${reason} It is decoded.`);
    return schemes.get(name);
  };
  const refuse = (linear: LinearSpec): string | undefined =>
    open.tensors.get(`${linear.name}.weight`)?.linear && !schemeOf(linear) ? 'their codes are decoded' : undefined;
  const of = (linear: LinearSpec) => ({ stored: linear, scheme: schemeOf(linear) });
  const { graph, weights, cache, notes, fused } = buildOnnx(model, dtype, { of, refuse, accuracy: 0, fuse });
  const computed = new Map<string, Float32Array>();
  const joined = new Map<string, StoredWeight>();
  const tensors: PlannedConversion[] = [];
  for (const { planned, origin } of weights) {
    if (origin.kind === 'computed') computed.set(planned.name, origin.values());
    else if (origin.kind === 'joined') {
      const tensor = planJoined(open, planned, origin);
      const { name, shape, entry } = tensor;
      joined.set(name, { name, shape, entry, sources: origin.names, files: [entry.span.path] });
      tensors.push(tensor);
    } else tensors.push(planOne(open, { planned, origin }, (name) => rowsOf(open, name, schemes.get(name)!)));
  }
  const { quantization_config: _q, compression_config: _c, torch_dtype: _t, ...config } = open.checkpoint.config;
  const padId = typeof config.pad_token_id === 'number' ? config.pad_token_id : undefined;
  const carried = open.coverage.carried.length;
  return {
    tensors,
    outputs: weights.map(({ planned }) => planned),
    computed,
    joined,
    fusions: fused.map(({ kind, linears }) => fusionOf(open, kind, linears, dtype)),
    onnx: graph,
    extraFiles: new Map([['genai_config.json', `${JSON.stringify(genaiConfig(model, cache, padId), null, 2)}\n`]]),
    config: { ...config, dtype: dtype === 'f32' ? 'float32' : 'float16' },
    notes: [...refusals, ...notes, ...(carried > 0 ? [`${carried} tensors beyond the language model are not part of the graph.`] : [])],
  }; // prettier-ignore
}

function planOne(
  open: OpenModel,
  { planned, origin }: OutputTensor,
  rowsOf: (linear: string) => SharedRows,
): PlannedConversion {
  const writes = elementCount(planned.shape) * dtypeSize(planned.dtype);
  if (origin.kind === 'linear' || origin.kind === 'rows') {
    const repack = origin.kind === 'rows' ? origin.rows : rowsOf(origin.name);
    const linears = repack.parts.map(({ linear }) => open.tensors.get(`${linear.name}.weight`)!);
    const parts = linears.flatMap(({ linear }) => [...linear!.parts.values()]);
    const reads = parts.reduce((sum, { span }) => sum + span.bytes, 0);
    const common = { name: planned.name, shape: planned.shape, action: 'repack' as const, reads, writes, repack };
    const { entry } = linears[0]!;
    return { ...common, from: `${repack.scheme.bits}-bit codes`, to: planned.dtype, entry, output: planned };
  }
  const { name, transposed } = origin as Extract<typeof origin, { kind: 'values' }>;
  const { entry, linear } = open.tensors.get(name)!;
  const { shape } = open.spec(name)!;
  if (!linear && !transposed) {
    const plan = planTensor({ ...entry, name, shape }, planned.dtype as FloatDType);
    if (plan.to === planned.dtype) return { ...plan, output: planned };
  }
  const reads = linear ? [...linear.parts.values()].reduce((sum, { span }) => sum + span.bytes, 0) : entry.span.bytes;
  const from = linear ? `${linear.bits}-bit codes` : planTensor(entry, undefined).from;
  return {
    ...{ name, shape, action: 'decode', from, to: planned.dtype, reads, writes, entry, output: planned },
    ...(transposed && { transposed }),
  };
}

const rowsOf = (open: OpenModel, name: string, scheme: Scheme): SharedRows => {
  const [outFeatures, inFeatures] = open.spec(`${name}.weight`)!.shape as [number, number];
  const linear: LinearShape = { name, inFeatures, outFeatures };
  return { module: name, scheme, block: nBitsBlock(inFeatures, scheme)!, parts: [{ linear, at: 0, step: 1 }] };
};

/** Matrices or biases one below the other. */
function planJoined(
  open: OpenModel,
  planned: PlannedTensor,
  { names, transposed }: Extract<OutputTensor['origin'], { kind: 'joined' }>,
): PlannedConversion {
  const entries = names.map((name) => ({ ...open.tensors.get(name)!.entry, shape: open.spec(name)!.shape }));
  const { name } = planned;
  const shape = transposed ? planned.shape.toReversed() : planned.shape;
  const entry = assembled(name, shape, 0, entries.map(asStored));
  return {
    ...{ name, shape, action: 'decode', from: planTensor(entry, undefined).from, to: planned.dtype, entry },
    reads: entries.reduce((sum, { span }) => sum + span.bytes, 0),
    writes: elementCount(shape) * dtypeSize(planned.dtype),
    output: planned,
    ...(transposed && { transposed }),
  };
}

function fusionOf(open: OpenModel, kind: Fusing, linears: readonly LinearSpec[], dtype: FloatDType): Fusion {
  const names = linears.map(({ name }) => name);
  const parts = linears.map(({ name, inFeatures, outFeatures }) => {
    const { linear, entry } = open.tensors.get(`${name}.weight`)!;
    const before = linear
      ? [...linear.parts.values()].reduce((sum, { span }) => sum + span.bytes, 0)
      : entry.span.bytes;
    return { before, after: linear ? before : inFeatures * outFeatures * dtypeSize(dtype) };
  });
  const sum = (key: 'before' | 'after') => parts.reduce((total, part) => total + part[key], 0);
  // Our reader takes fused matrices of graphs apart.
  return { kind, from: names, into: names, bytes: { before: sum('before'), after: sum('after') } };
}
