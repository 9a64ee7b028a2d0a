import { basename } from 'node:path';
import type { CalibrationSet } from '../../arch/calibration.js';
import type { SurgeryOptions } from './options.js';
import type { SurgeryPlan } from './plan.js';

/** README.md of the output: what it is and how it was made. Measured errors stand in the provenance. */
export function surgeryCard(
  { input, tool }: Pick<SurgeryOptions, 'input' | 'tool'>,
  by: string,
  { kind, experts: [before, after], active, notes }: SurgeryPlan,
  set: CalibrationSet,
): string {
  const name = basename(input.replace(/\/+$/, ''));
  const how =
    kind === 'prune'
      ? `The experts that are there are unchanged; they were chosen by the measure ${by}.`
      : 'Experts with like outputs were merged: the mean of their weights by use, their neurons aligned.';
  return [
    `# ${name} with ${after} of ${before} experts`,
    '',
    `Made from \`${name}\` by ${tool.name} ${tool.version}: ${after} routed experts a layer, ${active} active. ${how}`,
    ...(notes.length > 0 ? ['', 'Notes:', '', ...notes.map((note) => `- ${note}`)] : []),
    '',
    `Calibration: ${set.description} (SHA-256 of the tokens ${set.hash}).`,
    '',
    'Inputs, recipe and the measured error of each layer stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}
