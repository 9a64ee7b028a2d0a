import { badUsage } from '../base/errors.js';
import type { FloatDType } from '../base/dtype.js';
import type { Scheme as LayoutScheme } from '../layout/types.js';
import { blockFormats, type BlockFormatName } from '../tensor/ops.js';
import type { RotatedBy } from '../arch/rotate.js';
import type { GgufType, Mixture } from '../targets/gguf-mixture.js';

/** How a linear is rounded: on grids of a layout, or in GGML blocks. */
export interface Scheme extends LayoutScheme {
  /** GGUF: the block type, whose bits, group and symmetry the other fields repeat. */
  readonly blocks?: BlockFormatName;
}

/** Everything that decides the codes, beside weights and calibration tokens. Part of a job's fingerprint. */
export interface Recipe {
  readonly method: Method;
  readonly bits: Bits;
  readonly symmetric: boolean;
  /** Columns of a group; -1: one group a row. */
  readonly groupSize: number;
  /** Grids: `points` multiples in [from, to] of the max-based scale; `freeSign` lets the longer side serve either tail. */
  readonly search: { readonly points: number; readonly from: number; readonly to: number; readonly freeSign: boolean };
  /** Columns are swept from the one with most activation energy down; groups stay where they are ("static"). */
  readonly order: boolean;
  /** Share of the Hessian's mean diagonal added to it; raised when a pivot is not positive. */
  readonly damp: number;
  /** After the sweep: `rounds` of {least-squares scales under H, at most `passes` of coordinate descent over the codes}. */
  readonly refine: { readonly rounds: number; readonly passes: number };
  /** GGUF only: the block type, in place of bits, group and symmetry. */
  readonly blocks?: GgufType;
  /** GGUF only: some linears in more bits than `blocks`, as llama.cpp mixes them. */
  readonly mixture?: Mixture;
  /** Mean bits a weight, scales included, that measured sensitivities are to be met with; `bits` then means nothing. */
  readonly targetBpw?: number;
  /** With `autoround`. */
  readonly rounding?: Rounding;
  /** The model is rotated before anything else: see `rotated`. */
  readonly rotation?: RotatedBy;
  /** Other schemes for some linears; where several fit, the last one counts. */
  readonly overrides?: readonly Override[];
}

/** How rounding learns. */
export interface Rounding {
  /** Of signed gradient descent, a block. */
  readonly steps: number;
  /** Sequences a step. */
  readonly batch: number;
  /** In rounding cells, falling to zero along a line; absent: 1 / steps. */
  readonly lr?: number;
  /** Where it begins: codes of error feedback, or the weights themselves. */
  readonly start: 'gptq' | 'rtn';
  readonly seed: number;
}

export const defaultRounding: Rounding = { steps: 200, batch: 8, start: 'gptq', seed: 0 };

export const bitWidths = [2, 3, 4, 8] as const;
export type Bits = (typeof bitWidths)[number];

/** What one linear gets in place of the recipe's own; absent fields stay the recipe's. */
export interface SchemeChange {
  readonly bits?: Bits;
  readonly groupSize?: number;
  readonly symmetric?: boolean;
}

export interface Override extends SchemeChange {
  /** A part of a name (`down_proj`, `layers.0`), or `re:` and an expression. */
  readonly pattern: string;
}

/**
 * `gptq`: error feedback. `rtn`: rounding alone, on the best grid. `awq`: activation-aware scales, then rounding;
 * `awq-gptq`: the same scales, then error feedback. `autoround`: rounding that learns, block by block.
 */
export const methods = ['gptq', 'rtn', 'awq', 'awq-gptq', 'autoround'] as const;
export type Method = (typeof methods)[number];

export const defaultRecipe: Recipe = {
  method: 'gptq',
  bits: 4,
  symmetric: true,
  groupSize: 128,
  search: { points: 28, from: 0.55, to: 1.06, freeSign: true },
  order: true,
  damp: 0.01,
  refine: { rounds: 1, passes: 3 },
};

export const roundingOf = ({ rounding = defaultRounding }: Recipe): Rounding => rounding;

