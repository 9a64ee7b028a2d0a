import type { Job, Json } from '../../base/job.js';
import type { JobEnv } from '../../backend/env.js';
import type { CalibrationOptions, CalibrationSet } from '../../arch/calibration.js';
import type { OpenModel } from '../../arch/open.js';
import type { Accept } from '../../checkpoint/types.js';
import type { EndToEndOutcome } from '../end-to-end.js';
import type { TrainingOptions, TrainingResult } from '../options.js';

/** What of a mixture learns. `router` stands alone; each of the others takes in the one before it. */
export const distillParts = ['router', 'scales', 'lora', 'full'] as const;
export type DistillPart = (typeof distillParts)[number];

/** How a mixture learns from the dense model that it was made of. */
export interface MixtureTraining {
  readonly part: DistillPart;
  /** Of text; what the text does not hold is gone through again. */
  readonly tokens: number;
  /** How often as many are trained on. */
  readonly passes: number;
  /** Windows of text a step. */
  readonly batch: number;
  /** How far a value moves a step, in parts of the root mean square of its tensor. */
  readonly lr: number;
  /** Weight of the relative squared error of hidden states behind each layer; that of KL(dense || mixture) is 1. */
  readonly hidden: number;
  /** Of `lora`. */
  readonly rank: number;
  /** Learning rate of routers beside that of weights, where these learn too; 0: routers stay. */
  readonly routerRate: number;
  readonly failOnAlarm: boolean;
}

export interface DistillMixtureOptions extends MixtureTraining, TrainingOptions {
  /** The dense model. */
  readonly teacher: string;
  /** The mixture that was made of it, a folder. */
  readonly mixture: string;
  /** Take an output that the very same job finished earlier as it is, in place of refusing it. */
  readonly reuse?: boolean;
  readonly calibration: Omit<CalibrationOptions, 'seqLen' | 'samples'> & { readonly seqLen?: number };
  /** Asked when the output is complete, before it gets its name. */
  readonly accept?: Accept;
}

/** KL from the dense model on the windows that judge. */
export interface HeldOut {
  readonly windows: number;
  readonly before: number;
  /** Of the output as it is stored, by the container's own forward pass. */
  readonly after: number;
}

export interface DistillMixtureResult extends TrainingResult {
  readonly part: DistillPart;
  /** Trained on, and how often that is the whole text. */
  readonly tokens: number;
  readonly passes: number;
  readonly training: EndToEndOutcome;
  readonly heldOut: HeldOut;
}

/** What the journal and the provenance keep. */
export interface Made {
  readonly training: EndToEndOutcome;
  readonly heldOut: HeldOut;
}

/** Everything that the phases share. */
export interface Run {
  readonly options: DistillMixtureOptions;
  readonly env: JobEnv;
  readonly job: Job;
  readonly set: CalibrationSet;
  /** The last `held` windows judge. */
  readonly held: number;
  readonly teacher: OpenModel;
  readonly mixture: OpenModel;
  readonly dtype: 'f32' | 'bf16';
  readonly microBatch: number;
  readonly recipe: Readonly<Record<string, Json>>;
  /** What the mixture's own provenance says. */
  readonly making: Readonly<Record<string, Json>>;
}
