import { badInput, badUsage } from '../base/errors.js';
import { dtypeSize, elementCount, type FloatDType } from '../base/dtype.js';
import { formatBytes } from '../base/files.js';
import { buildModel } from '../arch/registry.js';
import type { OpenModel } from '../arch/open.js';
import type { Block, FfnSpec, Model } from '../arch/types.js';
import type { PlannedTensor } from '../checkpoint/types.js';
import { containerConfig, containers, requireFit } from './containers/index.js';
import { sourceOf, type Container, type ContainerName, type MoeMethod, type Source, type Weighting } from './containers/types.js'; // prettier-ignore
import { droppedNeurons } from './drop.js';
import { planOutput, type OutputTensor } from './output.js';
import { capacity, expertWidth, partOff, pieces, type GroupLimit, type MoeShape, type Padding } from './shape.js';

export type LayerRange = readonly [from: number, to: number];

/** What decides the form of the output. */
export interface MoeRecipe {
  readonly method: MoeMethod;
  readonly container: ContainerName;
  /** Routed experts, and how many of them a token takes. */
  readonly experts: number;
  readonly active: number;
  /** Experts' worth of neurons that every token takes beside them; default: what the container has to have. */
  readonly shared?: number;
  /** Routing limited to the best of groups of experts. */
  readonly limit?: GroupLimit | undefined;
  /** Layers from the first on that stay dense. */
  readonly dense?: number;
  /** Instead: ranges of the layers that become mixtures, ends included; the others stay dense. */
  readonly layers?: readonly LayerRange[];
  readonly pad?: Padding;
  /** Share of each expert's neurons that `drop` draws anew; default: 0.5 (Nakamura et al. 2025). */
  readonly dropRatio?: number;
}

export const dropRatioOf = ({ method, dropRatio = 0.5 }: Pick<MoeRecipe, 'method' | 'dropRatio'>): number =>
  method === 'drop' ? dropRatio : 0;

export interface MoePlan {
  readonly container: Container;
  readonly source: Source;
  readonly shape: MoeShape;
  readonly weighting: Weighting;
  readonly method: MoeMethod;
  readonly config: Readonly<Record<string, unknown>>;
  /** The mixture, and the same with all experts on. */
  readonly model: Model;
  readonly allOn: Model;
  /** Precision of the experts: the dense weights'. */
  readonly dtype: FloatDType;
  /** Whether the tensors lie in the order of the dense model. */
  readonly tensors: readonly OutputTensor[];
  readonly inputBytes: number;
  readonly outputBytes: number;
  readonly cost: Cost;
  readonly notes: readonly string[];
}

/** Multiply-adds and weight bytes for one token, feed-forward parts and everything, dense and as a mixture. */
export interface Cost {
  readonly ffnFlops: readonly [dense: number, moe: number];
  readonly flops: readonly [dense: number, moe: number];
  readonly bytes: readonly [dense: number, moe: number];
}

/** The feed-forward part of a converted block. */
export function ffnOf(block: Block): FfnSpec {
  if (block.ffn) return block.ffn;
  throw badInput(`${block.name} has no dense gated feed-forward part`);
}

/**
 * Decides, from headers alone, what the output will be.
 * Errors: K > E, widths that do not divide, models that are mixtures already, feed-forward parts without gate, attention
 * that the container does not have.
 */
export function makePlan(open: OpenModel, recipe: MoeRecipe, torch: boolean): MoePlan {
  const { model } = open;
  const where = open.checkpoint.path;
  const container = containers[recipe.container];
  if (container === undefined) {
    throw badUsage(`Unknown container ${recipe.container as string}`, { expected: Object.keys(containers).join(', ') });
  }
  const ffn = requireDense(model, where);
  const dense = denseLayers(recipe, container, model);
  const source = sourceOf(model, dense);
  requireCounts(recipe, container, source);
  requireFit(container, source, where);
  if (recipe.limit) requireLimit(recipe.limit, recipe, container, source);
  const shape = shapeOf(recipe, container, ffn.gate.outFeatures);
  const weighting = container.weighting(recipe.method, shape);
  const config = containerConfig(container, shape, weighting, source);
  const mixture = buildModel(config, `the ${container.name} config made from ${where}`);
  const everything = containerConfig(
    container,
    { ...shape, active: shape.routed, limit: undefined },
    weighting,
    source,
  );
  const allOn = buildModel(everything, 'the config with all experts on');
  const dtype = storedDType(open, ffn);
  const tensors = planOutput(open, { container, source, shape, mixture, dtype, torch });
  const bytesOf = ({ shape: dims, dtype: type }: PlannedTensor) => elementCount(dims) * dtypeSize(type);
  const outputBytes = tensors.reduce((sum, { planned }) => sum + (planned.tiedTo === undefined ? bytesOf(planned) : 0), 0); // prettier-ignore
  return {
    container,
    source,
    shape,
    weighting,
    method: recipe.method,
    config,
    model: mixture,
    allOn,
    dtype,
    tensors,
    inputBytes: [...open.checkpoint.tensors.values()].reduce((sum, { span }) => sum + span.bytes, 0),
    outputBytes,
    cost: costOf(model, shape, dense.length, dtypeSize(dtype)),
    notes: notesOf(shape, weighting, dtype, container, recipe, model),
  };
}

