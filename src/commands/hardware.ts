import { readFile } from 'node:fs/promises';
import { z } from 'zod';
import { badInput, badUsage, didYouMean } from '../base/errors.js';
import { readConfigFile } from '../base/config.js';

const positive = z.number().positive();
const gpuSchema = z.strictObject({
  memoryGB: positive,
  bandwidthGBs: positive,
  bf16Tflops: positive,
  usdPerHour: positive.optional(),
  source: z.string(),
});
const fileSchema = z.strictObject({
  note: z.string().optional(),
  date: z.string().optional(),
  efficiency: z.strictObject({ bandwidth: positive.max(1), compute: positive.max(1), source: z.string() }).optional(),
  gpus: z.record(z.string(), gpuSchema).optional(),
});

export interface Gpu extends z.infer<typeof gpuSchema> {
  readonly name: string;
}
export interface Hardware {
  readonly gpus: ReadonlyMap<string, Gpu>;
  /** Shares of the data sheet's rates that are reached. */
  readonly efficiency: { readonly bandwidth: number; readonly compute: number; readonly source: string };
  /** When the figures were looked up. */
  readonly date: string;
}

/** data/hardware.json, with the entries of the user's file (YAML or JSON, the same form) in front. */
export async function readHardware(own: string | undefined): Promise<Hardware> {
  const shipped = fileSchema.required({ efficiency: true, gpus: true, date: true }).parse(
    JSON.parse(await readFile(new URL('../../data/hardware.json', import.meta.url), 'utf8')),
  ); // prettier-ignore
  const given = own === undefined ? {} : await readOwn(own);
  const entries = Object.entries({ ...shipped.gpus, ...given.gpus });
  return {
    gpus: new Map(entries.map(([name, gpu]) => [name, { ...gpu, name }])),
    efficiency: given.efficiency ?? shipped.efficiency,
    date: given.date ?? shipped.date,
  };
}

async function readOwn(path: string): Promise<z.infer<typeof fileSchema>> {
  // The YAML reader gives whole numbers as bigint.
  const text = JSON.stringify((await readConfigFile(path)).entries, (_, value: unknown) =>
    typeof value === 'bigint' ? Number(value) : value,
  );
  const parsed = fileSchema.safeParse(JSON.parse(text));
  if (parsed.success) return parsed.data;
  const [issue] = parsed.error.issues;
  throw badInput('The hardware file cannot be used', {
    where: `${path}${issue && issue.path.length > 0 ? `: ${issue.path.join('.')}` : ''}`,
    got: issue?.message ?? 'something else',
    expected: 'gpus: { name: { memoryGB, bandwidthGBs, bf16Tflops, source, usdPerHour? } }, as in data/hardware.json',
  });
}

/** Error: a name that no file has. */
export function findGpu({ gpus }: Hardware, name: string): Gpu {
  const found = gpus.get(name.toLowerCase());
  if (found) return found;
  const near = [...gpus.keys()].find((known) => known.startsWith(name.toLowerCase())) ?? didYouMean(name, gpus.keys());
  throw badUsage('This GPU is not in the hardware file', {
    got: name,
    expected: [...gpus.keys()].join(', '),
    hint: near !== undefined ? `Did you mean ${near}?` : 'Others: --hardware my.yaml (data/hardware.json shows its form).', // prettier-ignore
  });
}
