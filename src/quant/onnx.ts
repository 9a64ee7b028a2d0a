import type { FloatDType } from '../base/dtype.js';
import type { JobEnv } from '../backend/env.js';
import type { OpenModel } from '../arch/open.js';
import type { WeightReader } from '../arch/weights.js';
import { bug } from '../base/errors.js';
import type { TensorSink, PlannedTensor } from '../checkpoint/types.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { matMulNBitsWriter, placeRows, type RowPlace } from '../layout/matmulnbits-writer.js';
import type { StoredTensor } from '../layout/types.js';
import { cast, copyInto } from '../tensor/ops.js';
import { Scope } from '../tensor/tensor.js';
import type { SharedRows } from '../targets/types.js';
import { buildOnnx } from '../targets/onnx/decoder.js';
import { genaiConfig } from '../targets/onnx/genai.js';
import { plannedBytes, type OutputPlan, type OutputTensor } from './output.js';
import type { LinearPlan, QuantPlan } from './plan.js';
import type { Coded } from './rtn.js';
import type { Scheme } from './scheme.js';
import type { Stored, Target } from './target.js';

export interface OnnxOutput {
  readonly plan: OutputPlan;
  readonly graph: OnnxGraph;
  readonly extraFiles: ReadonlyMap<string, string>;
  readonly notes: readonly string[];
}

/** An ONNX graph in f32 whose quantized linears are MatMulNBits. */
export function planOnnx(open: OpenModel, plan: QuantPlan): OnnxOutput {
  const { model, checkpoint } = open;
  const { graph, weights, cache, notes } = buildOnnx(model, 'f32', {
    of: (linear) => plan.linears.get(linear.name) ?? { stored: linear },
    accuracy: 0,
  });
  const blockOf = new Map(model.blocks.flatMap(({ index, tensors }) => tensors.map(({ name }) => [name, index] as const)));
  const through = new Map<number, OutputTensor[]>();
  for (const tensor of weights) {
    if (tensor.origin.kind === 'linear' || tensor.origin.kind === 'rows') continue;
    const block = tensor.origin.kind === 'values' ? (blockOf.get(tensor.origin.name) ?? -1) : -1;
    through.set(block, [...(through.get(block) ?? []), tensor]);
  }
  const bytes = weights.reduce((sum, { planned }) => sum + plannedBytes(planned), 0);
  const pad = checkpoint.config.pad_token_id;
  const genai = genaiConfig(model, cache, typeof pad === 'number' ? pad : undefined);
  return {
    plan: { tensors: weights, through, bytes },
    graph,
    notes,
    extraFiles: new Map([['genai_config.json', `${JSON.stringify(genai, null, 2)}\n`]]),
  };
} // prettier-ignore

interface Stack {
  readonly scope: Scope;
  readonly tensors: readonly StoredTensor[];
  left: number;
}

/** Codes as MatMulNBits or QMoE; everything else in the graph's precision, matrices as [K, N]. */
export class OnnxTarget implements Target {
  readonly #shared = new Map<string, { readonly rows: SharedRows; readonly place: RowPlace }>();
  readonly #planned = new Map<string, PlannedTensor[]>();
  readonly #stacks = new Map<string, Stack>();

  constructor(
    readonly output: OutputPlan,
    readonly reader: WeightReader,
    readonly env: JobEnv,
  ) {
    for (const { planned, origin } of output.tensors) {
      if (origin.kind !== 'rows') continue;
      const { rows } = origin;
      this.#planned.set(rows.module, [...(this.#planned.get(rows.module) ?? []), planned]);
      for (const place of rows.parts) this.#shared.set(place.linear.name, { rows, place });
    }
  }

  store(scope: Scope, { stored }: LinearPlan, scheme: Scheme, coded: Coded): Stored {
    const shared = this.#shared.get(stored.name);
    const own = matMulNBitsWriter.store(scope, stored, scheme, coded, 'f32', shared?.rows.block);
    if (!shared) return { tensors: own };
    const { rows, place } = shared;
    const stack = this.#stackOf(rows);
    const count = rows.parts.reduce((sum, { linear }) => sum + linear.outFeatures, 0);
    for (const [i, { tensor }] of own.entries()) placeRows(stack.tensors[i]!.tensor, count, tensor, place);
    return { tensors: --stack.left === 0 ? stack.tensors : [] };
  }

  #stackOf({ module, parts }: SharedRows): Stack {
    let stack = this.#stacks.get(module);
    if (!stack) {
      const scope = new Scope(this.env.device);
      const planned = this.#planned.get(module)!;
      stack = {
        scope,
        tensors: planned.map(({ name, dtype, shape }) => ({ name, tensor: scope.empty(dtype, shape) })),
        left: parts.length,
      };
      this.#stacks.set(module, stack);
    }
    return stack;
  }

  async writeThrough(block: number, writer: TensorSink): Promise<void> {
    const open = [...this.#stacks].find(([, { left }]) => left > 0);
    if (open) throw bug('Linears that share a tensor were not all quantized', { where: open[0] });
    await this.close();
    for (const tensor of this.output.through.get(block) ?? []) await writeOne(tensor, this.reader, this.env, writer);
  }

  /** Frees what a block's linears were gathered in. */
  close(): Promise<void> {
    for (const { scope } of this.#stacks.values()) scope[Symbol.dispose]();
    this.#stacks.clear();
    return Promise.resolve();
  }
}

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