function requireCounts(
  { experts, active, shared, method, dropRatio }: MoeRecipe,
  container: Container,
  source: Source,
): void {
  // prettier-ignore
  if (!Number.isSafeInteger(experts) || experts < 2 || experts > 4096) {
    throw badUsage('--experts must be a whole number from 2 to 4096', { got: String(experts) });
  }
  if (!Number.isSafeInteger(active) || active < 1 || active > experts) {
    throw badUsage('More active experts than there are', {
      got: `--active ${active}, --experts ${experts}`,
      expected: `--active from 1 to ${experts}`,
    });
  }
  const { min, max } = container.shared;
  if (shared !== undefined && !(shared >= min && shared <= max)) {
    const others = Object.values(containers).filter((c) => shared >= c.shared.min && shared <= c.shared.max && c.refuse(source) === undefined); // prettier-ignore
    throw badUsage(`The container ${container.name} cannot have ${shared} shared experts`, {
      expected: max === 0 ? 'none' : `at least ${min}`,
      ...(others.length > 0 && { hint: `Use --container ${others.map(({ name }) => name).join(' or ')}.` }),
    });
  }
  if (method === 'drop' && dropRatio !== undefined && !(dropRatio > 0 && dropRatio < 1)) {
    throw badUsage('--drop-ratio must leave neurons and draw neurons anew', {
      got: String(dropRatio),
      expected: 'above 0 and below 1',
      hint: dropRatio === 0 ? 'Plain copies are --method upcycle.' : 'Of experts without a neuron of the dense network nothing is upcycled.',
    }); // prettier-ignore
  }
  if (method !== 'split' && active === experts) {
    throw badUsage('Upcycling with all experts active only multiplies the work', { expected: `--active below ${experts}` }); // prettier-ignore
  }
}

/** Groups that every reader routes alike. */
function requireLimit(
  { groups, topGroups }: GroupLimit,
  { experts, active }: MoeRecipe,
  container: Container,
  source: Source,
): void {
  const got = `--groups ${groups} --top-groups ${topGroups} of ${experts} experts, ${active} active`;
  if (!container.groups) {
    const others = Object.values(containers).filter((c) => c.groups && c.refuse(source) === undefined);
    throw badUsage(`The container ${container.name} cannot limit routing to groups`, {
      got,
      hint: others.length > 0 ? `Use --container ${others.map(({ name }) => name).join(' or ')}.` : 'Leave --groups and --top-groups out.',
    }); // prettier-ignore
  }
  const size = experts / groups;
  if (!Number.isSafeInteger(groups) || groups < 2 || !Number.isInteger(size)) {
    throw badUsage('The experts do not divide into equal groups', { got, expected: `--groups that divides ${experts}, from 2` }); // prettier-ignore
  }
  if (size < 2) {
    throw badUsage('A group is scored by its two best experts: it needs two', { got, expected: `--groups up to ${Math.floor(experts / 2)}` }); // prettier-ignore
  }
  const least = Math.ceil(active / size);
  if (Number.isSafeInteger(topGroups) && topGroups >= least && topGroups < groups) return;
  const what =
    topGroups === groups
      ? 'All groups at once limit nothing'
      : topGroups < least
        ? 'The best groups hold fewer experts than a token takes'
        : 'More best groups than there are';
  throw badUsage(what, {
    got,
    expected: least < groups ? `--top-groups from ${least} to ${groups - 1}` : `--active up to ${experts - size}: more take experts of every group`, // prettier-ignore
    ...(topGroups === groups && { hint: 'Without --groups and --top-groups the choice is the same.' }),
  });
}

