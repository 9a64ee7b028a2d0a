import type { JobEnv } from '../backend/env.js';
import { generate } from '../arch/generate.js';
import type { OpenModel } from '../arch/open.js';
import { ResidentModel } from '../arch/resident.js';
import { distinct, type Response } from './diversity.js';
import type { GenerationOptions } from './generations.js';
import { mean, pairedBootstrap, round } from './stats.js';
import type { StabilityResult } from './report.js';
import type { Prompt } from './texts.js';

const parts = 4;
/** A last quarter that says so much again has collapsed into a loop. */
const collapsedAt = 0.8;

/**
 * Long generations of both models with the same seeds, which an end token does not end: whether a model that begins
 * well still says something new after a thousand tokens.
 */
export async function compareStability(
  reference: OpenModel,
  candidate: OpenModel,
  prompts: readonly Prompt[],
  options: GenerationOptions,
  env: JobEnv,
): Promise<StabilityResult> {
  const { newTokens, temperature, seed, dtype, resamples } = options;
  const write = async (open: OpenModel): Promise<Int32Array[]> => {
    using resident = await ResidentModel.load(open, env, dtype, prompts.length);
    const ids = prompts.map((prompt) => prompt.ids);
    const settings = { maxNewTokens: newTokens, temperature, greedy: temperature === 0, seed, stopIds: [] };
    return (await generate(resident, env, ids, settings)).map(({ tokens }) => tokens);
  };
  const a = await write(reference);
  env.log.progress({ stage: 'long generations', done: 1, total: 2, detail: `${newTokens} tokens of the reference` });
  const b = await write(candidate);
  env.log.progress({ stage: 'long generations', done: 2, total: 2, detail: `${newTokens} tokens of the candidate` });
  return { ...stabilityNumbers(a, b, { resamples, seed }), prompts: prompts.length, newTokens, temperature };
}

/** rep-4 of each quarter of long responses, response i of both to the same prompt. */
export function stabilityNumbers(
  reference: readonly Response[],
  candidate: readonly Response[],
  bootstrap: { readonly resamples: number; readonly seed: number },
): Pick<StabilityResult, 'quarters' | 'collapsed' | 'increase'> {
  const quarter = (response: Response, part: number): number => {
    const all = Array.from(response);
    const at = (p: number): number => Math.floor((p * all.length) / parts);
    const value = 1 - distinct(all.slice(at(part), at(part + 1)), 4);
    return Number.isNaN(value) ? 0 : value;
  };
  const sides = [reference, candidate].map((side) => side.map((r) => Array.from({ length: parts }, (_, p) => quarter(r, p)))); // prettier-ignore
  const [a, b] = sides as [number[][], number[][]];
  const last = (rows: readonly number[][], i: number): number => rows[i]!.at(-1)!;
  const increase = (draw: Iterable<number>): number => mean(Array.from(draw, (i) => last(b, i) - last(a, i)));
  const [interval] = pairedBootstrap(a.length, (draw) => [increase(draw)], bootstrap);
  const means = (rows: readonly number[][]) => Array.from({ length: parts }, (_, p) => round(mean(rows.map((r) => r[p]!)))); // prettier-ignore
  const collapsed = (rows: readonly number[][]) => rows.filter((r) => r.at(-1)! > collapsedAt).length;
  return {
    quarters: { reference: means(a), candidate: means(b) },
    collapsed: { reference: collapsed(a), candidate: collapsed(b) },
    increase: {
      value: round(increase(a.keys())),
      interval: { low: round(interval!.low), high: round(interval!.high) },
    },
  };
}
