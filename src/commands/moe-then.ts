import { rm } from 'node:fs/promises';
import { resolve } from 'node:path';
import { badUsage } from '../base/errors.js';
import { exists } from '../base/files.js';
import { requireNoOutput } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { Accept } from '../checkpoint/types.js';
import { isFileOutput } from '../checkpoint/writer.js';
import type { MoeOptions, MoeReport } from '../moe/run.js';
import type { QuantizeResult } from '../quant/options.js';
import type { DistillMixtureResult, MixtureTraining } from '../train/moe/options.js';

/** What comes behind the making of a mixture; one of them at least. */
export interface Stages {
  readonly distill?: MixtureTraining;
  readonly quantize?: { readonly bits: 4 | 8; readonly groupSize: number };
}

export interface StagedResult {
  readonly mixture: MoeReport;
  readonly distilled?: DistillMixtureResult;
  readonly quantized?: QuantizeResult;
}

/**
 * `moe`, then distillation, then `quantize` of what came out, as one job with one output. What lies between stands in
 * `<out>.mixture` and `<out>.distilled` until the output has its name. Each stage is durable: the same command goes on in
 * the one where it stopped. `accept` compares the last output with the dense model; that the mixture equals it with all
 * experts on is tested by itself, before anything is trained.
 */
export async function moeInStages(
  job: MoeOptions,
  { distill, quantize: scheme }: Stages,
  accept: Accept | undefined,
  env: JobEnv,
): Promise<StagedResult> {
  const { calibration } = job;
  if (!calibration) throw badUsage('What comes behind a mixture needs calibration text');
  const quantization = scheme && (await quantizer(job, scheme));
  if (!(await exists(`${resolve(job.out)}.part`))) await requireNoOutput(job.out, job.overwrite ?? false);
  const { runMoe } = await import('../moe/run.js');
  const between = { mixture: `${resolve(job.out)}.mixture`, distilled: `${resolve(job.out)}.distilled` };
  // What an interrupted run left is replaced only when all begins anew.
  const anew = job.restart === true ? { overwrite: true } : {};
  const mixture = await runMoe({ ...job, ...anew, out: between.mixture, reuse: true }, env);
  const { out, overwrite, restart, shardSize, states, tool, commandLine, config } = job;
  const common = {
    ...(restart !== undefined && { restart }),
    ...(shardSize !== undefined && { shardSize }),
    ...{ tool, commandLine },
  };
  const last = { out, ...(overwrite !== undefined && { overwrite }), ...(accept && { accept }) };
  let distilled: DistillMixtureResult | undefined;
  if (distill) {
    const { distillMixture } = await import('../train/moe/run.js');
    distilled = await distillMixture(
      {
        ...common,
        ...(quantization ? { ...anew, out: between.distilled, reuse: true } : last),
        ...distill,
        ...{ teacher: job.input, ...(config !== undefined && { config }), mixture: between.mixture },
        calibration,
        ...(states !== undefined && { dtype: states }),
        seed: job.seed ?? 0,
      },
      env,
    );
  }
  const quantized = await quantization?.(
    {
      ...common,
      ...last,
      input: distilled ? between.distilled : between.mixture,
      formats: ['compressed-tensors'],
      calibration,
      ...(states !== undefined && { states }),
    },
    env,
  );
  for (const folder of Object.values(between)) await rm(folder, { recursive: true, force: true });
  return { mixture, ...(distilled && { distilled }), ...(quantized && { quantized }) };
}

/** The second command with its recipe, refused before the first one works. */
async function quantizer({ out }: MoeOptions, scheme: NonNullable<Stages['quantize']>) {
  if (isFileOutput(out)) {
    throw badUsage('--then quantize writes a folder', { got: out, hint: 'Leave the ending out of -o.' });
  }
  const { quantize } = await import('../quant/run.js');
  const { checkRecipe, defaultRecipe } = await import('../quant/scheme.js');
  const recipe = { ...defaultRecipe, ...scheme };
  checkRecipe(recipe);
  return (options: Omit<Parameters<typeof quantize>[0], 'recipe'>, env: JobEnv) =>
    quantize({ ...options, recipe }, env);
}
