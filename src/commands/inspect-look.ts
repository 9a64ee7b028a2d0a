import type { StoredWeight } from '../arch/stored.js';
import type { Model } from '../arch/types.js';
import { flag, text, type Values } from '../base/options.js';
import type { Checkpoint } from '../checkpoint/types.js';
import { deviceOptions } from './shared.js';

/** Options of inspect that look closer. Their code is loaded when one of them is given: a plain look stays instant. */
export const lookOptions = {
  tree: flag({ help: 'The tensors as a tree with sizes, alike layers and experts folded; bytes by type.' }),
  diagram: flag({ help: 'A picture of the architecture, from tokens to logits.' }),
  stats: flag({
    help: 'Read all weights: mean, deviation, largest magnitude, zeros, values that are not finite, outlier channels.',
  }),
  html: text({ value: 'model.html', help: 'Write all of it as one HTML page that needs nothing from anywhere.' }),
  ...deviceOptions,
} as const;

export type LookValues = Values<typeof lookOptions> & { readonly input: string };

export const looks = ({ tree, diagram, stats, html }: LookValues): boolean =>
  tree || diagram || stats || html !== undefined;

/** What is stored as one type. */
export interface Stored {
  readonly type: string;
  tensors: number;
  values: number;
  bytes: number;
}

/** What inspect knows from the headers. */
export interface Seen {
  readonly checkpoint: Checkpoint;
  readonly model: Model | undefined;
  /** What is stored, by the names of the architecture; empty without one. */
  readonly stored: ReadonlyMap<string, StoredWeight>;
  readonly types: readonly Stored[];
  /** Names and values of the plain look. */
  readonly facts: readonly (readonly string[])[];
  readonly notes: readonly string[];
}
