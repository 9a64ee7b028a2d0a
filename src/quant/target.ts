import type { JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { LayoutWriter, StoredTensor } from '../layout/types.js';
import type { WeightReader } from '../arch/weights.js';
import { Scope } from '../tensor/tensor.js';
import { writeThrough, type OutputPlan } from './output.js';
import type { LinearPlan } from './plan.js';
import type { Coded } from './rtn.js';
import type { Scheme } from './scheme.js';

/** How quantized linears, and everything else, get into the output. */
export interface Target {
  /** The tensors of the output that are complete with this linear; they are written before the next call. */
  store(scope: Scope, plan: LinearPlan, scheme: Scheme, coded: Coded): StoredTensor[];
  /** Writes what a block holds beside quantized linears; block -1 is what lies outside the blocks. */
  writeThrough(block: number, writer: CheckpointWriter): Promise<void>;
}

/** Safetensors in a storage layout: each linear becomes a few tensors. */
export const layoutTarget = (layout: LayoutWriter, output: OutputPlan, reader: WeightReader, env: JobEnv): Target => ({
  store: (scope, { stored, dtype }, scheme, coded) => layout.store(scope, stored, scheme, coded, dtype),
  writeThrough: (block, writer) =>
    writeThrough(output.through.get(block) ?? [], writer, reader, () => new Scope(env.device)),
});
