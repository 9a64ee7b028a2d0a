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

/**
 * `moe`, then `quantize` of what came out, as one job with one output. The mixture lies in `<out>.mixture` until the
 * output has its name. Each of the two is durable: the same command goes on in the step where it stopped. `accept`
 * compares the last output with the dense model; that the mixture equals it with all experts on is tested by itself.
 */
export async function moeThenQuantize(
  job: MoeOptions,
  { bits, groupSize }: { readonly bits: 4 | 8; readonly groupSize: number },
  accept: Accept | undefined,
  env: JobEnv,
): Promise<{ readonly mixture: MoeReport; readonly quantized: QuantizeResult }> {
  if (isFileOutput(job.out)) {
    throw badUsage('--then quantize writes a folder', { got: job.out, hint: 'Leave the ending out of -o.' });
  }
  const { runMoe } = await import('../moe/run.js');
  const { quantize } = await import('../quant/run.js');
  const { checkRecipe, defaultRecipe } = await import('../quant/scheme.js');
  const recipe = { ...defaultRecipe, bits, groupSize };
  checkRecipe(recipe);
  const { calibration } = job;
  if (!calibration) throw badUsage('--then quantize needs calibration text');
  if (!(await exists(`${resolve(job.out)}.part`))) await requireNoOutput(job.out, job.overwrite ?? false);
  const between = `${resolve(job.out)}.mixture`;
  const mixture = await runMoe({ ...job, out: between, reuse: true }, env);
  const quantized = await quantize(
    {
      input: between,
      out: job.out,
      ...(job.overwrite !== undefined && { overwrite: job.overwrite }),
      ...(job.restart !== undefined && { restart: job.restart }),
      recipe,
      formats: ['compressed-tensors'],
      calibration,
      ...(job.states !== undefined && { states: job.states }),
      ...(job.shardSize !== undefined && { shardSize: job.shardSize }),
      ...(accept && { accept }),
      tool: job.tool,
      commandLine: job.commandLine,
    },
    env,
  );
  await rm(between, { recursive: true, force: true });
  return { mixture, quantized };
}
