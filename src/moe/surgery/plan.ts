import { badInput, badUsage } from '../../base/errors.js';
import { dtypeSize, elementCount, type FloatDType } from '../../base/dtype.js';
import { formatBytes } from '../../base/files.js';
import { buildModel } from '../../arch/registry.js';
import type { OpenModel } from '../../arch/open.js';
import type { Model, MoeSpec } from '../../arch/types.js';
import { requireComplete, throughTensor, type OutputTensor } from '../output.js';
import type { SurgeryKind, SurgeryOptions } from './options.js';

export interface SurgeryPlan {
  readonly kind: SurgeryKind;
  /** Experts a layer before and after, and how many a token takes. */
  readonly experts: readonly [before: number, after: number];
  readonly active: number;
  /** Groups that lose the same number each, so that group-limited routing stays what it is. */
  readonly groups: number;
  /** What the output is to be read as. */
  readonly model: Model;
  readonly config: Readonly<Record<string, unknown>>;
  readonly tensors: readonly OutputTensor[];
  readonly inputBytes: number;
  readonly outputBytes: number;
  readonly cost: SurgeryCost;
  readonly notes: readonly string[];
}

/** FLOP of one token (routed and shared experts alone, and everything), bytes of weights that it reads, and weights: before and after. */
export interface SurgeryCost {
  readonly ffnFlops: readonly [number, number];
  readonly flops: readonly [number, number];
  readonly bytes: readonly [number, number];
  readonly parameters: readonly [number, number];
}

const expertKeys = ['n_routed_experts', 'num_local_experts', 'num_experts'] as const;
const furtherKeys = ['num_nextn_predict_layers', 'num_mtp_layers'] as const;

/**
 * Decides, from headers alone, what the output will be.
 * Errors: dense models, layers of different numbers of experts, experts that are looked up by token; more experts than
 * there are, fewer than a token takes, numbers that the groups do not divide.
 */
export function planSurgery(open: OpenModel, { kind, keep }: Pick<SurgeryOptions, 'kind' | 'keep'>): SurgeryPlan {
  const { model, checkpoint } = open;
  const moe = requireMixture(model, checkpoint.path);
  const groups = moe.layer.route.groups ?? 1;
  requireCount(moe, keep, groups, kind);
  const fewer = keep < moe.experts;
  const dropped = fewer ? model.carried.filter((prefix) => /\.layers\.\d+\.$/.test(prefix)) : [];
  const config = changedConfig(model.config, keep, fewer);
  const output = buildModel(config, `the config with ${keep} experts made from ${checkpoint.path}`);
  const stored = [...open.tensors.values()];
  const isDropped = (name: string) => dropped.some((prefix) => name.startsWith(prefix));
  const tensors = planTensors(open, output, isDropped);
  const bytesOf = (t: OutputTensor) => elementCount(t.planned.shape) * dtypeSize(t.planned.dtype);
  const lost = stored.some(({ name }) => isDropped(name));
  const unpacked = stored.some(({ linear, entry }) => linear !== undefined || entry.encoding.kind !== 'plain');
  const notes = [
    ...(keep === moe.experts ? [`The model has ${keep} experts a layer already: every weight stays as it is.`] : []),
    ...(lost ? ['The layers that predict further tokens are left out: their experts see no calibration text, and engines give them as many as the others have.'] : []),
    ...(unpacked ? ['Quantized weights are written in full precision: quantize the output again.'] : []),
  ]; // prettier-ignore
  return {
    kind,
    experts: [moe.experts, keep],
    active: moe.active,
    groups,
    model: output,
    config,
    tensors,
    inputBytes: [...checkpoint.tensors.values()].reduce((sum, { span }) => sum + span.bytes, 0),
    outputBytes: tensors.reduce((sum, tensor) => sum + bytesOf(tensor), 0),
    cost: costOf(open, tensors, output),
    notes,
  };
}

