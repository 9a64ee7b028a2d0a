import { readFile } from 'node:fs/promises';
import { join, resolve } from 'node:path';
import { z } from 'zod';
import { badInput, badUsage } from '../../base/errors.js';
import { exists, ioError, makeFolder, refuseLinks, writeFileAtomic } from '../../base/files.js';
import type { Json } from '../../base/job.js';
import { hashOfTokens, type CalibrationSet } from '../../arch/calibration.js';
import type { SchemeChange } from '../scheme.js';
import { readSealed, writeSealed } from './sealed.js';

const sha256 = z.string().regex(/^[0-9a-f]{64}$/);
const size = z.int().positive();

const planSchema = z.strictObject({
  shards: size.max(100_000),
  /** Options of `quantize` by key, which whoever reads them checks as if they were typed. */
  options: z.record(z.string(), z.json()),
  device: z.enum(['cpu', 'cuda']),
  calibration: z
    .strictObject({ n: size, seqLen: size, hash: sha256, description: z.string(), notices: z.array(z.string()) })
    .nullable(),
  /** Bits by measured sensitivity, of linears by name. */
  chosen: z.record(z.string(), z.strictObject({ bits: z.literal([2, 3, 4, 8]) })).nullable(),
  /** SHA-256 of the states in front of each shard but the first. */
  states: z.array(sha256),
});

/** What `plan` leaves for workers and `merge`. */
export interface ShardPlan extends Omit<z.infer<typeof planSchema>, 'calibration' | 'chosen'> {
  /** Tells this plan from all others. */
  readonly id: string;
  /** `<out>.part` */
  readonly folder: string;
  /** The output, which the folder's name says: nothing in the plan can move it. */
  readonly out: string;
  readonly path: string;
  readonly set: CalibrationSet | undefined;
  readonly chosen: ReadonlyMap<string, SchemeChange> | undefined;
}

export interface PlanContent extends Pick<ShardPlan, 'shards' | 'device' | 'set' | 'chosen' | 'states'> {
  readonly options: Readonly<Record<string, Json>>;
}

const planPath = (folder: string): string => join(folder, 'shards', 'plan.json');
const tokensPath = (folder: string): string => join(folder, 'shards', 'tokens.bin');
/** What a finished shard has made; `<this>.part` while it is made. */
export const shardFolder = (folder: string, shard: number): string => join(folder, 'shards', String(shard));

export async function writePlan(folder: string, { set, chosen, ...plan }: PlanContent): Promise<void> {
  await makeFolder(join(folder, 'shards')).catch((error: unknown) => {
    throw ioError(error, 'make the folder', join(folder, 'shards'));
  });
  if (set) await writeFileAtomic(tokensPath(folder), bytesOf(set.tokens));
  const calibration = set && { n: set.n, seqLen: set.seqLen, hash: set.hash, description: set.description, notices: set.notices }; // prettier-ignore
  const bits: Json = chosen
    ? Object.fromEntries([...chosen].map(([name, change]) => [name, { bits: change.bits! }]))
    : null;
  const content = { ...plan, calibration: calibration ?? null, chosen: bits };
  await writeSealed(planPath(folder), content);
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Int32Array) => new Uint8Array(buffer, byteOffset, byteLength);

/** Errors: input, for a folder that `plan` did not make, links in it, and files that were changed. */
export async function readPlan(work: string): Promise<ShardPlan> {
  const plan = await findPlan(work);
  if (plan) return plan;
  throw badInput('There is no plan in this folder', { where: planPath(resolve(work)), hint: 'Make one: deepseek-convert plan <model> -o <out> --shards n. Its folder is <out>.part.' }); // prettier-ignore
}

