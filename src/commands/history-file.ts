import { createHash } from 'node:crypto';
import { appendFile, readFile, stat } from 'node:fs/promises';
import { basename, dirname, join, parse, resolve } from 'node:path';
import { badInput } from '../base/errors.js';
import { appendNoLink, errorCode, ioError, readJsonFile } from '../base/files.js';
import type { Json } from '../base/job.js';
import type { Io } from './types.js';

/** In the folder that holds the outputs; one conversion a line, oldest first. */
export const historyName = 'deepseek-convert-history.jsonl';
const schema = 'deepseek-convert/history';

export interface HistoryRecord {
  readonly schema: typeof schema;
  readonly version: 1;
  /** First twelve digits of the SHA-256 over the output's files: the same weights, the same id. */
  readonly id: string;
  /** The id of the conversion whose output was this one's input, where it stands in the same file. */
  readonly parent: string | null;
  readonly time: string;
  readonly command: string;
  readonly commandLine: string;
  /** Name of the output in the folder. */
  readonly out: string;
  readonly bytes: number;
  readonly tool: Json;
  readonly recipe: Json;
  readonly inputs: readonly { readonly name: string; readonly sha256: string }[];
  readonly outputs: readonly { readonly name: string; readonly bytes: number; readonly sha256: string }[];
  /** What the validation before the name found; null where there was none. */
  readonly validation: Validation | null;
}

interface Validation {
  readonly passed?: boolean;
  readonly skipped?: string;
  readonly kl?: { readonly mean: number };
  readonly top1?: number;
  readonly perplexity?: { readonly ratio: number };
}

type Provenance = Pick<HistoryRecord, 'tool' | 'recipe' | 'inputs' | 'outputs'> & { readonly validation?: Validation };

const isWeights = (name: string): boolean => /\.(safetensors|bin|pt|pth|gguf|onnx|data)$/.test(name);

/** Several outputs of one job: the folder of each. */
interface Several {
  readonly outputs: readonly { readonly folder: string }[];
}

/**
 * Adds a finished conversion to the history beside its output, from what the provenance file says; of several outputs
 * each. A history that cannot be written is a warning: the output is complete.
 */
export async function recordConversion(out: string, io: Io): Promise<void> {
  const path = resolve(out);
  const folder = dirname(path);
  try {
    const isFolder = (await stat(path)).isDirectory();
    const file = isFolder ? join(path, 'deepseek-convert.json') : join(folder, `${parse(path).name}.deepseek-convert.json`); // prettier-ignore
    const provenance = (await readJsonFile(file)) as Provenance | Several | undefined;
    if (provenance === undefined) return;
    if (!isSeveral(provenance)) return await record(folder, basename(path), provenance, io);
    for (const { folder: part } of provenance.outputs) {
      const own = (await readJsonFile(join(path, part, 'deepseek-convert.json'))) as Provenance;
      await record(folder, `${basename(path)}/${part}`, own, io);
    }
  } catch (error) {
    io.log.warn(`The conversion is not in the history of ${folder}: ${(error as Error).message}`);
  }
}

const isSeveral = (provenance: Provenance | Several): provenance is Several => !('inputs' in provenance);

async function record(folder: string, out: string, provenance: Provenance, io: Io): Promise<void> {
  const { tool, recipe, inputs, outputs, validation } = provenance;
  const hash = createHash('sha256');
  for (const { sha256 } of outputs.filter(({ name }) => isWeights(name))) hash.update(sha256);
  const id = hash.digest('hex').slice(0, 12);
  const needed = new Set(inputs.map(({ sha256 }) => sha256));
  const earlier = (await readHistory(folder)).filter((one) => one.id !== id);
  const parent = earlier.findLast((one) => one.outputs.some(({ sha256 }) => needed.has(sha256)));
  const line: HistoryRecord = {
    schema,
    version: 1,
    id,
    parent: parent?.id ?? null,
    time: new Date().toISOString(),
    command: io.settings.command,
    commandLine: io.commandLine,
    out,
    bytes: outputs.reduce((sum, { bytes }) => sum + bytes, 0),
    tool,
    recipe,
    inputs,
    outputs,
    validation: validation ?? null,
  };
  // One write of one line: two conversions that end at once do not mix.
  await appendFile(join(folder, historyName), `${JSON.stringify(line)}\n`, { flag: appendNoLink });
}

/** All conversions of a folder, oldest first; none where there is no history. Error: a line that is no record. */
export async function readHistory(folder: string): Promise<HistoryRecord[]> {
  const path = join(folder, historyName);
  let content: string;
  try {
    content = await readFile(path, 'utf8');
  } catch (error) {
    if (errorCode(error) === 'ENOENT') return [];
    throw ioError(error, 'read the history', path);
  }
  return content.split('\n').flatMap((line, i) => {
    if (line.trim() === '') return [];
    const fail = (got: string) =>
      badInput('A line of the history is no record of a conversion', {
        where: `${path}, line ${i + 1}`,
        got,
        hint: 'Remove the line; the outputs are not touched by it.',
      });
    let record: HistoryRecord;
    try {
      record = JSON.parse(line) as HistoryRecord;
    } catch (error) {
      throw fail((error as Error).message);
    }
    if (record.schema !== schema || record.version !== 1)
      throw fail(`schema ${record.schema}, version ${record.version}`);
    return [record];
  });
}
