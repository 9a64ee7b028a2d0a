import type { Tensor } from '../tensor/tensor.js';
import type { Calls, ForwardContext, LinearSpec } from '../nn/calls.js';

/** One tensor that an architecture expects. */
export interface TensorSpec {
  readonly name: string;
  readonly shape: readonly number[];
  /** Missing is fine (tied head, optional bias). */
  readonly optional?: boolean;
}

/** One decoder layer. */
export interface Block {
  readonly index: number;
  /** Tensor name prefix: `model.layers.3`. */
  readonly name: string;
  readonly tensors: readonly TensorSpec[];
  /** Linears in the order in which forward calls them; inner arrays share an input. Experts are listed one by one. */
  readonly linears: readonly (readonly LinearSpec[])[];
  /** The dense gated feed-forward part, where this block has one (what `moe` splits). */
  readonly ffn?: FfnSpec;
  readonly moe?: MoeSpec;
  /** x [B S, C] -> [B S, C]. */
  forward(x: Tensor, ctx: ForwardContext): Calls<Tensor>;
}

export interface FfnSpec {
  readonly gate: LinearSpec;
  readonly up: LinearSpec;
  readonly down: LinearSpec;
  readonly activation: 'silu' | 'gelu' | 'gelu_tanh';
}

export interface MoeSpec {
  readonly experts: number;
  readonly active: number;
  readonly shared: number;
  readonly width: number;
}

/** What algorithms see of an architecture. */
export interface Model {
  readonly modelType: string;
  /** The checkpoint's config.json. */
  readonly config: Readonly<Record<string, unknown>>;
  readonly hidden: number;
  readonly vocab: number;
  /** Longest sequence the positions were made for. */
  readonly context: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly headDim: number;
  readonly blocks: readonly Block[];
  /** Tensors outside the blocks: embedding, final norm, head. */
  readonly outer: readonly TensorSpec[];
  /** The head as a linear; its tensor is the embedding when tied. */
  readonly head: LinearSpec;
  readonly tied: boolean;
  readonly bosId: number | undefined;
  readonly eosIds: readonly number[];
  /** Names of tensors that are carried through untouched (vision towers, MTP layers), by prefix. */
  readonly carried: readonly string[];
  /** tokens i32 [B, S] -> [B S, C]. */
  embed(tokens: Tensor, ctx: ForwardContext): Tensor;
  /** Final norm and head: [T, C] -> logits [T, V]. */
  logits(x: Tensor, ctx: ForwardContext): Calls<Tensor>;
}
