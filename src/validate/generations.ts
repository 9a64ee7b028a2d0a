import type { JobEnv } from '../backend/env.js';
import { generate } from '../arch/generate.js';
import type { OpenModel } from '../arch/open.js';
import { ResidentModel } from '../arch/resident.js';
import type { Tokenizer } from '../tokenizer/tokenizer.js';
import { compareDiversity } from './diversity.js';
import type { DiversityResult } from './report.js';
import type { Prompt } from './texts.js';

export interface GenerationOptions {
  readonly newTokens: number;
  readonly temperature: number;
  readonly seed: number;
  readonly dtype: 'f32' | 'bf16';
  readonly resamples: number;
}

/**
 * Lets both models continue the same prompts with the same seeds (prompt i draws from stream i in both) and compares
 * what comes out. Each model is resident while it writes, one after the other.
 */
export async function compareGenerations(
  reference: OpenModel,
  candidate: OpenModel,
  tokenizer: Tokenizer,
  prompts: readonly Prompt[],
  options: GenerationOptions,
  env: JobEnv,
): Promise<DiversityResult> {
  const { newTokens, temperature, seed, dtype, resamples } = options;
  // One list of end tokens for both: generation_config.json may be missing beside one of them.
  const stopIds = reference.model.eosIds;
  const write = async (open: OpenModel): Promise<Int32Array[]> => {
    using resident = await ResidentModel.load(open, env, dtype, prompts.length);
    const results = await generate(
      resident,
      env,
      prompts.map(({ ids }) => ids),
      { maxNewTokens: newTokens, temperature, greedy: temperature === 0, seed, stopIds },
    );
    return results.map(({ tokens }) => tokens);
  };
  const a = await write(reference);
  env.log.progress({ stage: 'generations', done: 1, total: 2, detail: `${prompts.length} of the reference` });
  const b = await write(candidate);
  env.log.progress({ stage: 'generations', done: 2, total: 2, detail: `${prompts.length} of the candidate` });
  const pairs = await Promise.all(
    prompts.map(async ({ text }, i) => ({
      prompt: text,
      reference: await tokenizer.decode(a[i]!),
      candidate: await tokenizer.decode(b[i]!),
    })),
  );
  return {
    ...compareDiversity(a, b, reference.model.vocab, { resamples, seed }),
    settings: { prompts: prompts.length, newTokens, temperature, seed },
    pairs,
  };
}
