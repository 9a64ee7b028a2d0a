import { bug } from '../../base/errors.js';
import type { Block, Model, TensorSpec } from '../../arch/types.js';
import type { WeightReader } from '../../arch/weights.js';
import { fill, gather, random } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { LearningWeights } from '../../tune/weights.js';
import { hiddenMap } from '../pass.js';
import { learning } from '../student.js';
import type { Choice } from './importance.js';

/** Which rows, and which columns, of a teacher's tensor the student takes; undefined: all. A vector has only rows. */
interface Cut {
  readonly rows?: readonly number[];
  readonly columns?: readonly number[];
}

/** A student's weights in fp32, all of which learn. */
export interface Student {
  readonly model: Model;
  readonly outer: LearningWeights;
  readonly blocks: readonly LearningWeights[];
}

/** A student that begins with parts of its teacher's weights. */
export async function cutStudent(
  teacher: Model,
  reader: WeightReader,
  model: Model,
  choice: Choice,
  scope: Scope,
  dtype: 'f32' | 'bf16',
): Promise<Student> {
  const outerCuts = cutsOutside(teacher, choice);
  const outer = await made(required(model.outer), undefined, dtype, (spec) =>
    cut(reader, spec.name, outerCuts.get(spec.name), scope),
  );
  const blocks: LearningWeights[] = [];
  for (const [k, block] of model.blocks.entries()) {
    const from = teacher.blocks[choice.layers[k]!]!;
    const cuts = cutsWithin(from, choice, k);
    const weights = await made(required(block.tensors), block, dtype, ({ name }) => {
      const source = from.name + name.slice(block.name.length);
      return cut(reader, source, cuts.get(source), scope);
    });
    blocks.push(weights);
  }
  return { model, outer, blocks };
}

/** A student that begins as a model does that is trained from scratch: normal weights, norms of one, biases of zero. */
export async function randomStudent(model: Model, seed: number, scope: Scope, dtype: 'f32' | 'bf16'): Promise<Student> {
  const given = model.config.initializer_range;
  const deviation = typeof given === 'number' && given > 0 ? given : 0.02;
  let stream = 0;
  const value = ({ name, shape }: TensorSpec) => {
    const tensor = scope.empty('f32', shape);
    if (shape.length > 1) random(tensor, 'normal', seed + 2 ** 32 * ++stream, 0, deviation);
    else fill(tensor, name.endsWith('.bias') ? 0 : 1);
    return Promise.resolve(tensor);
  };
  const outer = await made(required(model.outer), undefined, dtype, value);
  const blocks: LearningWeights[] = [];
  for (const block of model.blocks) blocks.push(await made(required(block.tensors), block, dtype, value));
  return { model, outer, blocks };
}

/** The map of hidden states [student's width, teacher's], each channel to the one that it was; undefined: same widths. */
export function startOfMap(
  { hidden }: Model,
  { channels }: Choice,
  scope: Scope,
  dtype: 'f32' | 'bf16',
): LearningWeights | undefined {
  if (channels.length === hidden) return undefined;
  const values = new Float32Array(channels.length * hidden);
  channels.forEach((channel, row) => (values[row * hidden + channel] = 1));
  const value = scope.from('f32', [channels.length, hidden], values);
  return new LearningWeights([], [learning([hiddenMap], value, undefined)], undefined, dtype);
}

const required = (specs: readonly TensorSpec[]): TensorSpec[] => specs.filter(({ optional }) => !optional);

async function made(
  specs: readonly TensorSpec[],
  block: Block | undefined,
  dtype: 'f32' | 'bf16',
  value: (spec: TensorSpec) => Promise<Tensor>,
): Promise<LearningWeights> {
  const units = [];
  for (const spec of specs) {
    const tensor = await value(spec);
    if (tensor.shape.join() !== spec.shape.join()) throw bug(`${spec.name} was cut to [${tensor.shape.join(', ')}]`);
    units.push(learning([spec.name], tensor, block?.index));
  }
  return new LearningWeights([], units, undefined, dtype);
}

function cutsOutside({ outer, norm }: Model, { channels }: Choice): Map<string, Cut> {
  const vector = `${norm.name}.weight`;
  return new Map(outer.map(({ name }) => [name, name === vector ? { rows: channels } : { columns: channels }]));
}

function cutsWithin({ norms, attention, ffn }: Block, choice: Choice, k: number): Map<string, Cut> {
  const { channels } = choice;
  const { q, k: keys, v, o, headDim } = attention.grouped!;
  const { gate, up, down } = ffn!;
  const wide = (heads: readonly number[]) => heads.flatMap((h) => Array.from({ length: headDim }, (_, d) => h * headDim + d)); // prettier-ignore
  const [heads, groups] = [wide(choice.heads[k]!), wide(choice.groups[k]!)];
  const neurons = choice.neurons[k]!;
  const cuts = new Map<string, Cut>();
  for (const { name } of [norms.attention, norms.feedForward]) cuts.set(`${name}.weight`, { rows: channels });
  for (const [{ name }, rows, columns] of [
    [q, heads, channels],
    [keys, groups, channels],
    [v, groups, channels],
    [o, channels, heads],
    [gate, neurons, channels],
    [up, neurons, channels],
    [down, channels, neurons],
  ] as const) {
    cuts.set(`${name}.weight`, { rows, columns });
    cuts.set(`${name}.bias`, { rows });
  }
  return cuts;
}

/** A tensor's chosen rows and columns, f32 in memory of its own. What has no cut (norms within a head) is taken whole. */
async function cut(reader: WeightReader, name: string, { rows, columns }: Cut = {}, scope: Scope): Promise<Tensor> {
  using work = new Scope(scope.device);
  const whole = await reader.tensor(name, work, 'f32');
  const indices = (list: readonly number[]) => work.from('i32', [list.length], Int32Array.from(list));
  let matrix = whole.view(whole.dim(0), -1);
  if (rows) matrix = gather(work, matrix, indices(rows), 0);
  if (columns) matrix = gather(work, matrix, indices(columns), 1);
  const own = work.move(matrix, scope);
  return whole.shape.length === 1 ? own.view(-1) : own;
}
