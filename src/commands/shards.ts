import { fromConfigFile } from '../base/config.js';
import { flagName, mergeTables, resolveOptions, text, type Given, type OptionTable } from '../base/options.js';
import type { Json } from '../base/job.js';
import type { QuantizeOptions } from '../quant/options.js';
import type { ShardPlan } from '../quant/shards/files.js';
import { acceptanceOptions } from './acceptance.js';
import { quantizeJob, quantizeOptions, type QuantizeValues } from './quantize.js';
import { deviceOptions, input, outputOptions, type DeviceValues } from './shared.js';
import type { Io } from './types.js';

/** The folder that `plan` has made. */
export const workFolder = text({
  required: true,
  value: 'out.part',
  help: 'The folder that plan has made: <out>.part.',
});

/** Options of `quantize` that are fixed when a plan is made; the others belong to a run of a worker or of merge. */
const ofTheRun: OptionTable = { ...outputOptions, ...acceptanceOptions, ...deviceOptions };
const fixed: OptionTable = Object.fromEntries(Object.entries(quantizeOptions).filter(([key]) => !(key in ofTheRun)));

/** What a plan keeps of the options that it was given. Paths must be absolute: workers may run elsewhere. */
export const fixedOptions = (values: Readonly<Record<string, unknown>>): Record<string, Json> =>
  Object.fromEntries(
    ['input', ...Object.keys(fixed)].flatMap((key) =>
      values[key] === undefined ? [] : [[flagName(key), values[key] as Json]],
    ),
  );

/** The options of a plan, read again through the table that checks what is typed. */
export async function plannedJob(
  folder: string,
  io: Io,
): Promise<{ plan: ShardPlan; values: QuantizeValues; job: QuantizeOptions }> {
  const { readPlan } = await import('../quant/shards/files.js');
  const plan = await readPlan(folder);
  const given = fromConfigFile(
    { path: plan.path, entries: plan.options },
    'quantize',
    [],
    mergeTables({ input }, fixed),
  );
  const out: Given = { from: 'command line', name: '<out.part>', raw: plan.out };
  const { values } = resolveOptions(mergeTables({ input }, quantizeOptions), [new Map([['out', out]]), given]);
  const checked = values as unknown as QuantizeValues;
  return { plan, values: checked, job: await quantizeJob(checked, io) };
}

/** `auto` is what the plan was made on: another kind of device rounds differently. */
export const deviceOf = <T extends DeviceValues>(given: T, { device }: ShardPlan): T =>
  given.device === 'auto' ? { ...given, device } : given;

/** Options that `plan` was given and `merge` decides by, as arguments for it. */
export function mergeFlags(
  values: Readonly<Record<string, unknown>>,
  from: Readonly<Record<string, string>>,
): string[] {
  return ['overwrite', ...Object.keys(acceptanceOptions)].flatMap((key) => {
    const value = values[key];
    const name = flagName(key);
    if (from[key] === undefined || value === undefined) return [];
    if (typeof value === 'boolean') return [value ? `--${name}` : `--no-${name}`];
    return (Array.isArray(value) ? value : [value]).map((one) => `--${name}=${String(one)}`);
  });
}
