import { basename } from 'node:path';
import type { CalibrationSet } from '../arch/calibration.js';
import { describeShape, type MoePlan } from './plan.js';

/** README.md of the output: what it is and how it was made. Measured errors stand in the provenance. */
export function modelCard(
  { input, tool }: { readonly input: string; readonly tool: { readonly name: string; readonly version: string } },
  plan: MoePlan,
  set: CalibrationSet | undefined,
): string {
  const name = basename(input.replace(/\/+$/, ''));
  const { method, container, shape, notes } = plan;
  const how =
    method === 'split'
      ? 'Its experts are parts of the dense feed-forward layers: with all experts on it computes what the dense model does.'
      : `Its experts are copies of the dense feed-forward layers${method === 'drop' ? ', in which some neurons were drawn anew' : ''}, a start for continued training.`;
  const list = notes.length > 0 ? ['', 'Notes:', '', ...notes.map((note) => `- ${note}`)] : [];
  return [
    `# ${name} as a mixture of experts`,
    '',
    `Made from \`${name}\` by ${tool.name} ${tool.version}: ${describeShape(shape)}, as ${container.name}. ${how}`,
    ...list,
    '',
    set === undefined
      ? 'No calibration text was used.'
      : `Calibration: ${set.description} (SHA-256 of the tokens ${set.hash}).`,
    '',
    'Inputs, recipe and the measured error of each layer stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}