/** How codes are chosen, of `autoround` those to begin with, once channels are scaled. */
export const codesOf = (recipe: Recipe): 'gptq' | 'rtn' =>
  recipe.method === 'autoround' ? roundingOf(recipe).start : recipe.method.endsWith('gptq') ? 'gptq' : 'rtn';

/** Integer codes are stored around zero: 4 bits are -8..7. */
export const codeRange = (bits: number): { low: number; high: number } => ({
  low: -(2 ** (bits - 1)),
  high: 2 ** (bits - 1) - 1,
});

/** Columns that share a scale. */
export const groupWidth = (scheme: Scheme, columns: number): number => (scheme.group === 0 ? columns : scheme.group);

/** Bits that one stored weight takes, scales and zero points included. */
export function bitsPerWeight(scheme: Scheme, columns: number, scaleBits: number): number {
  if (scheme.blocks !== undefined) return (8 * blockFormats[scheme.blocks].bytes) / blockFormats[scheme.blocks].values;
  const perGroup = scaleBits + (scheme.symmetric ? 0 : scheme.bits);
  return scheme.bits + perGroup / groupWidth(scheme, columns);
}

/** `int4 g128 symmetric` */
export function describeScheme({ bits, symmetric, group, blocks }: Scheme): string {
  if (blocks !== undefined) return blocks;
  return `int${bits} ${group === 0 ? 'channel' : `g${group}`} ${symmetric ? 'symmetric' : 'asymmetric'}`;
}

const smallestGroup = 32;
/** FFN widths are padded when that makes them at most this much longer. */
const mostPadding = 0.125;

export interface Fit {
  /** 0: one scale a row. */
  readonly group: number;
  /** The width that is stored: `columns`, or more with exact zeros behind. */
  readonly columns: number;
  /** Why the group is not the one that was asked for, or the width not the model's. */
  readonly note?: string;
}

/**
 * A group that divides `columns`: the one asked for where it does; for feed-forward widths (which may be padded with
 * channels that are exactly zero) else the largest group that costs little padding; for others a smaller power of
 * two down to 32; at last one scale a row.
 */
export function fitGroup(columns: number, groupSize: number, paddable: boolean): Fit {
  if (groupSize === -1) return { group: 0, columns };
  if (columns % groupSize === 0) return { group: groupSize, columns };
  for (let group = groupSize; group >= smallestGroup; group /= 2) {
    if (columns % group === 0) {
      return { group, columns, note: `group ${group}, because ${columns} columns are no multiple of ${groupSize}` };
    }
    const padded = Math.ceil(columns / group) * group;
    if (paddable && (padded - columns <= mostPadding * columns || group / 2 < smallestGroup)) {
      const smaller = group === groupSize ? '' : `group ${group}, `;
      return { group, columns: padded, note: `${smaller}${columns} columns padded to ${padded} with zeros` };
    }
  }
  return {
    group: 0,
    columns,
    note: `one scale a row, because no group from ${groupSize} down to ${smallestGroup} divides ${columns} columns`,
  };
}

/** Refuses what no target can hold. */
export function checkRecipe({ groupSize, overrides = [] }: Recipe): void {
  checkGroup(groupSize, '--group-size');
  for (const { pattern, groupSize: own } of overrides) {
    if (own !== undefined) checkGroup(own, `--override ${pattern}: group`);
  }
}

function checkGroup(groupSize: number, what: string): void {
  const power = groupSize >= smallestGroup && groupSize <= 1024 && Number.isInteger(Math.log2(groupSize));
  if (groupSize === -1 || power) return;
  throw badUsage(`${what} is not supported`, {
    got: String(groupSize),
    expected: 'a power of two from 32 to 1024, or -1 for one group a row',
  });
}

/** The precision, or all the precisions one after another, that scales must survive without loss. */
export type StoredScales = FloatDType | readonly FloatDType[];

/** Scales are stored in the model's own precision. */
export const scaleDType = (modelDType: string): FloatDType =>
  modelDType === 'f16' || modelDType === 'bf16' ? modelDType : modelDType === 'f32' ? 'f32' : 'bf16';
