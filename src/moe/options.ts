import type { Accept } from '../checkpoint/types.js';
import type { CalibrationOptions } from '../arch/calibration.js';
import type { SplitKind } from './restructured.js';
import type { MoeRecipe } from './plan.js';

/** What every job that changes experts is given. */
export interface JobOptions {
  readonly input: string;
  /** Path of the config, where it does not lie beside the weights. */
  readonly config?: string;
  /** A folder, or one `.bin`, `.pt`, `.pth` or `.safetensors` file with its config beside it. */
  readonly out: string;
  readonly overwrite?: boolean;
  readonly restart?: boolean;
  /** Text to decide on. `seqLen` absent: 2,048 or the model's context. */
  readonly calibration?: Omit<CalibrationOptions, 'seqLen'> & { readonly seqLen?: number };
  readonly seed?: number;
  /** Precision of hidden states and of the forward pass; default: f32 on the CPU, bf16 on a GPU. */
  readonly states?: 'f32' | 'bf16';
  readonly shardSize?: number;
  readonly batchRows?: number;
  readonly budget?: number;
  /** Asked when the output is complete, before it gets its name. */
  readonly accept?: Accept;
  readonly tool: { readonly name: string; readonly version: string };
  /** The command as it was typed, to go on with an interrupted job. */
  readonly commandLine: string;
}

/** A dense model into a mixture. Splitting needs calibration text. */
export interface MoeOptions extends JobOptions, Omit<MoeRecipe, 'shared'> {
  /** See `MoeRecipe`; auto: searched, with as many parts, and as many of them on, as the default number gives. */
  readonly shared?: number | 'auto';
  /** Take an output folder that the very same job finished earlier as it is, in place of refusing it. */
  readonly reuse?: boolean;
  /**
   * Refit down_proj for the number of active experts. With all experts on the output is then no longer the dense model.
   * Default: yes for fewer active experts than there are.
   */
  readonly refit?: boolean;
  /** See `SplitOptions`. */
  readonly rounds?: number;
  readonly steps?: number;
  readonly lambda?: number;
  readonly balance?: number;
  /** A baseline to measure against in place of the method; default: fitted. */
  readonly split?: SplitKind;
}

/** Of a few thousand tokens loads scatter by more than this anyway. */
export const leastBalance = 0.01;
