import { badInput } from '../base/errors.js';
import type { Checkpoint } from '../checkpoint/types.js';
import type { LinearFactor } from '../formats/types.js';

/** What `convert --fuse` does: q, k, v and gate, up as one matrix; such matrices as their linears; consecutive linears as one. */
export const fuses = ['qkv', 'gate-up', 'split', 'fold'] as const;
export type Fuse = (typeof fuses)[number];
export const fusings = ['qkv', 'gate-up'] as const;

/** Linears of one input that stand otherwise in the output. */
export interface Fusion {
  readonly kind: Fuse;
  /** Modules of the input and of the output. */
  readonly from: readonly string[];
  readonly into: readonly string[];
  /**
   * What `from` computes: linears side by side, each a row of factors, the first applied first. Absent: `from` are
   * linears of the model as it is read.
   */
  readonly parts?: readonly (readonly LinearFactor[])[];
  /** Bytes of the linears before and after. */
  readonly bytes: { readonly before: number; readonly after: number };
}

export interface Reshaped {
  readonly checkpoint: Checkpoint;
  readonly fusions: readonly Fusion[];
  /** What stays as it is, and why; one sentence each. */
  readonly notes: readonly string[];
}

/** Error: codes, which cannot be moved between matrices here. */
export function requirePlain({ config, path }: Checkpoint, what: string): void {
  if (config.quantization_config === undefined) return;
  throw badInput(`Quantized matrices are not ${what}`, {
    where: path,
    got: `quantization_config of ${JSON.stringify((config.quantization_config as { quant_method?: unknown }).quant_method)}`,
    hint: 'Decode it first (convert --dtype bf16), or use --format onnx, which fuses the codes themselves.',
  });
}
