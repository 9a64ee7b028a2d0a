import { basename } from 'node:path';
import type { CalibrationSet } from '../arch/calibration.js';
import type { QuantPlan } from './plan.js';
import { describeScheme } from './scheme.js';
import type { QuantizeOptions } from './options.js';

/** README.md of the output: what it is, how it was made, what was left out. Measured errors stand in the provenance. */
export function modelCard(
  { input, tool, recipe }: QuantizeOptions,
  format: string,
  { plan }: { readonly plan: QuantPlan },
  set: CalibrationSet | undefined,
): string {
  const name = basename(input.replace(/\/+$/, ''));
  const schemes = plan.use.groups.map(
    ({ scheme, linears }) => `- ${describeScheme(scheme)}: ${linears.length} linears`,
  );
  const reasons = new Map<string, number>();
  for (const { reason } of plan.linears.values()) {
    if (reason !== undefined) reasons.set(reason, (reasons.get(reason) ?? 0) + 1);
  }
  const left = [...reasons].map(([reason, count]) => `- ${count}: ${reason}`);
  const list = (title: string, lines: readonly string[]) => (lines.length > 0 ? ['', `${title}:`, '', ...lines] : []);
  return [
    `# ${name}, ${recipe.bits}-bit`,
    '',
    `Quantized from \`${name}\` by ${tool.name} ${tool.version} with method ${recipe.method}, stored as ${format}.`,
    ...list('Weights', schemes),
    ...list('Linears left in high precision', left),
    ...list('Notes', plan.notes.map((note) => `- ${note}`)), // prettier-ignore
    '',
    set === undefined
      ? 'No calibration text was used.'
      : `Calibration: ${set.description} (SHA-256 of the tokens ${set.hash}).`,
    '',
    'Inputs, recipe and the measured error of each linear stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}