/** The layers that stay dense, ascending, as far as the container can have them. */
function denseLayers({ dense = 0, layers }: MoeRecipe, container: Container, model: Model): number[] {
  const count = model.blocks.length;
  const all = Array.from({ length: count }, (_, i) => i);
  if (layers === undefined) {
    if (dense >= 0 && dense < count) return requireDenseLayers(all.slice(0, dense), container, model, `--dense-layers ${dense}`); // prettier-ignore
    throw badUsage('--dense-layers leaves no layer to convert', { got: String(dense), expected: `0 to ${count - 1}` });
  }
  const got = `--layers ${layers.map(([from, to]) => (from === to ? from : `${from}-${to}`)).join(',')}`;
  if (dense > 0) throw badUsage('Either the first layers stay dense, or all that a range leaves out', { got: `${got} --dense-layers ${dense}` }); // prettier-ignore
  if (layers.length === 0 || layers.some(([from, to]) => !(from >= 0 && from <= to && to < count))) {
    throw badUsage('--layers names layers that the model does not have', { got, expected: `layers from 0 to ${count - 1}, ranges upwards` }); // prettier-ignore
  }
  const left = all.filter((i) => !layers.some(([from, to]) => i >= from && i <= to));
  return requireDenseLayers(left, container, model, got);
}

function requireDenseLayers(dense: number[], container: Container, model: Model, got: string): number[] {
  if (dense.length > 0 && container.denseLayers === 'none') {
    throw badUsage(`The container ${container.name} has experts in every layer`, { got });
  }
  if (container.denseLayers === 'first' && dense.some((layer, i) => layer !== i)) {
    const source = sourceOf(model, dense);
    const others = Object.values(containers).filter((c) => c.denseLayers === 'any' && c.refuse(source) === undefined);
    throw badUsage(`In the container ${container.name} only the first layers can stay dense`, {
      got: `${got}, which leaves layer ${dense.find((layer, i) => layer !== i)} dense`,
      hint: `Use a range up to the last layer${others.map(({ name }) => `, or --container ${name}`).join('')}.`,
    });
  }
  return dense;
}

/** The feed-forward part of the model, the same in every layer. */
function requireDense(model: Model, where: string): FfnSpec {
  const mixture = model.blocks.find((block) => block.moe);
  if (mixture?.moe) {
    throw badInput('The model is a mixture of experts already', {
      where: `${where}, ${mixture.name}`,
      got: `${mixture.moe.experts} experts, ${mixture.moe.active} active`,
      expected: 'a dense model',
      hint: 'To make it smaller: --prune-experts or --merge-experts, or deepseek-convert quantize.',
    });
  }
  const bare = model.blocks.find((block) => !block.ffn);
  const first = model.blocks[0]?.ffn;
  if (bare || !first) {
    throw badInput('The feed-forward part has no gate: only gated ones (gate, up, down) can be divided exactly', {
      where: `${where}, ${bare?.name ?? 'the model'} (${model.modelType})`,
    });
  }
  for (const block of model.blocks) {
    const { gate, up, down } = ffnOf(block);
    if (gate.outFeatures !== first.gate.outFeatures) {
      throw badInput('The layers have feed-forward parts of different widths, but the containers have one width', {
        where: `${where}, ${block.name}`,
        got: String(gate.outFeatures),
        expected: String(first.gate.outFeatures),
      });
    }
    const biased = [gate, up, down].find(({ bias }) => bias);
    if (biased) {
      throw badInput('The feed-forward part has biases, which experts do not have in any container', {
        where: `${where}, tensor ${biased.name}.bias`,
      });
    }
  }
  return first;
}

function shapeOf(recipe: MoeRecipe, container: Container, ffn: number): MoeShape {
  const counts = {
    routed: recipe.experts,
    active: recipe.active,
    shared: recipe.shared ?? container.shared.default,
    ...(recipe.limit && { limit: recipe.limit }),
    ffn,
  };
  const width = recipe.method === 'split' ? expertWidth(ffn, pieces(counts), recipe.pad ?? 'auto') : ffn;
  return { ...counts, width };
}

/** What the dense feed-forward weights are stored in, as far as it is a plain float; else bf16. */
function storedDType(open: OpenModel, ffn: FfnSpec): FloatDType {
  const encoding = open.tensors.get(`${ffn.gate.name}.weight`)?.entry.encoding;
  if (encoding?.kind !== 'plain') return 'bf16';
  return encoding.dtype === 'f32' || encoding.dtype === 'f16' ? encoding.dtype : 'bf16';
}

