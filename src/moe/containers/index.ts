import { badInput } from '../../base/errors.js';
import { isCapped } from '../../arch/types.js';
import type { MoeShape } from '../shape.js';
import { glm4Moe } from './glm4_moe.js';
import { mixtral } from './mixtral.js';
import { qwen2Moe } from './qwen2_moe.js';
import { qwen3Moe } from './qwen3_moe.js';
import type { Container, ContainerName, Source, Weighting } from './types.js';

/** A new container is a file and a line here. */
export const containers: Readonly<Record<ContainerName, Container>> = {
  glm4_moe: glm4Moe,
  qwen2_moe: qwen2Moe,
  qwen3_moe: qwen3Moe,
  mixtral,
};

export const containerNames = Object.keys(containers) as ContainerName[];

/** Architectures whose mathematics, but for the feed-forward part, is that of the containers. */
const sources: ReadonlySet<string> = new Set(['llama', 'mistral', 'qwen2', 'qwen3']);

/** Keys that mean the same in the dense model and in every container. */
const carried = [
  'vocab_size', 'hidden_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads', 'hidden_act',
  'max_position_embeddings', 'initializer_range', 'rms_norm_eps', 'use_cache', 'attention_dropout',
  'bos_token_id', 'eos_token_id', 'pad_token_id', 'dtype', 'torch_dtype',
]; // prettier-ignore

/** Refuses a dense model that the container cannot hold, saying which can. */
export function requireFit(container: Container, source: Source, where: string): void {
  const { modelType } = source.model;
  if (!sources.has(modelType)) {
    throw badInput('No container holds this architecture with experts in place of its feed-forward layers', {
      where,
      got: `model_type ${JSON.stringify(modelType)}`,
      expected: [...sources].join(', '),
    });
  }
  if (isCapped(source.model)) throw badInput('No container holds soft caps on scores or logits', { where });
  const reason = container.refuse(source);
  if (reason === undefined) return;
  const others = Object.values(containers).filter((other) => other.refuse(source) === undefined);
  throw badInput(`The container ${container.name} cannot hold this model: ${reason}`, {
    where,
    ...(others.length > 0 && { hint: `Use --container ${others.map(({ name }) => name).join(' or ')}.` }),
  });
}

/** config.json of the mixture. */
export function containerConfig(
  container: Container,
  shape: MoeShape,
  weighting: Weighting,
  source: Source,
): Record<string, unknown> {
  const { model } = source;
  const config = { ...model.config, num_key_value_heads: model.kvHeads } as Record<string, unknown>;
  const kept = carried.filter((key) => config[key] !== undefined).map((key) => [key, config[key]]);
  return {
    ...container.config(shape, weighting, source),
    ...(Object.fromEntries(kept) as Record<string, unknown>),
    head_dim: model.headDim,
    tie_word_embeddings: model.tied && container.tiesHead,
    ...ropeConfig(model.config, container.name === 'glm4_moe'),
  };
}

/** Rope settings as transformers 5 (rope_parameters) and 4 (rope_theta, rope_scaling) read them. */
function ropeConfig(config: Readonly<Record<string, unknown>>, partial: boolean): Record<string, unknown> {
  const modern = (config.rope_parameters ?? {}) as Record<string, unknown>;
  const scaling = (config.rope_scaling ?? undefined) as Record<string, unknown> | undefined;
  const theta = scaling?.rope_theta ?? modern.rope_theta ?? config.rope_theta ?? 10_000;
  const { rope_theta: _theta, ...rest } = scaling ?? modern;
  const type = rest.rope_type ?? rest.type ?? 'default';
  const whole = partial ? { partial_rotary_factor: 1 } : {};
  const original = config.original_max_position_embeddings;
  return {
    rope_parameters: { ...rest, rope_type: type, rope_theta: theta, ...whole },
    rope_theta: theta,
    ...(type !== 'default' && { rope_scaling: { ...rest, rope_type: type } }),
    ...(original !== undefined && { original_max_position_embeddings: original }),
  };
}