/** The same; undefined where `plan` has not been, or has not come to its end. */
export async function findPlan(work: string): Promise<ShardPlan | undefined> {
  const folder = resolve(work);
  if (!folder.endsWith('.part')) {
    throw badUsage('This is no work folder', { got: work, expected: 'the folder <out>.part that plan has made' });
  }
  if (!(await exists(folder))) return undefined;
  await refuseLinks(folder);
  const path = planPath(folder);
  const again = `Make the plan anew: deepseek-convert plan ... --restart.`;
  const sealed = await readSealed(path, planSchema, again);
  if (!sealed) return undefined;
  const { calibration, chosen, ...content } = sealed.content;
  if (content.states.length !== (calibration ? content.shards - 1 : 0)) {
    throw badInput('The plan does not fit together', { where: `${path}: states`, hint: again });
  }
  return {
    ...content,
    ...{ id: sealed.sha256, folder, out: folder.slice(0, -'.part'.length), path },
    set: calibration ? { ...calibration, tokens: await readTokens(folder, calibration, again) } : undefined,
    chosen: chosen ? new Map(Object.entries(chosen)) : undefined,
  };
}

async function readTokens(
  folder: string,
  { n, seqLen, hash }: Pick<CalibrationSet, 'n' | 'seqLen' | 'hash'>,
  hint: string,
): Promise<Int32Array> {
  const path = tokensPath(folder);
  const bytes = await readFile(path).catch((error: unknown) => {
    throw ioError(error, 'read the calibration tokens', path);
  });
  const tokens = new Int32Array(Math.floor(bytes.length / 4));
  bytesOf(tokens).set(bytes.subarray(0, tokens.byteLength));
  if (bytes.length !== 4 * n * seqLen || hashOfTokens(tokens, n, seqLen) !== hash) {
    throw badInput('The calibration tokens are not those of the plan', { where: path, hint });
  }
  return tokens;
}

const linearSchema = z.strictObject({
  name: z.string(),
  scheme: z.string(),
  bitsPerWeight: z.number(),
  error: z.number(),
  plainError: z.number(),
  method: z.enum(['gptq', 'rtn']),
  damp: z.number(),
  tokens: z.number(),
  fallbackRows: z.number(),
  deadChannels: z.number(),
  seconds: z.number(),
  probe: z.string(),
  probes: z.record(z.string(), z.string()).optional(),
  note: z.string().optional(),
});
const reportSchema = z.strictObject({
  block: z.int(),
  linears: z.array(linearSchema),
  coverage: z
    .strictObject({
      layer: z.int(),
      experts: z.int(),
      tokens: z.array(z.number()),
      starved: z.int(),
      uncovered: z.int(),
      calibratedOnAll: z.boolean().optional(),
    })
    .optional(),
  stages: z.record(z.string(), z.number()),
});
const shardSchema = z.strictObject({
  /** Id of the plan that it belongs to. */
  plan: sha256,
  shard: z.int(),
  blocks: z.array(z.strictObject({ seconds: z.number(), report: reportSchema, files: z.record(z.string(), sha256) })),
});

/** What a worker says of its finished shard: for each block its report, and SHA-256 of its files by output. */
export type ShardRecord = z.infer<typeof shardSchema>;

const recordPath = (folder: string): string => join(folder, 'shard.json');
export const writeRecord = (folder: string, record: { readonly [key in keyof ShardRecord]: Json }): Promise<string> =>
  writeSealed(recordPath(folder), record);

/** undefined: the shard is not done. Errors: input, for a shard of another plan, and one that was changed. */
export async function readRecord(
  plan: ShardPlan,
  shard: number,
  blocks: readonly number[],
): Promise<ShardRecord | undefined> {
  const folder = shardFolder(plan.folder, shard);
  const hint = `Remove ${folder} and run its worker again.`;
  const record = (await readSealed(recordPath(folder), shardSchema, hint))?.content;
  if (!record) return undefined;
  const own = record.plan === plan.id && record.shard === shard;
  const fits =
    record.blocks.length === blocks.length && record.blocks.every(({ report }, i) => report.block === blocks[i]);
  if (own && fits) return record;
  throw badInput('The shard belongs to another plan', { where: recordPath(folder), hint });
}
