import { readdir } from 'node:fs/promises';
import { basename, dirname, extname, join, resolve } from 'node:path';
import { badInput } from '../base/errors.js';
import { exists } from '../base/files.js';
import { isJsonObject, parseJson } from '../formats/json.js';
import type { JsonObject } from '../formats/json.js';
import { OpenFile } from '../formats/source.js';

/** Files that belong to a model beside weights and config; code that `auto_map` names included. */
const companionNames = [
  'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json', 'vocab.json', 'vocab.txt',
  'merges.txt', 'tokenizer.model', 'spiece.model', 'sentencepiece.bpe.model', 'chat_template.jinja',
  'chat_template.json', 'generation_config.json', 'preprocessor_config.json', 'processor_config.json',
  'LICENSE', 'LICENSE.txt', 'LICENSE.md', 'NOTICE', 'NOTICE.txt',
]; // prettier-ignore
const companionPattern = /^(?:[\w.-]+\.tiktoken|(?:configuration|modeling|tokenization)_\w+\.py)$/;

/** `/a/v1.bin` -> `v1`: what stands before the ending. */
export const stemOf = (file: string): string => basename(file, extname(file));

/** The name that a companion has in a model folder: `v1.tokenizer.json` beside `v1.bin` is its tokenizer.json. */
export function companionName(path: string): string {
  const name = basename(path);
  return companionNames.find((known) => name === known || name.endsWith(`.${known}`)) ?? name;
}

/** Tokenizer, generation and licence files of a folder; for a lone file those beside it, its own (`<stem>.`) first. */
export async function findCompanions(folder: string, file: string | undefined): Promise<string[]> {
  const names = new Set(await readdir(folder));
  const own = file === undefined ? undefined : `${stemOf(file)}.`;
  const found: string[] = [];
  for (const known of companionNames) {
    const name = [own === undefined ? '' : own + known, known].find((candidate) => names.has(candidate));
    if (name !== undefined) found.push(join(folder, name));
  }
  for (const name of [...names].sort()) if (companionPattern.test(name)) found.push(join(folder, name));
  return found;
}

export interface FoundConfig {
  readonly config: JsonObject;
  readonly path: string;
  readonly bytes: Buffer;
}

/**
 * The config of a checkpoint: the one given explicitly, else `<stem>.config.json` and then `config.json` beside a lone
 * file, else `config.json` of the folder. Undefined when there is none; `tried` lists the places. `ownOnly` leaves out
 * `config.json`: GGUF files have their config inside, and what lies beside may be another model's.
 */
export async function findConfig(
  folder: string,
  file: string | undefined,
  given: string | undefined,
  ownOnly = false,
): Promise<{ found: FoundConfig | undefined; tried: string[] }> {
  if (given !== undefined) return { found: readConfig(given), tried: [given] };
  const tried = [...(file === undefined ? [] : [`${stemOf(file)}.config.json`]), ...(ownOnly ? [] : ['config.json'])];
  for (const name of tried) {
    const path = join(folder, name);
    if (await exists(path)) return { found: readConfig(path), tried };
  }
  return { found: undefined, tried: tried.map((name) => join(folder, name)) };
}

export function missingConfig(path: string, tried: readonly string[]): Error {
  return badInput('The checkpoint has no config: its architecture is unknown', {
    where: path,
    expected: tried.map((place) => resolve(place)).join(' or '),
    hint: `Put the model's config.json beside it as ${join(dirname(path), tried.map((t) => basename(t))[0]!)}, or name it with --config PATH.`,
  });
}

/** A JSON object of a file, read as strictly as a config. */
export function readConfig(path: string): FoundConfig {
  using file = new OpenFile(path);
  if (file.size > 16 * 2 ** 20) throw badInput('The config is too large', { where: path, got: `${file.size} bytes` });
  return parseConfig(Buffer.from(file.read(0, file.size, 'config')), path);
}

/** A config's bytes; `path` is what errors name. */
export function parseConfig(bytes: Buffer, path: string): FoundConfig {
  const config = parseJson(bytes, { where: path, lenient: true, maxValues: 1_000_000 });
  if (!isJsonObject(config)) throw badInput('The config is no JSON object', { where: path });
  return { config, path, bytes };
}
