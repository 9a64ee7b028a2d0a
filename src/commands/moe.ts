import { resolve } from 'node:path';
import { formatBytes } from '../base/files.js';
import { count, duration } from '../base/text.js';
import type { MoeOptions } from '../moe/options.js';
import type { MoePlan } from '../moe/plan.js';
import type { MoeReport } from '../moe/report.js';
import type { MixtureTraining } from '../train/moe/options.js';
import { acceptance } from './acceptance.js';
import { recordConversion } from './history-file.js';
import { distillationOf, distillSummary } from './moe-distill.js';
import {
  commonOptions,
  jobOptions,
  options,
  requireDrop,
  requireGroups,
  requireThen,
  surgeryOf,
  type Given,
} from './moe-options.js';
import { runSurgeryCommand } from './moe-surgery.js';
import type { StagedResult } from './moe-then.js';
import { input, openEnvironment } from './shared.js';
import { defineCommand, type CommandResult, type Io } from './types.js';

export const command = defineCommand({
  name: 'moe',
  description:
    'Divides the feed-forward layers of a dense model among experts, block by block, and fits routers to them. With all ' +
    'experts on the split is the dense model, which is tested on every run. Interrupted, the same command goes on where ' +
    'it stopped. With --prune-experts or --merge-experts a mixture becomes one with fewer experts.',
  arguments: { input },
  options,
  examples: [
    ['moe fixtures/v1.0/v1.0_checkpoint.bin -o out/moe --experts 8 --active 4 --samples 8 --seq-len 128', 'Half of the neurons for each token.'],
    ['moe fixtures/v1.0/v1.0_checkpoint.bin -o out/copies.bin --method upcycle --container mixtral', 'Eight copies, to be trained on.'],
    ['moe fixtures/v1.0/v1.0_checkpoint.bin -o out/plan --dry-run', 'What would be done.'],
    ['moe fixtures/moe-6m -o out/six --prune-experts 6 --samples 16 --seq-len 128', 'Six of the eight experts of each layer.'],
  ], // prettier-ignore
  async run(given, io) {
    const surgery = surgeryOf(given, io);
    if (surgery) return await runSurgeryCommand({ ...commonOptions(given, io), ...surgery, by: given.pruneBy }, given, io); // prettier-ignore
    const { runMoe, previewMoe } = await import('../moe/run.js');
    const job = jobOptions(given, io);
    requireThen(given, io);
    requireDrop(given, io);
    requireGroups(given);
    const distill = distillationOf(given, job, io);
    if (given.dryRun) return showPlan(await previewMoe(job), job, given, distill);
    using env = await openEnvironment(given, io);
    const { accept, extend } = acceptance(
      given,
      io,
      env,
      'active' in io.settings.from || job.refit || distill ? undefined : notAskedFor(job),
    );
    if (distill || given.then === 'quantize') {
      const { moeInStages } = await import('./moe-then.js');
      const quantize = { bits: given.bits === '8' ? 8 : 4, groupSize: given.groupSize } as const;
      const stages = { ...(distill && { distill }), ...(given.then === 'quantize' && { quantize }) };
      const result = await moeInStages(job, stages, accept, env);
      await recordConversion(given.out, io);
      return extend(await joined(result, given, io));
    }
    const result = await runMoe({ ...job, ...(accept && { accept }) }, env);
    await recordConversion(given.out, io);
    return extend(await report(result, io));
  },
});

/** The report of the last stage, those of the ones before it under their names. */
async function joined({ mixture, distilled, quantized }: StagedResult, given: Given, io: Io): Promise<CommandResult> {
  const made = await report({ ...mixture, out: resolve(given.out) }, io);
  const lines = made.text.trimEnd().split('\n');
  if (distilled) {
    lines.push(
      ...distillSummary(distilled),
      `text to distill on: ${distilled.calibration}`,
      duration(distilled.seconds),
    );
    if (given.trainingReport !== undefined) {
      const { writeTrainingReport } = await import('../train/report.js');
      await writeTrainingReport(given.trainingReport, { out: given.out, blocks: [], endToEnd: distilled.training, calibration: distilled.calibration }); // prettier-ignore
    }
  }
  const { out: _, ...distillation } = distilled ?? {};
  const stage = { ...(distilled && { distillation }) };
  if (!quantized) return { ...made, data: { ...made.data, ...stage }, text: `${lines.join('\n')}\n` };
  const { report: quantizeReport } = await import('./quantize.js');
  const { data, text, ...rest } = quantizeReport(quantized, io);
  const { out: __, ...mixtureData } = made.data as Record<string, unknown>;
  return { ...rest, data: { ...data, mixture: mixtureData, ...stage }, text: `${lines.slice(1).join('\n')}\n${text}` };
}

