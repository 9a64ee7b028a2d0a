import type { Job } from '../base/job.js';
import type { JobEnv } from '../backend/env.js';
import type { CalibrationSet } from '../arch/calibration.js';
import type { OpenModel } from '../arch/open.js';
import { WeightReader } from '../arch/weights.js';
import { allocateBits, candidateBits } from './allocate.js';
import type { QuantPlan } from './plan.js';
import { bitsPerWeight, type Recipe, type SchemeChange } from './scheme.js';
import { measureSensitivities, sensitivitiesToJson, type Sensitivity } from './sensitivity.js';

interface Choice {
  readonly open: OpenModel;
  readonly plan: QuantPlan;
  readonly recipe: Recipe;
  readonly set: CalibrationSet;
  readonly job: Job;
  readonly env: JobEnv;
  readonly states: 'f32' | 'bf16';
  readonly commandLine: string;
}

const step = 'sensitivities';

/**
 * With `--target-bpw`: bits for each set of fused linears as its measured sensitivity asks; undefined without. Measured
 * once: a resumed job reads them from its journal.
 */
export async function chooseBits(choice: Choice): Promise<Map<string, SchemeChange> | undefined> {
  const { open, plan, recipe, set, job, env, states } = choice;
  if (recipe.targetBpw === undefined) return undefined;
  if (!job.done(step)) {
    const reader = new WeightReader(open, env.device, states);
    const resumeHint = `Go on with: ${choice.commandLine}`;
    const candidates = candidateBits;
    const found = await measureSensitivities({ open, plan, recipe, set, reader, env, candidates, resumeHint });
    await job.mark(step, sensitivitiesToJson(found));
  }
  const units = job.data(step) as unknown as Sensitivity[];
  const chosen = allocateBits(units, targetOfFree(units, plan, recipe.targetBpw));
  const counts = new Map<number, number>();
  for (const { bits } of chosen.values()) counts.set(bits!, (counts.get(bits!) ?? 0) + 1);
  const parts = [...counts].sort(([a], [b]) => a - b).map(([bits, linears]) => `${linears} linears at ${bits} bits`);
  env.log.info(`Chosen by measured sensitivity: ${parts.join(', ')}`);
  return chosen;
}

/** What is left of the target for the linears that may choose, once overridden ones have taken theirs. */
function targetOfFree(units: readonly Sensitivity[], { linears }: QuantPlan, target: number): number {
  const free = new Set(units.flatMap((unit) => unit.linears));
  let [bits, weights] = [0, 0];
  for (const { linear, stored, scheme, dtype } of linears.values()) {
    if (scheme === undefined) continue;
    const count = stored.inFeatures * stored.outFeatures;
    bits += count * target;
    if (free.has(linear.name)) weights += count;
    else bits -= count * bitsPerWeight(scheme, stored.inFeatures, dtype === 'f32' ? 32 : 16);
  }
  return bits / weights;
}
