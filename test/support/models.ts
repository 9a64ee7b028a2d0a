import type { JobEnv } from '../../src/backend/env.js';
import { openModel } from '../../src/arch/open.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { planConversion, type ConvertOptions, type ConvertPlan } from '../../src/export/convert-plan.js';
import { runConversion, type ConvertReport } from '../../src/export/convert.js';
import { Scope } from '../../src/tensor/tensor.js';

/** What `convert` does; `change`: to what is planned. */
export async function convert(
  options: ConvertOptions,
  out: string,
  env: JobEnv,
  change: (plan: ConvertPlan) => ConvertPlan = (plan) => plan,
): Promise<{ report: ConvertReport; notes: readonly string[] }> {
  const plan = await planConversion(options);
  try {
    const run = { ...options, out, overwrite: false, restart: false, shardSize: 5e9, ioBudget: 64e6 };
    const rest = { allowSaturation: false, recipe: {}, resumeHint: '' };
    return { report: await runConversion(change(plan), { ...run, ...rest }, env), notes: plan.notes };
  } finally {
    await plan.close();
  }
}

/** Our own logits f32 [B S, V] for tokens [B, S]. */
export async function ourLogits(path: string, env: JobEnv, tokens: Int32Array, batch = 1): Promise<Float32Array> {
  const open = await openModel(path);
  try {
    using resident = await ResidentModel.load(open, env, 'f32');
    using scope = new Scope(env.device);
    return await resident.logits(scope, resident.hidden(scope, tokens, batch)).float32();
  } finally {
    await open.close();
  }
}