function costOf(model: Model, shape: MoeShape, dense: number, bytes: number): Cost {
  const layers = model.blocks.length - dense;
  const { hidden } = model;
  const whole = 3 * shape.ffn * hidden;
  const ffn = model.blocks.length * whole;
  const on = (shape.active + shape.shared) * shape.width;
  const moe = dense * whole + layers * (3 * on * hidden + shape.routed * hidden);
  const rest = model.blocks.reduce(
    (sum, block) => sum + block.linears.flat().reduce((n, { role, inFeatures, outFeatures }) => (role === 'mlp' ? n : n + inFeatures * outFeatures), 0), // prettier-ignore
    model.head.inFeatures * model.head.outFeatures,
  );
  return {
    ffnFlops: [2 * ffn, 2 * moe],
    flops: [2 * (ffn + rest), 2 * (moe + rest)],
    bytes: [bytes * (ffn + rest), bytes * (moe + rest)],
  };
}

function notesOf(
  shape: MoeShape,
  { routedDown, normalized }: Weighting,
  dtype: FloatDType,
  container: Container,
  recipe: MoeRecipe,
  model: Model,
): string[] {
  const { method } = recipe;
  const notes: string[] = [];
  if (method === 'drop') {
    const lost = droppedNeurons(shape.width, dropRatioOf(recipe));
    notes.push(`In every routed expert ${lost} of ${shape.width} neurons are drawn anew: the output is a start for training, and not the dense model.`); // prettier-ignore
  }
  if (model.tied && !container.tiesHead) {
    notes.push(
      `The head is stored beside the embedding, which it equals: vLLM does not tie them in ${container.name}.`,
    );
  }
  const padding = capacity(shape) - shape.ffn;
  if (method === 'split' && padding > 0) {
    const share = ((100 * padding) / shape.ffn).toFixed(1);
    notes.push(
      `Experts are ${shape.width} neurons wide: ${padding} zero neurons a layer (${share}%) make ${pieces(shape)} equal parts of ${shape.ffn}.`,
    );
  }
  if (dtype !== 'f32' && !Number.isInteger(Math.log2(routedDown))) {
    notes.push(
      `${container.name} needs down_proj stored times ${routedDown}, which ${dtype} rounds (relative error up to ${dtype === 'bf16' ? '0.4' : '0.05'}% a weight). A power of two for --experts or --active, or --container glm4_moe, avoids it.`,
    );
  }
  const { hidden, heads, headDim } = model;
  if (container.name === 'qwen2_moe' && headDim * heads !== hidden) {
    notes.push(`Heads are ${headDim} wide, not ${hidden} / ${heads}: transformers reads that, vLLM's ${container.name} does not.`); // prettier-ignore
  }
  if (model.blocks[0]?.ffn?.activation !== 'silu' && container.name !== 'mixtral') {
    notes.push(`vLLM's ${container.name} takes no activation but silu.`);
  }
  if (method === 'split' && normalized) {
    notes.push(`${container.name} divides by the number of active experts: num_experts_per_tok must stay ${shape.active}.`); // prettier-ignore
  }
  return notes;
}

/** One line: `8 experts of 128, 2 active, 1 shared`. */
export function describeShape(shape: MoeShape): string {
  const off = (100 * partOff(shape)).toFixed(0);
  const { limit } = shape;
  const groups = limit ? ` out of the best ${limit.topGroups} of ${limit.groups} groups` : '';
  return `${shape.routed} experts of ${shape.width}, ${shape.active} active${groups}, ${shape.shared} shared (${off}% of the neurons off)`;
}

/** For --dry-run. */
export function describePlan(plan: MoePlan): string[] {
  const { shape, container, method, cost } = plan;
  const ratio = ([before, after]: readonly [number, number]) => `${((100 * after) / before).toFixed(1)}%`;
  return [
    `${method} into ${container.name}: ${describeShape(shape)}`,
    `${formatBytes(plan.inputBytes)} -> ${formatBytes(plan.outputBytes)}, ${plan.tensors.length} tensors`,
    `per token: ${ratio(cost.ffnFlops)} of the feed-forward FLOP, ${ratio(cost.flops)} of all FLOP, ${ratio(cost.bytes)} of the weight bytes read`,
    ...plan.notes,
  ];
}
