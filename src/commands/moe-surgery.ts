import { formatBytes } from '../base/files.js';
import { duration } from '../base/text.js';
import type { Values } from '../base/options.js';
import type { SurgeryOptions } from '../moe/surgery/options.js';
import type { SurgeryPlan } from '../moe/surgery/plan.js';
import type { SurgeryReport } from '../moe/surgery/report.js';
import { acceptance, type acceptanceOptions } from './acceptance.js';
import { recordConversion } from './history-file.js';
import { openEnvironment, type deviceOptions, type inputOptions, type outputOptions } from './shared.js';
import type { CommandResult, Io } from './types.js';

type Given = Values<typeof acceptanceOptions & typeof deviceOptions & typeof inputOptions & typeof outputOptions> & {
  readonly input: string;
  readonly seed: number;
};

/** `moe --prune-experts` and `--merge-experts`. */
export async function runSurgeryCommand(job: SurgeryOptions, given: Given, io: Io): Promise<CommandResult> {
  const { previewSurgery, runSurgery } = await import('../moe/surgery/run.js');
  if (given.dryRun) return await showPlan(await previewSurgery(job), job);
  using env = await openEnvironment(given, io);
  const { accept, extend } = acceptance(given, io, env);
  const result = await runSurgery({ ...job, ...(accept && { accept }) }, env);
  await recordConversion(given.out, io);
  return extend(await report(result, io));
}

async function report(result: SurgeryReport, io: Io): Promise<CommandResult> {
  const { surgerySummary, surgeryTotals } = await import('../moe/surgery/report.js');
  const { describeSurgery } = await import('../moe/surgery/plan.js');
  const { plan, layers, out, by, calibration, notices, resumed, seconds } = result;
  const lines = [
    io.paint.bold(out),
    ...describeSurgery(plan),
    ...surgerySummary(result),
    `calibration: ${calibration}`,
    `${duration(seconds)}${resumed ? ', resumed' : ''}`,
  ];
  const totals = surgeryTotals(layers);
  const data = { out, ...shapeOf(plan), by, totals, layers, ...costOf(plan), calibration, notices, resumed, seconds };
  return { data, text: `${lines.join('\n')}\n` };
}

async function showPlan(plan: SurgeryPlan, { out }: SurgeryOptions): Promise<CommandResult> {
  const { describeSurgery } = await import('../moe/surgery/plan.js');
  const tensors = plan.tensors.map(({ planned, origin }) => ({ ...planned, from: origin.kind }));
  const data = { dryRun: true, out, ...shapeOf(plan), config: plan.config, ...costOf(plan), tensors, notices: plan.notes }; // prettier-ignore
  const lines = [...describeSurgery(plan), `disk needed while working ${formatBytes(plan.outputBytes)}`];
  return { data, text: `${lines.join('\n')}\n` };
}

const shapeOf = ({ kind, experts, active, groups }: SurgeryPlan) => ({
  method: kind,
  experts: { before: experts[0], after: experts[1], active, groups },
});
const costOf = ({ cost, inputBytes, outputBytes }: SurgeryPlan) => ({
  cost,
  bytes: { input: inputBytes, output: outputBytes },
});
