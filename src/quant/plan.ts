import { badInput } from '../base/errors.js';
import { elementCount, type FloatDType } from '../base/dtype.js';
import type { Checkpoint, TensorEntry } from '../checkpoint/types.js';
import { elementType } from '../formats/assembly.js';
import type { LayoutUse, LinearShape } from '../layout/types.js';
import type { LinearSpec } from '../nn/calls.js';
import type { Model } from '../arch/types.js';
import { kindOf, mixtureType } from '../targets/gguf-mixture.js';
import { blockScheme, typeOfBits } from './blocks.js';
import { changesOf } from './overrides.js';
import { leaveOut, type Selection } from './select.js';
import { bitsPerWeight, fitGroup, scaleDType, type Recipe, type Scheme, type SchemeChange } from './scheme.js';
import { fitWidths, patternOf } from './widths.js';

/** What becomes of one linear. */
export interface LinearPlan {
  readonly linear: LinearSpec;
  readonly block: number;
  /** As it is stored: the model's shape, or padded with zeros. */
  readonly stored: LinearShape;
  /** Absent: left in high precision. */
  readonly scheme?: Scheme;
  /** Why it is left out. */
  readonly reason?: string;
  /** Of the source's weight; scales are stored in it. */
  readonly dtype: FloatDType;
}

/** A linear that is quantized. */
export type Planned = LinearPlan & { readonly scheme: Scheme };

export interface QuantPlan {
  readonly linears: ReadonlyMap<string, LinearPlan>;
  /** Changed keys of config.json (padded widths). */
  readonly config: Readonly<Record<string, number>>;
  readonly use: LayoutUse;
  readonly notes: readonly string[];
  readonly totals: PlanTotals;
  /** Linears whose scheme an override of the recipe decides. */
  readonly fixed: ReadonlySet<string>;
}

export interface PlanTotals {
  readonly quantized: number;
  readonly left: number;
  /** Weights in linears, and those that are quantized. */
  readonly weights: number;
  readonly quantizedWeights: number;
  /** Mean over the quantized linears. */
  readonly bitsPerWeight: number;
}

/** What decides whether a linear can be stored in a scheme: a layout, or GGUF. */
export interface Holder {
  refuse(linear: LinearShape, scheme: Scheme): string | undefined;
}

/**
 * Decides, from headers alone, what becomes of every linear of a model. `chosen`: schemes from measured sensitivities,
 * by linear; overrides of the recipe go before them.
 * Errors: nothing to quantize, patterns that match nothing.
 */
