import { badInput } from '../base/errors.js';
import { dtypeSize, elementCount, type FloatDType } from '../base/dtype.js';
import type { OpenModel } from '../arch/open.js';
import type { LinearSpec } from '../nn/calls.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { matMulNBitsWriter } from '../layout/matmulnbits-writer.js';
import type { Scheme } from '../layout/types.js';
import { buildOnnx } from '../targets/onnx/decoder.js';
import { genaiConfig } from '../targets/onnx/genai.js';
import type { OutputTensor } from '../targets/types.js';
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
  readonly shapeOf: (name: string) => readonly [number, number];
}

/**
 * A model as an ONNX graph in `dtype` (f16, or f32 by default: CPUs multiply nothing else). Linears that are stored as
 * codes which MatMulNBits can say stay codes.
 */
export function planOnnxOutput(open: OpenModel, wanted: FloatDType | undefined): OnnxPlan {
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
  const of = (linear: LinearSpec) => ({ stored: linear, scheme: schemeOf(linear) });
  const { graph, weights, cache } = buildOnnx(model, dtype, { of, accuracy: 0 });
  const computed = new Map<string, Float32Array>();
  const tensors: PlannedConversion[] = [];
  for (const { planned, origin } of weights) {
    if (origin.kind === 'computed') computed.set(planned.name, origin.values());
    else tensors.push(planOne(open, { planned, origin }, schemes));
  }
  const { quantization_config: _q, compression_config: _c, torch_dtype: _t, ...config } = open.checkpoint.config;
  const padId = typeof config.pad_token_id === 'number' ? config.pad_token_id : undefined;
  const carried = open.coverage.carried.length;
  return {
    tensors,
    outputs: weights.map(({ planned }) => planned),
    computed,
    onnx: graph,
    extraFiles: new Map([['genai_config.json', `${JSON.stringify(genaiConfig(model, cache, padId), null, 2)}\n`]]),
    config: { ...config, dtype: dtype === 'f32' ? 'float32' : 'float16' },
    notes: [...refusals, ...(carried > 0 ? [`${carried} tensors beyond the language model are not part of the graph.`] : [])],
    shapeOf: (name) => open.spec(name)!.shape as [number, number],
  }; // prettier-ignore
}

function planOne(
  open: OpenModel,
  { planned, origin }: OutputTensor,
  schemes: ReadonlyMap<string, Scheme>,
): PlannedConversion {
  const writes = elementCount(planned.shape) * dtypeSize(planned.dtype);
  if (origin.kind === 'linear') {
    const { linear, entry } = open.tensors.get(`${origin.name}.weight`)!;
    const reads = [...linear!.parts.values()].reduce((sum, { span }) => sum + span.bytes, 0);
    const repack = { of: origin.name, scheme: schemes.get(origin.name)! };
    const common = { name: planned.name, shape: planned.shape, action: 'repack' as const, reads, writes, repack };
    return { ...common, from: `${linear!.bits}-bit codes`, to: planned.dtype, entry, output: planned };
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