/** Layers that are dense stay as they are; the others have to be alike. */
function requireMixture(model: Model, where: string): MoeSpec {
  const first = model.blocks.find((block) => block.moe)?.moe;
  if (!first) {
    throw badInput('The model has no experts', {
      where,
      got: `model_type ${model.modelType}, dense`,
      expected: 'a mixture of experts',
      hint: 'To make a mixture of it: deepseek-convert moe with --experts and --active.',
    });
  }
  for (const { name, moe } of model.blocks) {
    if (!moe) continue;
    if (moe.layer.byToken) {
      throw badInput('Experts that are looked up by token cannot be pruned or merged: each token names the ones it needs', { where: `${where}, ${name} (${model.modelType})` }); // prettier-ignore
    }
    if (moe.experts === first.experts) continue;
    throw badInput('The layers have different numbers of experts, but the config has one number', {
      where: `${where}, ${name}`,
      got: String(moe.experts),
      expected: String(first.experts),
    });
  }
  return first;
}

function requireCount({ experts, active, layer }: MoeSpec, keep: number, groups: number, kind: SurgeryKind): void {
  const flag = `--${kind}-experts ${keep}`;
  const { topGroups = groups, groupScore } = layer.route;
  // As many as a token takes have to lie in the groups that are searched; a group scored by its two best needs two.
  const least = Math.max(groups * Math.ceil(active / topGroups), groupScore === 'top2' && groups > 1 ? 2 * groups : 1);
  const range = `${Math.max(least, active)} to ${experts}${groups > 1 ? `, a multiple of the ${groups} groups` : ''}`;
  if (!Number.isSafeInteger(keep) || keep > experts || keep < 1) {
    throw badUsage(keep > experts ? 'More experts to keep than there are' : 'The number of experts to keep is no number of experts', { got: `${flag}, the model has ${experts}`, expected: range }); // prettier-ignore
  }
  if (keep % groups !== 0) {
    throw badUsage('The groups that routing is limited to would have different numbers of experts', { got: `${flag} in ${groups} groups`, expected: range }); // prettier-ignore
  }
  if (keep >= Math.max(least, active)) return;
  throw badUsage('Fewer experts than a token takes', {
    got: `${flag}, ${active} active${groups > 1 ? ` out of ${topGroups} of ${groups} groups` : ''}`,
    expected: range,
  });
}

/** The config with another number of experts, wherever it stands; no trace of a quantization. */
function changedConfig(config: Readonly<Record<string, unknown>>, keep: number, fewer: boolean) {
  const { quantization_config: _, ...rest } = config;
  const changed: Record<string, unknown> = { ...rest };
  for (const key of expertKeys) if (typeof changed[key] === 'number') changed[key] = keep;
  for (const key of furtherKeys) if (fewer && typeof changed[key] === 'number') changed[key] = 0;
  // Of models that see, the language model's settings lie one level below.
  const inner = changed.text_config;
  if (inner !== null && typeof inner === 'object') changed.text_config = changedConfig(inner as Record<string, unknown>, keep, fewer); // prettier-ignore
  return changed;
}

/** The model's own tensors in its order; those of routers and experts are made when their block comes by. */
function planTensors(open: OpenModel, output: Model, isDropped: (name: string) => boolean): OutputTensor[] {
  const { model } = open;
  const tensors: OutputTensor[] = [];
  const through = (name: string, block: number) => {
    if (open.tensors.has(name)) tensors.push(throughTensor(open, name, block));
  };
  for (const { name } of model.outer) through(name, -1);
  for (const [i, block] of model.blocks.entries()) {
    const after = output.blocks[i]!;
    const made = after.moe && madeTensors(open, block.moe!, after.moe);
    for (const { name, shape } of after.tensors) {
      const dtype = made?.get(name);
      if (dtype === undefined) through(name, block.index);
      else tensors.push({ planned: { name, shape, dtype }, origin: { kind: 'made' }, block: block.index });
    }
  }
  for (const [name, { sources }] of open.tensors) {
    const carried = model.carried.some((prefix) => name.startsWith(prefix));
    if (carried && !isDropped(name) && sources[0] === name) through(name, -1);
  }
  requireComplete(tensors, output);
  return tensors;
}