/** Gates of what a model loses. */
const lossGates = ['maxKl', 'maxKlP99', 'maxPplRatio', 'minTop1', 'maxLayerError'] as const;

/**
 * Without a number of active experts that was asked for, the promise is equality with all experts on, which the job
 * tests by itself. What the default number loses is shown, and left to be judged by whoever goes on with it.
 */
function notAskedFor({ method, active, experts }: MoeOptions) {
  if (method === 'drop') {
    return {
      ids: lossGates,
      reason: 'Neurons drawn anew have learned nothing yet: what they cost is shown, not judged.',
    };
  }
  if (method !== 'split' || active >= experts) return undefined;
  return {
    ids: lossGates,
    reason: `This is what ${active} of ${experts} experts lose without training, by default: shown, not judged. --active ${active} refits for that number and judges it.`,
  };
}

async function report(result: MoeReport, io: Io): Promise<CommandResult> {
  const { describeSearch, summary, totalsOf } = await import('../moe/report.js');
  const { describePlan } = await import('../moe/plan.js');
  const { plan, layers } = result;
  const lines = [
    io.paint.bold(result.out),
    ...describePlan(plan),
    ...(result.sharedSearch ? [describeSearch(result.sharedSearch)] : []),
    ...summary(result),
    ...(result.calibration === undefined ? [] : [`calibration: ${result.calibration}`]),
    `${duration(result.seconds)}${result.resumed ? ', resumed' : ''}`,
  ];
  const data = {
    out: result.out,
    method: plan.method,
    container: plan.container.name,
    shape: plan.shape,
    refit: result.refit,
    sharedSearch: result.sharedSearch ?? null,
    exactness: result.exactness ?? null,
    totals: layers.length > 0 ? totalsOf(layers) : null,
    layers,
    cost: plan.cost,
    bytes: { input: plan.inputBytes, output: plan.outputBytes },
    calibration: result.calibration ?? null,
    notices: result.notices,
    resumed: result.resumed,
    seconds: result.seconds,
  };
  return { data, text: `${lines.join('\n')}\n` };
}

async function showPlan(
  plan: MoePlan,
  job: MoeOptions,
  given: Given,
  distill: MixtureTraining | undefined,
): Promise<CommandResult> {
  const { describePlan } = await import('../moe/plan.js');
  const counts = new Map<string, number>();
  for (const { origin } of plan.tensors) counts.set(origin.kind, (counts.get(origin.kind) ?? 0) + 1);
  const kinds = { copy: 'copied as they are', values: 'read and written anew', made: 'made from feed-forward layers', constant: 'zeros that the container wants', tied: 'tied' }; // prettier-ignore
  const lines = [
    ...describePlan(plan),
    ...[...counts].map(([kind, n]) => `${n} tensors ${kinds[kind as keyof typeof kinds]}`),
    `disk needed while working ${formatBytes(plan.outputBytes)}`,
    ...(distill ? [`then distilled on ${count(distill.tokens)} tokens (${distill.part})`] : []),
    ...(given.then
      ? [`then quantized to INT${given.bits}, groups of ${given.groupSize}; the mixture in high precision is removed`]
      : []),
  ];
  const data = {
    dryRun: true,
    out: job.out,
    distillation: distill ? { ...distill } : null,
    then: given.then ?? null,
    shape: plan.shape,
    config: plan.config,
    cost: plan.cost,
    bytes: { input: plan.inputBytes, output: plan.outputBytes },
    tensors: plan.tensors.map(({ planned, origin }) => ({ ...planned, from: origin.kind })),
    notices: plan.notes,
  };
  return { data, text: `${lines.join('\n')}\n` };
}
