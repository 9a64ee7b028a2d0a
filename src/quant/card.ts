import { basename, resolve } from 'node:path';
import type { CalibrationSet } from '../arch/calibration.js';
import type { Json } from '../base/job.js';
import type { QuantPlan } from './plan.js';
import type { BlockReport } from './report.js';
import { describeScheme } from './scheme.js';
import type { QuantizeOptions } from './options.js';

/** README.md of the output: what it is, how it was made, what was left out. Measured errors stand in the provenance. */
export function modelCard(
  { input, tool, recipe }: QuantizeOptions,
  format: string,
  plan: QuantPlan,
  set: CalibrationSet | undefined,
): string {
  const name = basename(resolve(input));
  const calibrated =
    set === undefined
      ? 'No calibration text was used.'
      : `Calibration: ${set.description} (SHA-256 of the tokens ${set.hash}).`;
  if (format === 'imatrix') {
    const what = `Energies of the inputs of \`${name}\`'s linears by ${tool.name} ${tool.version}, for llama.cpp's quantizer and \`${tool.name} convert --imatrix\`.`;
    return [`# ${name}, importance matrix`, '', what, '', calibrated, ''].join('\n');
  }
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
    `${recipe.rotation ? 'Rotated (Hadamard matrices folded into the weights: engines load it as any other model) and quantized' : 'Quantized'} from \`${name}\` by ${tool.name} ${tool.version} with method ${recipe.method}, stored as ${format}.`,
    ...list('Weights', schemes),
    ...list('Linears left in high precision', left),
    ...list('Notes', plan.notes.map((note) => `- ${note}`)), // prettier-ignore
    '',
    calibrated,
    '',
    'Inputs, recipe and the measured error of each linear stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}

/** What was measured of the finished output: errors of its linears, and its validation against the input. */
export function measuredSection(blocks: readonly BlockReport[], validation: Json | undefined): string {
  const linears = blocks.flatMap((block) => block.linears);
  const mean = (key: 'error' | 'plainError') => linears.reduce((sum, linear) => sum + linear[key], 0) / linears.length;
  const lines = ['', '## Measured', ''];
  if (linears.length > 0) {
    lines.push(`- Mean relative output error of ${linears.length} linears on the calibration text: ${mean('error').toExponential(2)} (plain rounding: ${mean('plainError').toExponential(2)})`); // prettier-ignore
  }
  const measured = validation as Measured | undefined;
  const show = (value: number | undefined): string => (value === undefined ? 'not measured' : value.toPrecision(4));
  if (measured?.kl !== undefined) {
    const { tokens, kl, top1, perplexity, passed, measuredOn, sameWeights } = measured;
    lines.push(
      `- On ${tokens} tokens of held-out text, against the input: KL divergence ${show(kl.mean)} nats, same top token ${show(top1)}, perplexity ${show(perplexity?.candidate)} (input ${show(perplexity?.reference)})`,
      `- Quality gates: ${passed === true ? 'passed' : 'not passed'}`,
    );
    if (measuredOn !== undefined) {
      const how = sameWeights ? 'holds the same weights' : 'was rounded in another way from the same calibration';
      lines.push(`- Measured on the ${measuredOn} output beside this one, which ${how}`);
    }
  } else lines.push('- Not validated on held-out text.');
  return `${lines.join('\n')}\n`;
}

/** What of a validation's verdict the card shows. */
interface Measured {
  readonly passed?: boolean;
  /** The output that was validated, where it is not this one. */
  readonly measuredOn?: string;
  readonly sameWeights?: boolean;
  readonly tokens?: number;
  readonly kl?: { readonly mean?: number };
  readonly top1?: number;
  readonly perplexity?: { readonly reference?: number; readonly candidate?: number };
}
