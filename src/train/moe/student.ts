import type { FloatDType } from '../../base/dtype.js';
import { withMlp } from '../../arch/decoder.js';
import type { OpenModel } from '../../arch/open.js';
import type { Block, Model } from '../../arch/types.js';
import { WeightReader } from '../../arch/weights.js';
import type { ForwardContext } from '../../nn/calls.js';
import { moeLayer, whole } from '../../nn/moe.js';
import { cast, copyInto } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { Overlay } from '../../tune/weights.js';
import type { MixtureTraining } from './options.js';
import { straightThrough } from './straight-through.js';
import { LearningBlock, scaledUnit, sizedUnit, sizeOf, wholeUnit, type Place, type Unit } from './units.js';

/** Where at least this share of the experts is on, all of them compute every token: it is faster than sorting rows. */
const wholeFrom = 0.25;

/** Whether routers learn along. */
const learnsRouter = ({ part, routerRate }: Pick<MixtureTraining, 'part' | 'routerRate'>): boolean =>
  part === 'router' || routerRate > 0;

/** The mixture with forward passes to train by: the same values from the same tensors. */
export function trainedModel(model: Model, training: Pick<MixtureTraining, 'part' | 'routerRate'>): Model {
  const router = learnsRouter(training);
  const blocks = model.blocks.map((block) => {
    const { moe } = block;
    if (!moe || !(router || moe.active >= wholeFrom * moe.experts)) return block;
    const weigh = (weights: Tensor, logits: Tensor, ctx: ForwardContext) => router ? straightThrough(weights, logits, moe, ctx) : weights; // prettier-ignore
    return withMlp(block, moeLayer(moe.layer, whole(weigh)));
  });
  return { ...model, blocks };
}

/** A block of the mixture whose parts learn as asked; its values live in `scope`. */
export async function learningBlock(
  open: OpenModel,
  block: Block,
  scope: Scope,
  dtype: 'f32' | 'bf16',
  training: Pick<MixtureTraining, 'part' | 'rank' | 'routerRate'> & { readonly seed: number },
): Promise<LearningBlock> {
  const { part, rank, seed, routerRate } = training;
  const reader = new WeightReader(open, scope.device, dtype);
  const units: Unit[] = [];
  const rest = new Overlay();
  const place = (names: readonly string[], more: Partial<Place> = {}): Place => ({
    names,
    stacked: false,
    block: block.index,
    dtype: storedDType(open, names[0]!),
    ...more,
  });
  const add = async (where: Place, read: (into: Scope, as: FloatDType) => Promise<Tensor>): Promise<void> => {
    if (part === 'router') return rest.put(where, await read(scope, dtype));
    const value = await read(scope, 'f32');
    // Zeros that the container wants (biases, gates) stay: learning rates are in parts of a tensor's size.
    if ((await sizeOf(value)) === 0) return rest.put(where, cast(scope, value, dtype));
    if (part === 'full' || value.shape.length === 1) units.push(await wholeUnit(where, value));
    else {
      const low = part === 'lora' ? { rank, seed: seed + 4096 * (block.index + 1) + units.length } : undefined;
      units.push(await scaledUnit(scope, where, value, low));
    }
  };

  const { moe } = block;
  const taken = new Set<string>();
  for (const name of moe ? [`${moe.router.name}.weight`, moe.layer.routeBias] : []) {
    if (name === undefined) continue;
    taken.add(name);
    const where = place([name], { precise: true });
    const stored = await reader.tensor(name, scope, 'f32');
    const size = await sizeOf(stored);
    // A router of zeros is a choice that the bias alone makes.
    if (learnsRouter(training) && size > 0)
      units.push(sizedUnit(scope, where, stored, size, part === 'router' ? 1 : routerRate));
    else rest.put(where, stored);
  }
  for (const which of moe ? (['gate', 'up', 'down'] as const) : []) {
    const names = moe!.expertLinears.map((expert) => `${expert[which].name}.weight`);
    for (const name of names) taken.add(name);
    await add(place(names, { stacked: true }), (into, as) => readStack(reader, names, moe!.expertLinears[0]![which], into, as)); // prettier-ignore
  }
  for (const { name } of block.tensors) {
    if (!taken.has(name) && open.tensors.has(name)) await add(place([name]), (into, as) => reader.tensor(name, into, as)); // prettier-ignore
  }
  return new LearningBlock(units, rest, dtype);
}

/** The same linear of all experts, one under another. */
async function readStack(
  reader: WeightReader,
  names: readonly string[],
  { outFeatures: n, inFeatures: k }: { readonly outFeatures: number; readonly inFeatures: number },
  scope: Scope,
  dtype: FloatDType,
): Promise<Tensor> {
  const all = scope.empty(dtype, [names.length * n, k]);
  for (const [e, name] of names.entries()) {
    using work = new Scope(scope.device);
    copyInto(all.slice(0, e * n, (e + 1) * n), await reader.tensor(name, work, dtype));
  }
  return all;
}

function storedDType(open: OpenModel, name: string): FloatDType {
  const { encoding } = open.tensors.get(name)!.entry;
  return encoding.kind === 'plain' && (encoding.dtype === 'f32' || encoding.dtype === 'f16') ? encoding.dtype : 'bf16';
}
