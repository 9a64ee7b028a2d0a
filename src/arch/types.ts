import type { Tensor } from '../tensor/tensor.js';
import type { Calls, ForwardContext, LinearSpec } from '../nn/calls.js';
import type { AttentionSpec } from '../nn/attention.js';
import type { Layer, TensorSpec } from '../nn/layer.js';
import type { LatentAttentionSpec } from '../nn/mla.js';
import type { NormSpec } from '../nn/norm.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { MoeSpec } from '../nn/moe.js';

export type { TensorSpec } from '../nn/layer.js';
export type { FfnSpec } from '../nn/mlp.js';
export type { MoeSpec } from '../nn/moe.js';

/** Attention with what decides its function, for exports that spell it out. */
export type AttentionLayer = Layer & { readonly grouped?: AttentionSpec; readonly latent?: LatentAttentionSpec };

/** One decoder layer. */
export interface Block {
  readonly index: number;
  /** Tensor name prefix: `model.layers.3`. */
  readonly name: string;
  readonly tensors: readonly TensorSpec[];
  /** Linears in the order in which forward calls them; inner arrays share an input. Experts are listed one by one. */
  readonly linears: readonly (readonly LinearSpec[])[];
  /** Before attention, and before the feed-forward part. */
  readonly norms: { readonly attention: NormSpec; readonly feedForward: NormSpec };
  readonly attention: AttentionLayer;
  /** The dense gated feed-forward part, where this block has one (what `moe` splits). */
  readonly ffn?: FfnSpec;
  readonly moe?: MoeSpec;
  /** Only the last `window` keys are seen; absent: all. */
  readonly window?: number;
  /** State [B S, W] -> [B S, W], W the model's stateWidth. */
  forward(x: Tensor, ctx: ForwardContext): Calls<Tensor>;
}

/** What algorithms see of an architecture. */
export interface Model {
  readonly modelType: string;
  /** The checkpoint's config.json. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly hidden: number;
  /** Values of a token's state between two blocks: `hidden`, or several hidden states side by side. */
  readonly stateWidth: number;
  readonly vocab: number;
  /** Longest sequence the positions were made for. */
  readonly context: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly blocks: readonly Block[];
  /** Rows of a batch may stand at different positions: not with sliding windows, sparse attention, length-dependent rope. */
  readonly ragged: boolean;
  /** Tensors outside the blocks: embedding, final norm, head. */
  readonly outer: readonly TensorSpec[];
  /** Name of the embedding's tensor, [V, C]. */
  readonly embedding: string;
  /** In front of the head. */
  readonly norm: NormSpec;
  /** The head as a linear; its tensor is the embedding when tied. */
  readonly head: LinearSpec;
  readonly tied: boolean;
  /** Soft cap on logits: cap tanh(logit / cap). */
  readonly logitCap?: number;
  readonly bosId: number | undefined;
  readonly eosIds: readonly number[];
  /** Names of tensors that are carried through untouched (vision towers, MTP layers), by prefix. */
  readonly carried: readonly string[];
  /** tokens i32 [B, S] -> state [B S, W]. */
  embed(tokens: Tensor, ctx: ForwardContext): Tensor;
  /** Final norm and head: states [T, W] -> logits f32 [T, V]. */
  logits(x: Tensor, ctx: ForwardContext): Calls<Tensor>;
}

/** Whether scores of attention or logits are capped, which engines know of few architectures. */
export const isCapped = ({ logitCap, blocks }: Model): boolean =>
  logitCap !== undefined || blocks.some(({ attention }) => attention.grouped?.cap !== undefined);

/** Every linear of a model but the head, in order. */
export const modelLinears = (model: Model): LinearSpec[] => model.blocks.flatMap((block) => block.linears.flat());