export function makePlan(
  model: Model,
  checkpoint: Checkpoint,
  recipe: Recipe,
  selection: Selection,
  holder: Holder,
  chosen: ReadonlyMap<string, SchemeChange> = new Map(),
): QuantPlan {
  const overridden = changesOf(model.blocks, recipe.overrides ?? []);
  const fixed = new Set(overridden.keys());
  const carried = [...checkpoint.tensors.keys()].some((name) =>
    model.carried.some((prefix) => name.startsWith(prefix)),
  );
  // Carried parts (multi-token prediction) follow the same config and cannot be padded along.
  const widths = recipe.blocks ? unpadded : fitWidths(model, recipe.groupSize, !carried);
  const left = leaveOut(model.blocks, selection);
  const experts = Math.max(0, ...model.blocks.map(({ moe }) => moe?.experts ?? 0));
  const linears = new Map<string, LinearPlan>();
  const notes = new Set(widths.notes);
  for (const block of model.blocks) {
    for (const linear of block.linears.flat()) {
      const { name } = linear;
      const stored = {
        name,
        inFeatures: linear.inFeatures,
        outFeatures: linear.outFeatures,
        ...widths.stored.get(name),
      };
      const entry = checkpoint.tensors.get(`${name}.weight`);
      const common = { linear, block: block.index, stored, dtype: weightDType(entry) };
      const change: SchemeChange = { ...chosen.get(name), ...overridden.get(name) };
      if (recipe.blocks !== undefined) {
        const usual = recipe.mixture ? mixtureType(recipe.mixture, kindOf(name), block.index, model.blocks.length, experts) : recipe.blocks; // prettier-ignore
        const wanted = change.bits === undefined ? usual : typeOfBits[change.bits];
        const scheme = blockScheme(linear.inFeatures, wanted);
        const reason = left.get(name) ?? (scheme ? holder.refuse(stored, scheme) : `no block type divides ${linear.inFeatures} columns`); // prettier-ignore
        if (scheme?.blocks !== wanted && reason === undefined) notes.add(`${patternOf(name)}: ${scheme!.blocks}, because ${linear.inFeatures} columns are no whole blocks of ${wanted}`); // prettier-ignore
        linears.set(name, reason === undefined ? { ...common, scheme: scheme! } : { ...common, reason });
        continue;
      }
      let group = change.groupSize === undefined ? widths.groups.get(name) : undefined;
      if (group === undefined) {
        const fit = fitGroup(stored.inFeatures, change.groupSize ?? recipe.groupSize, false);
        group = fit.group;
        if (fit.note !== undefined && !left.has(name)) notes.add(`${patternOf(name)}: ${fit.note}`);
      }
      const order = recipe.method.endsWith('gptq') && recipe.order ? { order: 'static' as const } : {};
      const { bits = recipe.bits, symmetric = recipe.symmetric } = change;
      const scheme: Scheme = { bits, group, symmetric, ...order };
      const reason = left.get(name) ?? holder.refuse(stored, scheme);
      linears.set(name, reason === undefined ? { ...common, scheme } : { ...common, reason });
    }
  }
  // A tied head has no tensor of its own, but engines look for the module's name all the same.
  const head = model.tied ? { ...model.head, name: 'lm_head' } : model.head;
  const dtype = weightDType(checkpoint.tensors.get(`${model.head.name}.weight`));
  linears.set(head.name, { linear: head, block: -1, stored: head, dtype, reason: 'the head stays in high precision' });
  const plans = [...linears.values()];
  if (!plans.some(({ scheme }) => scheme)) {
    throw badInput('There is nothing to quantize', {
      where: checkpoint.path,
      got: `${plans.length} linears, all left out: ${plans[0]?.reason ?? 'no linears'}`,
      hint: 'Widen --scope, or name fewer linears in --keep.',
    });
  }
  return { linears, config: widths.config, use: layoutUse(plans), notes: [...notes], totals: totalsOf(plans), fixed };
}

const unpadded: ReturnType<typeof fitWidths> = { stored: new Map(), groups: new Map(), config: {}, notes: [] };

const weightDType = (entry: TensorEntry | undefined): FloatDType => scaleDType((entry && elementType(entry)) ?? 'bf16');

function layoutUse(plans: readonly LinearPlan[]): LayoutUse {
  const groups = new Map<string, { scheme: Scheme; linears: string[] }>();
  const ignore: string[] = [];
  for (const { linear, scheme } of plans) {
    if (scheme === undefined) {
      ignore.push(linear.name);
      continue;
    }
    const key = JSON.stringify([scheme.bits, scheme.group, scheme.symmetric, scheme.blocks]);
    const known = groups.get(key);
    if (known) known.linears.push(linear.name);
    else groups.set(key, { scheme, linears: [linear.name] });
  }
  // The most common scheme is the rule, the others exceptions.
  return { groups: [...groups.values()].sort((a, b) => b.linears.length - a.linears.length), ignore };
}

function totalsOf(plans: readonly LinearPlan[]): PlanTotals {
  let [quantized, weights, quantizedWeights, bits] = [0, 0, 0, 0];
  for (const { stored, scheme, dtype } of plans) {
    const count = elementCount([stored.outFeatures, stored.inFeatures]);
    weights += count;
    if (scheme === undefined) continue;
    quantized++;
    quantizedWeights += count;
    bits += count * bitsPerWeight(scheme, stored.inFeatures, dtype === 'f32' ? 32 : 16);
  }
  const bitsEach = quantizedWeights === 0 ? 0 : bits / quantizedWeights;
  return { quantized, left: plans.length - quantized, weights, quantizedWeights, bitsPerWeight: bitsEach };
}
