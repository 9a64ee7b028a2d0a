import { stopIfAborted, type JobEnv } from '../../backend/env.js';
import { forwardContext } from '../../arch/context.js';
import type { Block } from '../../arch/types.js';
import { normalise } from '../../nn/norm.js';
import { answer, run } from '../../nn/run.js';
import type { Call } from '../../nn/calls.js';
import { add, binary, reduce, unary } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import type { Teacher } from '../pass.js';
import type { Shape } from './shape.js';

/** What a teacher's parts do on text (Muralidharan et al. 2024, section 2.2). */
export interface Importance {
  /** Of each layer: 1 - the mean cosine of its input and output (block influence, Men et al. 2024). */
  readonly layers: readonly number[];
  /** Of each hidden channel: mean magnitudes behind all norms, added up. */
  readonly channels: ArrayLike<number>;
  /** [layer][head]: mean length of the head's output. */
  readonly heads: readonly ArrayLike<number>[];
  /** [layer][neuron]: mean magnitude of the activation in front of down_proj. */
  readonly neurons: readonly ArrayLike<number>[];
}

/** Parts of the teacher that make the student, each list ascending; heads, groups and neurons by kept layer. */
export interface Choice {
  readonly layers: readonly number[];
  readonly channels: readonly number[];
  /** Groups of heads that share keys and values, by the number of their key/value head. */
  readonly groups: readonly (readonly number[])[];
  readonly heads: readonly (readonly number[])[];
  readonly neurons: readonly (readonly number[])[];
}

export interface ImportanceOptions {
  readonly env: JobEnv;
  readonly teacher: Teacher;
  /** [n, length]. */
  readonly tokens: Int32Array;
  readonly n: number;
  readonly length: number;
  readonly microBatch: number;
  readonly resumeHint: string;
}

/** Sums over sequences of squared means over a sequence: what tokens of one sequence add to counts by its mean. */
class Sums {
  readonly #byName = new Map<string, Tensor>();
  readonly #scope: Scope;

  constructor(scope: Scope) {
    this.#scope = scope;
  }

  /** `x` [B S, N] or [B S, N, D]: magnitudes of values, or of vectors of D. */
  add(name: string, x: Tensor, batch: number): void {
    using work = new Scope(x.device);
    const n = x.dim(1);
    const size = x.shape.length === 3 ? unary(work, 'sqrt', reduce(work, 'sumsq', x, 2)) : unary(work, 'abs', x);
    const means = reduce(work, 'mean', size.view(batch, -1, n), 1);
    const squares = reduce(work, 'sumsq', means, 0);
    const known = this.#byName.get(name);
    if (known) add(work, known, squares, known);
    else this.#byName.set(name, work.move(squares, this.#scope));
  }

