import type { Model } from '../../arch/types.js';
import type { MoeShape } from '../shape.js';

export type ContainerName = 'glm4_moe' | 'qwen2_moe' | 'qwen3_moe' | 'mixtral';

/**
 * `split`: experts are parts of the dense network; `upcycle`: each is a copy of it; `drop`: a copy with some neurons drawn
 * anew.
 */
export type MoeMethod = 'split' | 'upcycle' | 'drop';

/** Tensor names, without `.weight`, of one gated network. */
export interface NetworkNames {
  readonly gate: string;
  readonly up: string;
  readonly down: string;
}

/** How the container's own arithmetic is made to give each part of the network the weight that it needs. */
export interface Weighting {
  /** down_proj of the routed experts, and of the shared network, is stored times this. */
  readonly routedDown: number;
  readonly sharedDown: number;
  /** Whether the container divides the chosen experts' weights by their sum. */
  readonly normalized: boolean;
  /** routed_scaling_factor, where the container has it. */
  readonly scale?: number;
}

/** A stored tensor that no layer of the dense model has and that holds one number. */
export interface ConstantTensor {
  readonly name: string;
  readonly shape: readonly number[];
  readonly value: number;
}

/** A model class of transformers and vLLM that holds the mixture. */
export interface Container {
  readonly name: ContainerName;
  /** What the router makes of its logits before the best are chosen. */
  readonly scoring: 'sigmoid' | 'softmax';
  /** Whether the selection has a bias of its own. */
  readonly selectionBias: boolean;
  /** Whether routing can be limited to the best of groups of experts, each scored by its two best. */
  readonly groups: boolean;
  /** Number of shared experts: least, most, and when nothing is asked for. */
  readonly shared: { readonly min: number; readonly max: number; readonly default: number };
  /** Which layers can stay dense: the first ones, any, or none. */
  readonly denseLayers: 'first' | 'any' | 'none';
  /** Whether every reader lets the head share the embedding's weights (tie_word_embeddings). */
  readonly tiesHead: boolean;
  weighting(method: MoeMethod, shape: MoeShape): Weighting;
  /** Name of the router's tensor, without `.weight`, in the layer `layer` (`model.layers.3`). */
  router(layer: string): string;
  /** Full name of the selection bias. */
  bias?(layer: string): string;
  expert(layer: string, expert: number): NetworkNames;
  /** The shared experts as one network. */
  sharedExpert?(layer: string): NetworkNames;
  /** Constants that a layer needs, where its feed-forward part was `converted` and where it stays dense. */
  constants(layer: string, source: Source, converted: boolean): readonly ConstantTensor[];
  /** Keys of config.json beside those that all containers have. */
  config(shape: MoeShape, weighting: Weighting, source: Source): Readonly<Record<string, unknown>>;
  /** Why the container cannot hold the attention layers of the source; undefined when it can. */
  refuse(source: Source): string | undefined;
}

/** What a container has to know of the dense model. */
export interface Source {
  readonly model: Model;
  readonly qkvBias: boolean;
  readonly outBias: boolean;
  /** Norms on the heads of q and k. */
  readonly qkNorm: boolean;
  /** Sliding windows of the layers, where there are any. */
  readonly windows: readonly (number | undefined)[];
  /** Layers that stay dense, ascending. */
  readonly dense: readonly number[];
}

export function sourceOf(model: Model, dense: readonly number[]): Source {
  const names = new Set(
    model.blocks.flatMap((block) => block.tensors.map(({ name }) => name.slice(block.name.length))),
  );
  return {
    model,
    qkvBias: names.has('.self_attn.q_proj.bias'),
    outBias: names.has('.self_attn.o_proj.bias'),
    qkNorm: names.has('.self_attn.q_norm.weight'),
    windows: model.blocks.map(({ window }) => window),
    dense,
  };
}

/** A factor that changes no bit of a binary float's mantissa. */
export const powerOfTwo = (n: number): boolean => Number.isInteger(Math.log2(n));
