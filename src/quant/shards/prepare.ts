import type { JobEnv } from '../../backend/env.js';
import { badInput, badUsage } from '../../base/errors.js';
import { requireFingerprint, type Json } from '../../base/job.js';
import type { CalibrationSet } from '../../arch/calibration.js';
import type { QuantizeOptions } from '../options.js';
import { fingerprint, planAll, prepare, type Prepared } from '../prepare.js';
import type { ShardPlan } from './files.js';
import { shardRanges, type Range } from './ranges.js';

/** What `plan` implies. */
export const asShards = (options: QuantizeOptions): QuantizeOptions => ({ ...options, independentBlocks: true });

/** Of the work folder: that of `quantize --independent-blocks`, and how many shards there are. */
export const shardsFingerprint = (
  options: QuantizeOptions,
  prepared: Prepared,
  set: CalibrationSet | undefined,
  env: JobEnv,
  shards: number,
): Record<string, Json> => ({ ...fingerprint(options, prepared, set, env), shards });

/** A plan, with the model and everything else as `plan` found it. */
export interface Planned {
  readonly options: QuantizeOptions;
  readonly prepared: Prepared;
  readonly ranges: readonly Range[];
  readonly fingerprint: Readonly<Record<string, Json>>;
}

/**
 * Opens the model of a plan for as long as `body` works with it. `given`: the plan's options.
 * Errors: input, where model, options or tool are not those with which the plan was made.
 */
export async function withPlanned<T>(
  plan: ShardPlan,
  given: QuantizeOptions,
  env: JobEnv,
  body: (planned: Planned) => Promise<T>,
): Promise<T> {
  if (env.device.kind !== plan.device) {
    throw badUsage('The plan was made on another kind of device, which rounds differently', { expected: plan.device, got: env.device.kind, hint: `Add --device ${plan.device}.` }); // prettier-ignore
  }
  const options = asShards({ ...given, out: plan.out });
  const prepared = await prepare(options);
  try {
    const { vocab } = prepared.open.model;
    if (plan.set?.tokens.some((token) => token < 0 || token >= vocab)) {
      throw badInput('The calibration tokens are not of this model', {
        where: plan.path,
        expected: `0 to ${vocab - 1}`,
      });
    }
    const own = shardsFingerprint(options, prepared, plan.set, env, plan.shards);
    await requireFingerprint(plan.folder, own);
    const final = plan.chosen ? await planAll(options, prepared, plan.chosen) : prepared;
    return await body({
      options,
      prepared: final,
      ranges: shardRanges(final.open.model, plan.shards),
      fingerprint: own,
    });
  } finally {
    await prepared.open.close();
  }
}
