import { resolve } from 'node:path';
import { exists } from '../base/files.js';
import { Job, requireNoOutput, type Json } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import { blockStep, eachBlock, streamBlocks, type BlockRange } from '../arch/stream.js';
import type { WeightReader } from '../arch/weights.js';
import { assemble, stage, type Run } from './assemble.js';
import { chooseBits } from './choose.js';
import { CoverageGate } from './coverage.js';
import { storedScales } from './formats.js';
import type { QuantizeOptions, QuantizeResult } from './options.js';
import { calibrate, fingerprint, planAll, plannedDTypes, prepare, statesOf } from './prepare.js';
import { fromJson } from './report.js';
import { QuantVisitor, type TargetWriter } from './visitor.js';

export type { QuantizeOptions, QuantizePreview, QuantizeResult } from './options.js';

/**
 * Quantizes a checkpoint block by block into a folder that is verified before it gets its name. Killed at any instant,
 * the same call goes on and ends with the same bytes.
 * Errors: bad input, usage, resources, `interrupted`; `gate` when too many experts saw no token.
 */
export async function quantize(options: QuantizeOptions, env: JobEnv): Promise<QuantizeResult> {
  const started = performance.now();
  const prepared = await prepare(options);
  const { open } = prepared;
  try {
    for (const notice of prepared.notices) env.log.info(notice);
    if (options.restart !== true) await requireNoOutputYet(options);
    const set = await calibrate(options, prepared, env);
    const { out, overwrite, restart, commandLine } = options;
    const recipe = fingerprint(options, prepared, set, env);
    return await Job.run({ out, overwrite, restart, fingerprint: recipe }, async (job) => {
      const states = statesOf(options, prepared, env);
      const chosen = set && (await chooseBits({ ...prepared, set, job, env, states, commandLine }));
      const final = chosen ? await planAll(options, prepared, chosen) : prepared;
      const run = { options, prepared: final, set, job, env, started };
      return await assemble(run, (targets, reader, env) => solveBlocks({ ...run, env }, targets, reader));
    });
  } finally {
    await open.close();
  }
}

/** Before minutes of sampling. With a work folder there, the job itself knows whether the output is its own. */
export async function requireNoOutputYet({ out, overwrite = false }: QuantizeOptions): Promise<void> {
  if (!(await exists(`${resolve(out)}.part`))) await requireNoOutput(out, overwrite);
}

/** Solves the blocks that are not done, of the whole model or of `range`, and marks each in the job's journal. */
export async function solveBlocks(
  { options, prepared, set, job, env }: Run,
  targets: readonly TargetWriter[],
  reader: WeightReader,
  range?: BlockRange,
): Promise<void> {
  const { open, plan, recipe } = prepared;
  const { model } = open;
  // A block that is done behind one that is not is done again.
  const { from } = range ?? { from: 0 };
  const todo = model.blocks.findIndex(({ index }, i) => i >= from && !job.done(blockStep(stage, index)));
  const uncoveredBefore = model.blocks
    .filter(({ index }, i) => (todo === -1 || i < todo) && job.done(blockStep(stage, index)))
    .reduce((sum, { index }) => {
      const { result } = job.data(blockStep(stage, index)) as { result: Json };
      return sum + (fromJson(result).coverage?.uncovered ?? 0);
    }, 0);
  const resumeHint = `Go on with: ${options.commandLine}`;
  using visitor = new QuantVisitor({
    env,
    resumeHint,
    plan,
    recipe,
    targets,
    plannedDType: plannedDTypes(prepared),
    scales: storedScales(options.formats),
    coverage: new CoverageGate(model, options.maxUncovered, uncoveredBefore),
    calibrateAllExperts: options.calibrateAllExperts ?? false,
  });
  try {
    const common = { open, env, reader, job, stage, range, resumeHint };
    if (set === undefined) {
      await eachBlock(common, async (block, weights) => {
        for (const linears of block.linears) await visitor.quantize(linears, weights, { statistics: undefined });
        const finished = await visitor.finish(block);
        await visitor.flush();
        return finished;
      });
      return;
    }
    await streamBlocks(
      {
        ...common,
        set,
        dtype: statesOf(options, prepared, env),
        independent: options.independentBlocks ?? false,
        ...(options.batchRows !== undefined && { batchRows: options.batchRows }),
        ...(options.budget !== undefined && { budget: options.budget }),
      },
      visitor,
    );
  } finally {
    await visitor.settled();
  }
}
