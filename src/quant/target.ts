import type { JobEnv } from '../backend/env.js';
import type { TensorSink } from '../checkpoint/types.js';
import type { LayoutWriter, StoredTensor } from '../layout/types.js';
import type { WeightReader } from '../arch/weights.js';
import { cast, dequantize } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { writeThrough, type OutputPlan } from './output.js';
import type { LinearPlan } from './plan.js';
import type { Coded } from './rtn.js';
import type { Scheme } from './scheme.js';

/** What a linear was before, for targets with grids of their own. */
export interface Source {
  /** f32 [N, K] as stored (padded). */
  readonly weight: Tensor;
  /** Mean squared activation of each input channel, f32 [K]. */
  readonly energy: Tensor | undefined;
  /** The same on the host, and how many tokens it is of. */
  readonly statistics: { readonly energy: Float32Array; readonly tokens: number } | undefined;
}

export interface Stored {
  /** The tensors of the output that are complete with this linear; they are written before the next call. */
  readonly tensors: readonly StoredTensor[];
  /** The weights f32 [N, K] that readers will see, where they are not those of the codes. */
  readonly values?: Tensor;
}

/** How quantized linears, and everything else, get into the output. */
export interface Target {
  store(scope: Scope, plan: LinearPlan, scheme: Scheme, coded: Coded, source: Source): Stored;
  /** Writes what a block holds beside quantized linears and `made` tensors; block -1 is what lies outside the blocks. */
  writeThrough(block: number, writer: TensorSink, made?: ReadonlySet<string>): Promise<void>;
  close?(): Promise<void>;
}

const left = ({ through }: OutputPlan, block: number, made?: ReadonlySet<string>) =>
  (through.get(block) ?? []).filter(({ planned }) => !made?.has(planned.name));

/** Safetensors in a storage layout: each linear becomes a few tensors. */
export const layoutTarget = (layout: LayoutWriter, output: OutputPlan, reader: WeightReader, env: JobEnv): Target => ({
  store: (scope, { stored, dtype }, scheme, coded) => ({
    tensors: layout.store(scope, stored, scheme, coded, dtype),
  }),
  writeThrough: (block, writer, made) =>
    writeThrough(left(output, block, made), writer, reader, () => new Scope(env.device)),
});

/** Plain safetensors: the weights that the codes stand for, in the model's own precision. */
export const plainTarget = (output: OutputPlan, reader: WeightReader, env: JobEnv): Target => ({
  store: (scope, { stored, dtype }, _scheme, { codes, grid }) => {
    const tensor = dequantize(scope, codes, grid, dtype);
    const values = dtype === 'f32' ? tensor : cast(scope, tensor, 'f32');
    return { tensors: [{ name: `${stored.name}.weight`, tensor }], values };
  },
  writeThrough: (block, writer, made) =>
    writeThrough(left(output, block, made), writer, reader, () => new Scope(env.device)),
});
