import type { CalibrationOptions } from '../../arch/calibration.js';
import type { EndToEndOutcome } from '../end-to-end.js';
import type { TrainingOptions, TrainingResult } from '../options.js';
import type { Shape, ShapeRequest } from './shape.js';

export interface DistillOptions extends TrainingOptions {
  /** The teacher. */
  readonly input: string;
  readonly shape: ShapeRequest;
  /** What the student begins with: parts of its teacher, or random weights (to compare with). */
  readonly init: 'teacher' | 'random';
  readonly calibration: Omit<CalibrationOptions, 'seqLen'> & { readonly seqLen?: number };
  readonly epochs: number;
  /** Trained on in all, in place of `epochs`. */
  readonly tokens?: number;
  /** Sequences a step. */
  readonly batch: number;
  readonly lr: number;
  readonly warmup: number;
  readonly weightDecay: number;
  readonly gradClip: number;
  /** Weights of the losses. */
  readonly kl: number;
  readonly hidden: number;
  readonly crossEntropy: number;
  readonly temperature: number;
}

/** Perplexities on the windows that judge. */
export interface Perplexities {
  readonly teacher: number;
  /** Of the output as it is stored. */
  readonly student: number;
}

export interface DistillResult extends TrainingResult {
  readonly shape: Shape;
  readonly parameters: number;
  readonly teacherParameters: number;
  /** Layers of the teacher that the student's began as; undefined: it began at random. */
  readonly layers: readonly number[] | undefined;
  /** Tokens trained on. */
  readonly tokens: number;
  readonly training: EndToEndOutcome;
  readonly perplexity: Perplexities;
}