/** Names of the tensors of the routed part, each with its type: the source's. */
function madeTensors(open: OpenModel, before: MoeSpec, after: MoeSpec): Map<string, FloatDType> {
  const made = new Map<string, FloatDType>();
  const router = `${after.router.name}.weight`;
  made.set(router, storedAs(open, [router]));
  const bias = after.layer.routeBias;
  if (bias !== undefined) made.set(bias, storedAs(open, [bias]));
  for (const part of ['gate', 'up', 'down'] as const) {
    const dtype = storedAs(
      open,
      before.expertLinears.map((expert) => `${expert[part].name}.weight`),
    );
    for (const expert of after.expertLinears) made.set(`${expert[part].name}.weight`, dtype);
  }
  return made;
}

/** The type that tensors share; bf16 for quantized ones, f32 where they differ. */
function storedAs(open: OpenModel, names: readonly string[]): FloatDType {
  const types = new Set(
    names.map((name): FloatDType => {
      const { entry, linear } = open.tensors.get(name)!;
      const plain = !linear && entry.encoding.kind === 'plain' ? entry.encoding.dtype : undefined;
      if (plain === 'f32' || plain === 'f16' || plain === 'bf16') return plain;
      return open.spec(name)?.f32 ? 'f32' : 'bf16';
    }),
  );
  return types.size === 1 ? [...types][0]! : 'f32';
}

/** Bytes of a weight as it is stored in the input, with its share of scales. */
function storedBytes({ tensors, checkpoint }: OpenModel, name: string): number {
  const { entry, linear, sources } = tensors.get(name)!;
  const count = elementCount(entry.shape);
  if (linear) return sources.reduce((sum, part) => sum + (checkpoint.tensors.get(part)?.span.bytes ?? 0), 0) / count;
  return entry.encoding.kind === 'plain' ? dtypeSize(entry.encoding.dtype) : entry.span.bytes / count;
}

function costOf(open: OpenModel, made: readonly OutputTensor[], after: Model): SurgeryCost {
  const before = open.model;
  const written = new Map(made.map(({ planned }) => [planned.name, dtypeSize(planned.dtype)]));
  const count = ({ blocks, head, tied, outer }: Model, bytesEach: (name: string) => number) => {
    let [ffn, rest, parameters] = [0, head.inFeatures * head.outFeatures, head.inFeatures * head.outFeatures];
    let bytes = rest * bytesEach(tied ? outer[0]!.name : `${head.name}.weight`);
    for (const { linears, moe } of blocks) {
      for (const { name, role, inFeatures, outFeatures } of linears.flat()) {
        const size = inFeatures * outFeatures;
        const read = role === 'expert' ? (size * moe!.active) / moe!.experts : size;
        parameters += size;
        if (role === 'attention' || role === 'other') rest += read;
        else ffn += read;
        bytes += read * bytesEach(`${name}.weight`);
      }
    }
    return { ffn, all: ffn + rest, parameters, bytes };
  };
  const [a, b] = [count(before, (name) => storedBytes(open, name)), count(after, (name) => written.get(name)!)];
  return {
    ffnFlops: [2 * a.ffn, 2 * b.ffn],
    flops: [2 * a.all, 2 * b.all],
    bytes: [a.bytes, b.bytes],
    parameters: [a.parameters, b.parameters],
  };
}

/** For --dry-run and the log. */
export function describeSurgery({
  kind,
  experts,
  active,
  groups,
  inputBytes,
  outputBytes,
  cost,
  notes,
  tensors,
}: SurgeryPlan): string[] {
  // prettier-ignore
  const [before, after] = experts;
  const ratio = ([a, b]: readonly [number, number]) => `${((100 * b) / a).toFixed(1)}%`;
  const grouped = groups > 1 ? `, ${before / groups} -> ${after / groups} in each of ${groups} groups` : '';
  return [
    `${kind}: ${before} -> ${after} experts a layer, ${active} active${grouped}`,
    `${formatBytes(inputBytes)} -> ${formatBytes(outputBytes)}, ${tensors.length} tensors; ${ratio(cost.parameters)} of the weights`,
    `per token: ${ratio(cost.ffnFlops)} of the feed-forward FLOP, ${ratio(cost.flops)} of all FLOP, ${ratio(cost.bytes)} of the weight bytes read: a token takes as many experts as before`,
    ...notes,
  ];
}
