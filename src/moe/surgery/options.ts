import type { JobOptions } from '../options.js';

/** `prune`: some experts stay as they are, the others go. `merge`: alike experts become one. */
export type SurgeryKind = 'prune' | 'merge';

/**
 * By what experts are kept. `error`: by trying what the layer misses least (`searchExperts`); `reap`, `activation`, `energy`:
 * see `importance`; `frequency`: how many tokens choose them; `random`: to measure the others against.
 */
export const pruneMeasures = ['error', 'reap', 'activation', 'energy', 'frequency', 'random'] as const;
export type PruneMeasure = (typeof pruneMeasures)[number];
/** Measures that give each expert a value of its own. */
export type ExpertMeasure = Exclude<PruneMeasure, 'error'>;

/** A mixture into one with fewer experts a layer. */
export interface SurgeryOptions extends JobOptions {
  readonly kind: SurgeryKind;
  /** Experts that each layer has afterwards. */
  readonly keep: number;
  /** Default: error. */
  readonly by?: PruneMeasure;
}
