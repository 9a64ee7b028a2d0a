import { Random } from '../base/rng.js';
import { assign, binary, copyInto, gather, gemm, matmulT, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { membership } from './masks.js';
import { evenRows } from './sample.js';

const iterations = 8;
/** Tokens whose energies describe a neuron to the clustering. */
const featureTokens = 4096;

/**
 * Balanced k-means of neurons by when they fire: features are the square roots of a neuron's energies on sampled
 * tokens, scaled to length 1, centres start by k-means++ (Arthur & Vassilvitskii 2007), and each assignment is a
 * balanced one. `z` f32 [T, n]: energies of the neurons in question. Returns the expert of each.
 */
export async function clusterNeurons(
  device: Scope['device'],
  z: Tensor,
  capacities: Int32Array,
  seed: number,
): Promise<Int32Array> {
  const n = z.dim(1);
  const experts = capacities.length;
  if (experts === 1) return new Int32Array(n);
  using scope = new Scope(device);
  const features = neuronFeatures(scope, z);
  let centres = await firstCentres(scope, features, experts, new Random(seed, 1));
  let assigned: Int32Array = new Int32Array(n).fill(-1);
  const prices = new Float64Array(experts);
  for (let i = 0; i < iterations; i++) {
    using step = new Scope(device);
    const next = await assign(affinity(step, features, centres), capacities, prices);
    let moved = 0;
    for (let neuron = 0; neuron < n; neuron++) if (next[neuron] !== assigned[neuron]) moved++;
    assigned = next;
    if (moved <= n / 200) break;
    scope.free(centres);
    centres = means(scope, features, assigned, capacities);
  }
  return assigned;
}

/** f32 [n, tokens], rows of length 1 (silent neurons: 0). */
function neuronFeatures(scope: Scope, z: Tensor): Tensor {
  using work = new Scope(scope.device);
  const rows = evenRows(work, z, featureTokens);
  unary(work, 'sqrt', rows, 0, 0, rows);
  const features = scope.empty('f32', [z.dim(1), rows.dim(0)]);
  copyInto(features, rows.transpose());
  const lengths = reduce(work, 'sumsq', features, 1);
  unary(work, 'affine', lengths, 1, 1e-30, lengths);
  unary(work, 'rsqrt', lengths, 0, 0, lengths);
  return binary(work, 'mul', features, lengths.view(-1, 1), { out: features });
}

/** [experts, tokens]: each next centre is a neuron drawn by its squared distance to the nearest centre so far. */
async function firstCentres(scope: Scope, features: Tensor, experts: number, random: Random): Promise<Tensor> {
  const n = features.dim(0);
  const nearest = new Float64Array(n).fill(2);
  const chosen: number[] = [];
  while (chosen.length < experts) {
    const pick = draw(nearest, random);
    chosen.push(pick);
    using work = new Scope(scope.device);
    const similarity = await matmulT(work, features, features.slice(0, pick, pick + 1)).float32();
    for (let i = 0; i < n; i++) nearest[i] = Math.min(nearest[i]!, Math.max(0, 2 - 2 * similarity[i]!));
    nearest[pick] = 0;
  }
  using work = new Scope(scope.device);
  return gather(scope, features, work.from('i32', [experts], Int32Array.from(chosen)));
}

function draw(weights: Float64Array, random: Random): number {
  let left = random.uniform() * weights.reduce((a, b) => a + b, 0);
  for (let i = 0; i < weights.length; i++) {
    left -= weights[i]!;
    if (left < 0) return i;
  }
  // All weights are zero: fewer distinct neurons than centres.
  return random.below(weights.length);
}

/** 2 f.c - |c|^2 for each neuron and centre: larger is nearer. [n, experts]. */
function affinity(s: Scope, features: Tensor, centres: Tensor): Tensor {
  const squares = reduce(s, 'sumsq', centres, 1);
  return matmulT(s, features, centres, { alpha: 2, bias: unary(s, 'neg', squares) });
}

/** Centre of each expert's neurons: [experts, tokens]. */
function means(scope: Scope, features: Tensor, assigned: Int32Array, capacities: Int32Array): Tensor {
  using work = new Scope(scope.device);
  const sums = gemm(scope, membership(work, assigned, capacities.length).transpose(), features);
  const parts = Float32Array.from(capacities, (size) => 1 / Math.max(1, size));
  return binary(scope, 'mul', sums, work.from('f32', [parts.length, 1], parts), { out: sums });
}
