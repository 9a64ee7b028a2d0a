import type { FloatDType } from '../base/dtype.js';
import type { JobEnv } from '../backend/env.js';
import type { OpenModel } from '../arch/open.js';
import type { WeightReader } from '../arch/weights.js';
import type { TensorSink } from '../checkpoint/types.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { matMulNBitsWriter } from '../layout/matmulnbits-writer.js';
import { cast, copyInto } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import { buildOnnx } from '../targets/onnx/decoder.js';
import { genaiConfig } from '../targets/onnx/genai.js';
import { plannedBytes, type OutputPlan, type OutputTensor } from './output.js';
import type { QuantPlan } from './plan.js';
import type { Target } from './target.js';

export interface OnnxOutput {
  readonly plan: OutputPlan;
  readonly graph: OnnxGraph;
  readonly extraFiles: ReadonlyMap<string, string>;
}

/** An ONNX graph in f32 whose quantized linears are MatMulNBits. */
export function planOnnx(open: OpenModel, plan: QuantPlan): OnnxOutput {
  const { model, checkpoint } = open;
  const { graph, weights, cache } = buildOnnx(model, 'f32', {
    of: (linear) => plan.linears.get(linear.name) ?? { stored: linear },
    accuracy: 0,
  });
  const blockOf = new Map(model.blocks.flatMap(({ index, tensors }) => tensors.map(({ name }) => [name, index] as const)));
  const through = new Map<number, OutputTensor[]>();
  for (const tensor of weights) {
    if (tensor.origin.kind === 'linear') continue;
    const block = tensor.origin.kind === 'values' ? (blockOf.get(tensor.origin.name) ?? -1) : -1;
    through.set(block, [...(through.get(block) ?? []), tensor]);
  }
  const bytes = weights.reduce((sum, { planned }) => sum + plannedBytes(planned), 0);
  const pad = checkpoint.config.pad_token_id;
  const genai = genaiConfig(model, cache, typeof pad === 'number' ? pad : undefined);
  return {
    plan: { tensors: weights, through, bytes },
    graph,
    extraFiles: new Map([['genai_config.json', `${JSON.stringify(genai, null, 2)}\n`]]),
  };
} // prettier-ignore

/** Codes as MatMulNBits; everything else in the graph's precision, matrices as [K, N]. */
export const onnxTarget = (output: OutputPlan, reader: WeightReader, env: JobEnv): Target => ({
  store: (scope, { stored }, scheme, coded) => ({
    tensors: matMulNBitsWriter.store(scope, stored, scheme, coded, 'f32'),
  }),
  writeThrough: async (block, writer) => {
    for (const tensor of output.through.get(block) ?? []) await writeOne(tensor, reader, env, writer);
  },
});

async function writeOne(
  { planned, origin }: OutputTensor,
  reader: WeightReader,
  env: JobEnv,
  writer: TensorSink,
): Promise<void> {
  using scope = new Scope(env.device);
  const { name, shape, dtype } = planned;
  if (origin.kind === 'computed') {
    await writer.write(name, cast(scope, scope.from('f32', shape, origin.values()), dtype).source());
  } else if (origin.kind === 'values') {
    const read = await reader.tensor(origin.name, scope, dtype as FloatDType);
    const values = origin.transposed ? read.transpose() : read;
    const out = scope.zeros(dtype, shape);
    copyInto(values.shape.reduce((part, size, d) => part.slice(d, 0, size), out), values); // prettier-ignore
    await writer.write(name, out.source());
  }
}
