import type { FloatDType } from '../base/dtype.js';
import type { Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { Weights } from '../nn/calls.js';
import type { Block } from '../arch/types.js';
import type { WeightReader } from '../arch/weights.js';
import { copyInto, fill, random } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { dropNeurons } from './drop.js';
import type { Weighting } from './containers/types.js';
import { writeThrough } from './output.js';
import { ffnOf, type MoePlan } from './plan.js';
import type { FfnWeights } from './sample.js';
import type { MoeShape } from './shape.js';
import { cut, type Experts } from './split.js';
import type { StandingTest } from './standing-test.js';
import { LayerStore } from './store.js';

/** Deviation of a fresh router's weights. */
const routerDeviation = 0.02;

/**
 * Sparse upcycling (Komatsuzaki et al. 2023): every expert is a copy of the dense network. With weights that sum to one
 * the output is the dense one whatever the router says, so the router starts small and random, for training to shape.
 */
export function copies(s: Scope, shape: MoeShape, w: FfnWeights, weighting: Weighting, dtype: FloatDType): Experts {
  using work = new Scope(s.device);
  const count = shape.routed + shape.shared;
  const [ffn, hidden] = [shape.ffn, w.gate.dim(1)];
  const gate = work.empty(dtype, [count * ffn, hidden]);
  const up = work.empty(dtype, [count * ffn, hidden]);
  const down = work.empty('f32', [hidden, count * ffn]);
  for (let e = 0; e < count; e++) {
    const [from, to] = [e * ffn, (e + 1) * ffn];
    copyInto(gate.slice(0, from, to), w.gate);
    copyInto(up.slice(0, from, to), w.up);
    copyInto(down.slice(1, from, to), w.down);
  }
  return cut(s, shape, { gate, up, down }, weighting, dtype);
}

/** f32 [R, C], normal, the same for the same seed and layer. */
export function freshRouter(s: Scope, shape: MoeShape, hidden: number, seed: number, layer: number): Tensor {
  const weight = s.empty('f32', [shape.routed, hidden]);
  random(weight, 'normal', seed * 65_536 + layer + 1, 0, routerDeviation);
  return weight;
}

export interface CopyOptions {
  readonly env: JobEnv;
  readonly plan: MoePlan;
  readonly writer: CheckpointWriter;
  readonly reader: WeightReader;
  readonly check: StandingTest;
  readonly seed: number;
  /** Share of the neurons of each expert that are drawn anew; 0: none. */
  readonly dropRatio: number;
}

/** Writes a block with copies of its feed-forward part as experts. */
export async function convertCopies(
  block: Block,
  weights: Weights,
  { env, plan, writer, reader, check, seed, dropRatio }: CopyOptions,
): Promise<{ data: Json; detail: string }> {
  using scope = new Scope(env.device);
  await writeThrough(plan.tensors, block.index, writer, reader, env.device);
  let store: LayerStore | undefined;
  if (!plan.source.dense.includes(block.index)) {
    const { shape, weighting, dtype, source, container } = plan;
    const { gate, up, down } = ffnOf(block);
    const [g, u, d] = [gate, up, down].map(({ name }) => weights.get(`${name}.weight`)) as [Tensor, Tensor, Tensor];
    const same = copies(scope, shape, { gate: g, up: u, down: d }, weighting, dtype);
    const bias = container.selectionBias ? scope.empty('f32', [shape.routed]) : undefined;
    if (bias) fill(bias, 0);
    const router = { weight: freshRouter(scope, shape, source.model.hidden, seed, block.index), bias };
    const networks = dropRatio > 0 ? await dropNeurons(scope, same, dropRatio, seed, block.index) : same;
    store = new LayerStore(plan, block.index, networks, router, same);
    await store.write(writer);
  }
  await check.advance(block.index, store, weights);
  await writer.flush();
  await check.flush(block.index);
  return { data: null, detail: store ? `${plan.shape.routed} copies` : 'stays dense' };
}
