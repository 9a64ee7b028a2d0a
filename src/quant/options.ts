import type { Accept } from '../checkpoint/types.js';
import type { CalibrationOptions } from '../arch/calibration.js';
import type { Model } from '../arch/types.js';
import type { Emitted } from '../targets/deploy/emit.js';
import type { QuantFormat } from './formats.js';
import type { OutputPlan } from './output.js';
import type { QuantPlan } from './plan.js';
import type { BlockReport } from './report.js';
import type { Recipe } from './scheme.js';

export interface QuantizeOptions {
  readonly input: string;
  /** Path of the config, where it does not lie beside the weights. */
  readonly config?: string;
  /** The output folder. */
  readonly out: string;
  readonly overwrite?: boolean;
  readonly restart?: boolean;
  readonly recipe: Recipe;
  /** What to write; several share one calibration, and lie in folders of `out` named after them. */
  readonly formats: readonly QuantFormat[];
  /** Deployment files to write beside the outputs. */
  readonly emit?: readonly Emitted[];
  /** Tensor-parallel sizes that the output must divide into (vLLM). */
  readonly tensorParallel?: readonly number[];
  /** `all`, `experts`, a part of a name or `re:...`; absent: what suits the architecture. */
  readonly scope?: string;
  readonly keep?: readonly string[];
  /** Absent: quantize without calibration (plain rounding only). `seqLen` absent: 2,048 or the model's context. */
  readonly calibration?: Omit<CalibrationOptions, 'seqLen'> & { readonly seqLen?: number };
  /** Precision of hidden states and of the forward pass; default: bf16; f32 for models of other types on the CPU. */
  readonly states?: 'f32' | 'bf16';
  /** Largest share of routed experts that no calibration token may reach. */
  readonly maxUncovered?: number;
  /** Calibrate every expert on every token, not on those that its router sends it. */
  readonly calibrateAllExperts?: boolean;
  /** Each block is calibrated on the states of the model as it is, not on those that quantized blocks make. */
  readonly independentBlocks?: boolean;
  readonly shardSize?: number;
  /** Sequences a batch, bytes for states: see `streamBlocks`. */
  readonly batchRows?: number;
  readonly budget?: number;
  /** Asked when the output is complete, before it gets its name. */
  readonly accept?: Accept;
  readonly tool: { readonly name: string; readonly version: string };
  /** The command as it was typed, to go on with an interrupted job. */
  readonly commandLine: string;
}

export interface QuantizeResult {
  readonly out: string;
  readonly plan: QuantPlan;
  readonly outputBytes: number;
  readonly inputBytes: number;
  readonly blocks: readonly BlockReport[];
  readonly calibration: string | undefined;
  readonly notices: readonly string[];
  readonly verified: number;
  readonly resumed: boolean;
  readonly seconds: number;
  /** Seconds by stage over all blocks; `forward` is what the blocks took beside the others. */
  readonly stages: Readonly<Record<string, number>>;
}

/** What would be done, from headers alone. */
export interface QuantizePreview {
  readonly model: Model;
  readonly plan: QuantPlan;
  readonly output: OutputPlan;
  readonly inputBytes: number;
  readonly notices: readonly string[];
}
