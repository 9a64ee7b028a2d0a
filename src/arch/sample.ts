import { noResource } from '../base/errors.js';
import { Random } from '../base/rng.js';
import type { JobEnv } from '../backend/env.js';
import { generate } from './generate.js';
import type { OpenModel } from './open.js';
import type { Model } from './types.js';
import { ResidentModel } from './resident.js';

export interface SampleOptions {
  readonly samples: number;
  readonly seqLen: number;
  readonly seed: number;
  /** What the sequences begin with, one each, all of one length; absent: BOS (a random token where the model has none). */
  readonly prompts?: readonly Int32Array[];
}

/** Sequences drawn side by side; on a GPU as many as have keys and values of at most 4 GiB. */
function together({ blocks, hidden }: Model, seqLen: number, { device }: JobEnv): number {
  if (device.kind === 'cpu') return 128;
  return Math.min(1024, Math.max(32, Math.floor(2 ** 32 / (4 * blocks.length * hidden * seqLen))));
}

/**
 * Text from the model itself (Liu et al. 2023, LLM-QAT): [samples, seqLen] tokens at temperature 1; a text that ends is
 * followed by the next. The whole model is held on the device meanwhile.
 */
export async function sampleTokens(
  open: OpenModel,
  { samples, seqLen, seed, prompts: given }: SampleOptions,
  env: JobEnv,
): Promise<Int32Array> {
  const { model } = open;
  const tokens = new Int32Array(samples * seqLen);
  const starts = new Random(seed, 1);
  const start = () => model.bosId ?? Math.floor(starts.uniform() * model.vocab);
  const first = given ?? Array.from({ length: samples }, () => Int32Array.of(start()));
  const length = first[0]!.length;
  first.forEach((prompt, i) => tokens.set(prompt, i * seqLen));
  if (length === seqLen) return tokens;
  using resident = await load(open, env);
  const many = together(model, seqLen, env);
  for (let from = 0; from < samples; from += many) {
    const prompts = first.slice(from, from + many);
    const drawn = await generate(resident, env, prompts, {
      maxNewTokens: seqLen - length,
      stopIds: [],
      // Sequence i of a call draws from stream i: other calls need other seeds.
      seed: seed + from * 65_537,
    });
    drawn.forEach(({ tokens: more }, i) => tokens.set(more, (from + i) * seqLen + length));
    const done = Math.min(samples, from + many);
    env.log.progress({ stage: 'sampling calibration text', done, total: samples, detail: `${done * seqLen} tokens` });
  }
  return tokens;
}

async function load(open: OpenModel, env: JobEnv): Promise<ResidentModel> {
  try {
    return await ResidentModel.load(open, env, env.device.kind === 'cpu' ? 'f32' : 'bf16');
  } catch (error) {
    if ((error as { kind?: string }).kind !== 'resource') throw error;
    throw noResource('The model is too large to sample its own calibration text on this machine', {
      hint: 'Give text instead: --calibration file.txt, or leave the option out to use the small set of the tool.',
      cause: error,
    });
  }
}
