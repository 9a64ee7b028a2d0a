import { readFile } from 'node:fs/promises';
import { badInput, badUsage, didYouMean } from './errors.js';
import { ioError } from './files.js';
import { flagName, type Given, type OptionTable } from './options.js';

/** `--config-file job.yaml`: option names and values at the top, or below a command's name; `command:` may choose it. */
export interface ConfigFile {
  readonly path: string;
  readonly entries: Readonly<Record<string, unknown>>;
}

/** Reads a YAML (or JSON) mapping. Errors: input, with line and column of what is no YAML. */
export async function readConfigFile(path: string): Promise<ConfigFile> {
  let content: string;
  try {
    content = await readFile(path, 'utf8');
  } catch (error) {
    throw ioError(error, 'read the config file', path);
  }
  const { parseDocument } = await import('yaml');
  const document = parseDocument(content, { intAsBigInt: true, stringKeys: true });
  const [problem] = document.errors;
  if (problem)
    throw badInput('The config file is not valid YAML', { where: path, got: problem.message.split('\n')[0]! });
  const entries = (document.toJS({ maxAliasCount: 100 }) ?? {}) as unknown;
  if (!isMapping(entries)) {
    throw badInput('The config file must be a mapping of option names to values', {
      where: path,
      hint: 'For example:  group-size: 64',
    });
  }
  return { path, entries };
}

/**
 * What the file gives for the options of `command`. Keys may be written as flags (`group-size`), in snake or in camel
 * case. Sections of other commands are left alone; a key that no option has is an error. Options of a group may stand
 * in a mapping under its name (`gates: { max-kl: 0.1 }`).
 */
export function fromConfigFile(
  { path, entries }: ConfigFile,
  command: string,
  commandNames: readonly string[],
  table: OptionTable,
): Map<string, Given> {
  const keys = new Map<string, string>();
  for (const [key, { aliases }] of Object.entries(table)) {
    for (const name of [flagName(key), ...aliases]) keys.set(name, key);
  }
  const given = new Map<string, Given>();
  const groups = new Set(Object.values(table).flatMap(({ group }) => group ?? []));
  const take = (values: Readonly<Record<string, unknown>>, prefix: string, group?: string) => {
    for (const [written, value] of Object.entries(values)) {
      const where = `${prefix}${written} in ${path}`;
      if (group === undefined && groups.has(written) && isMapping(value)) {
        take(value, `${prefix}${written}.`, written);
        continue;
      }
      const found = keys.get(flagName(written).replaceAll('_', '-'));
      const key = found !== undefined && group !== undefined && table[found]!.group !== group ? undefined : found;
      if (key === undefined) {
        const known = [...keys].filter(([, k]) => group === undefined || table[k]!.group === group);
        throw unknownKey(written, where, command, [...known.map(([name]) => name), ...(group ? [] : groups)]);
      }
      if (value === null) continue;
      given.set(key, { from: 'config file', name: where, raw: scalar(value, where) });
    }
  };
  const isSection = (key: string, value: unknown) => commandNames.includes(key) && isMapping(value);
  take(Object.fromEntries(Object.entries(entries).filter(([k, v]) => k !== 'command' && !isSection(k, v))), '');
  const own = entries[command];
  if (isMapping(own)) take(own, `${command}.`);
  return given;
}

const isMapping = (value: unknown): value is Record<string, unknown> =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

function scalar(value: unknown, where: string): Given['raw'] {
  if (typeof value === 'string' || typeof value === 'boolean') return value;
  if (typeof value === 'number' || typeof value === 'bigint') return String(value);
  if (Array.isArray(value)) {
    return value.map((item: unknown) => {
      const one = Array.isArray(item) ? undefined : scalar(item, where);
      if (one === undefined) throw badUsage(`Nested lists are not understood for ${where}`);
      return String(one);
    });
  }
  throw badUsage(`Invalid value for ${where}`, {
    expected: 'a text, a number, true, false or a list of these',
    got: JSON.stringify(value, (_, v: unknown) => (typeof v === 'bigint' ? Number(v) : v)),
  });
}

function unknownKey(written: string, where: string, command: string, known: Iterable<string>) {
  const near = didYouMean(written, [...known, 'command']);
  return badUsage(`${command} has no option "${written}" (${where})`, {
    hint: near === undefined ? `deepseek-convert ${command} --help lists them.` : `Did you mean ${near}?`,
  });
}