  async get(name: string): Promise<Float32Array> {
    return (await this.#byName.get(name)!.float32()).map(Math.sqrt);
  }
}

/** Runs the teacher over the text once and measures what each of its parts contributes. */
export async function measureImportance(o: ImportanceOptions): Promise<Importance> {
  const { env, teacher, n, length, microBatch } = o;
  const { model, outer, blocks } = teacher;
  using scope = new Scope(env.device);
  const sums = new Sums(scope);
  const cosines = scope.zeros('f32', [model.blocks.length]);
  for (let row = 0; row < n; row += microBatch) {
    stopIfAborted(env, o.resumeHint);
    using work = new Scope(env.device);
    const batch = Math.min(microBatch, n - row);
    const ids = o.tokens.subarray(row * length, (row + batch) * length);
    const context = (weights: Teacher['outer']) => forwardContext(work, model, weights, batch, length);
    let x = model.embed(work.from('i32', [batch, length], ids), context(outer));
    for (const [i, block] of model.blocks.entries()) {
      const ctx = context(blocks[i]!);
      const y = run(block.forward(x, ctx), ctx, (call) => (watch(sums, block, call, batch), answer(call, ctx)));
      addCosine(cosines.slice(0, i, i + 1), x, y, 1 / (n * length));
      work.free(x);
      x = y;
    }
    sums.add('channels', normalise(model.norm, x, context(outer)), batch);
    // Ops are only enqueued: without this wait all batches' memory would be taken at once.
    await env.device.sync();
    env.log.progress({ stage: 'importance', done: row + batch, total: n });
  }
  const of = (part: string) => Promise.all(model.blocks.map(({ index }) => sums.get(`${part} ${index}`)));
  const behind = [await sums.get('channels'), ...(await of('attention')), ...(await of('feed-forward'))];
  return {
    layers: Array.from(await cosines.float32(), (cosine) => 1 - cosine),
    channels: behind[0]!.map((_, c) => behind.reduce((sum, values) => sum + values[c]!, 0)),
    heads: await of('heads'),
    neurons: await of('neurons'),
  };
}

function watch(sums: Sums, { index, attention, ffn }: Block, call: Call, batch: number): void {
  if (call.kind !== 'linear') return;
  const { q, o, headDim } = attention.grouped!;
  const { x } = call;
  switch (call.linears[0]!.name) {
    case q.name:
      return sums.add(`attention ${index}`, x, batch);
    case o.name:
      return sums.add(`heads ${index}`, x.view(x.dim(0), -1, headDim), batch);
    case ffn!.gate.name:
      return sums.add(`feed-forward ${index}`, x, batch);
    case ffn!.down.name:
      return sums.add(`neurons ${index}`, x, batch);
  }
}

/** sum f32 [1] += weight x the cosines of rows of x and y [T, C]. */
function addCosine(sum: Tensor, x: Tensor, y: Tensor, weight: number): void {
  using work = new Scope(x.device);
  const energies = binary(work, 'mul', reduce(work, 'sumsq', x, 1), reduce(work, 'sumsq', y, 1));
  // A state of zeros has no direction.
  const lengths = unary(work, 'clamp', unary(work, 'sqrt', energies), 1e-30, 1e30);
  const cosines = binary(work, 'div', reduce(work, 'sum', binary(work, 'mul', x, y), 1), lengths);
  binary(work, 'add', sum, reduce(work, 'sum', cosines, 0).view(1), { alpha: weight, out: sum });
}

/** The most important parts, as many as `shape` has. Where a group of heads goes, all of it goes. */
export function choose({ layers, channels, heads, neurons }: Importance, shape: Shape, full: Shape): Choice {
  const group = full.heads / full.kvHeads;
  const kept = largest(layers, shape.layers);
  const groups = kept.map((i) => {
    const sums = upTo(full.kvHeads).map((g) => upTo(group).reduce((sum, h) => sum + heads[i]![g * group + h]!, 0));
    return largest(sums, shape.kvHeads);
  });
  return {
    layers: kept,
    channels: largest(channels, shape.hidden),
    groups,
    heads: kept.map((i, k) =>
      groups[k]!.flatMap((g) => {
        const members = Array.from(heads[i]!).slice(g * group, (g + 1) * group);
        return largest(members, shape.heads / shape.kvHeads).map((h) => g * group + h);
      }),
    ),
    neurons: kept.map((i) => largest(neurons[i]!, shape.intermediate)),
  };
}

/** For a student that takes nothing over: layers evenly spread, which its own stand for. */
export function evenChoice(shape: Shape, full: Shape): Choice {
  const layers = upTo(shape.layers).map((i) => Math.ceil((i * full.layers) / shape.layers));
  const each = (n: number) => layers.map(() => upTo(n));
  return {
    layers,
    channels: upTo(shape.hidden),
    groups: each(shape.kvHeads),
    heads: each(shape.heads),
    neurons: each(shape.intermediate),
  };
}

const upTo = (n: number): number[] => Array.from({ length: n }, (_, i) => i);

/** Indices of the `count` largest values, ascending; of equal ones the first. */
function largest(values: ArrayLike<number>, count: number): number[] {
  const order = upTo(values.length).sort((a, b) => values[b]! - values[a]! || a - b);
  return order.slice(0, count).sort((a, b) => a - b);
}
