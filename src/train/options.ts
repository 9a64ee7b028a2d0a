import type { CalibrationOptions } from '../arch/calibration.js';
import type { Accept } from '../checkpoint/types.js';
import type { BlockRecord } from './blockwise.js';
import type { EndToEndOutcome } from './end-to-end.js';

export const endToEndModes = ['none', 'scales', 'lora', 'full'] as const;
export type EndToEndMode = (typeof endToEndModes)[number];

/** What every job that trains is told. */
export interface TrainingOptions {
  /** Path of the input's config (the teacher's), where it does not lie beside the weights. */
  readonly config?: string;
  /** The output folder. */
  readonly out: string;
  readonly overwrite?: boolean;
  readonly restart?: boolean;
  readonly failOnAlarm: boolean;
  readonly dtype?: 'f32' | 'bf16';
  readonly seed: number;
  readonly shardSize?: number;
  readonly tool: { readonly name: string; readonly version: string };
  readonly commandLine: string;
}

/** And what it tells. */
export interface TrainingResult {
  readonly out: string;
  readonly calibration: string;
  readonly notices: readonly string[];
  readonly resumed: boolean;
  readonly seconds: number;
}

export interface QatOptions extends TrainingOptions {
  readonly input: string;
  /** A quantized model of the input to start from; absent: GPTQ on the calibration text. */
  readonly from?: string;
  readonly groupSize: number;
  /** Off: weights learn in full precision, and the output is an ordinary checkpoint. */
  readonly fakeQuant: boolean;
  readonly calibration: Omit<CalibrationOptions, 'seqLen'> & { readonly seqLen?: number };
  /** Epochs of training block by block; 0: none. */
  readonly epochs: number;
  readonly endToEnd: EndToEndMode;
  readonly endToEndEpochs: number;
  /** Ends the training of the whole model earlier. */
  readonly maxSteps?: number;
  /** Sequences a step. */
  readonly batch: number;
  /** In rounding cells (mean scale of a linear); absent: `defaultRate`. */
  readonly lr?: number;
  /** The same for the whole model; without fake quantization absolute, 1e-4 where absent. */
  readonly endToEndLr?: number;
  readonly warmup: number;
  readonly weightDecay: number;
  readonly gradClip: number;
  /** Of the whole model's losses. */
  readonly crossEntropy: number;
  readonly kl: number;
  readonly hidden: number;
  readonly rank: number;
  /** Probability that a block's training sequence comes from the full-precision model's states. */
  readonly cleanInputs: number;
  /** Asked when the output is complete, before it gets its name. */
  readonly accept?: Accept;
}

export interface QatResult extends TrainingResult {
  /** Of training block by block. */
  readonly blocks: readonly BlockRecord[];
  readonly endToEnd: EndToEndOutcome | undefined;
  readonly linears: number;
  readonly outputBytes: number;
}
