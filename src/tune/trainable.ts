import { badInput } from '../base/errors.js';
import type { OpenModel } from '../arch/open.js';

/** Refuses architectures some of whose parts have no gradients yet. */
export function requireTrainable({ checkpoint, model }: OpenModel): void {
  const reason =
    model.stateWidth !== model.hidden
      ? 'its layers pass on several hidden states side by side'
      : model.blocks.some(({ attention }) => attention.latent?.indexer)
        ? 'its attention chooses which keys it sees'
        : model.blocks.some(({ attention }) => attention.grouped?.cap !== undefined)
          ? 'its attention scores are capped'
          : undefined;
  if (reason === undefined) return;
  throw badInput('This architecture cannot be trained', {
    where: checkpoint.path,
    got: `model_type ${model.modelType}: ${reason}`,
    hint: 'GPTQ needs no gradients: deepseek-convert quantize --method gptq.',
  });
}
