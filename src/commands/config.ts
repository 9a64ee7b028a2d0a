import { fromConfigFile, type ConfigFile } from '../base/config.js';
import { badUsage, bug } from '../base/errors.js';
import { choice, flagName, fromEnvironment, mergeTables, readGiven, type Given, type OptionTable } from '../base/options.js'; // prettier-ignore
import { columns } from '../base/text.js';
import { parseArguments, type ParserSettings } from './parse.js';
import { commonOptions } from './shared.js';
import { defineCommand, type Command, type CommandResult } from './types.js';

type Registry = Readonly<Record<string, { readonly load: () => Promise<{ command: Command }> }>>;

/** For help and completion: what it does needs the sources themselves, so that the router takes it away before. */
export const config = (names: readonly string[]): Command =>
  defineCommand({
    name: 'config',
    description:
      'Shows each setting that a command would run with, and where it comes from: the command line, the environment,\n' +
      '--config-file or the default. Nothing is run. Write the command line as it is, behind "config show".',
    arguments: {
      action: choice(['show'], { required: true, value: 'show', help: 'The only action there is.' }),
      command: choice(names, { value: 'command', help: 'The command, with its arguments and options.' }),
    },
    options: {},
    examples: [
      ['config show quantize --bits 4', 'What quantize would use.'],
      ['config show quantize fixtures/moe-6m -o out/int4 --json', 'The same for programs.'],
    ],
    run: () => Promise.reject(badUsage('config show needs a command', { hint: `One of ${names.join(', ')}.` })),
  });

export interface Asked {
  readonly name: string;
  readonly argv: readonly string[];
  readonly config: ConfigFile | undefined;
}

interface Setting {
  readonly name: string;
  readonly value: unknown;
  readonly from: Given['from'] | 'default' | 'not given';
  /** The flag, the variable, the key of the file. */
  readonly by: string | null;
}

/** Settings of a command line that is not run; undefined where it asked for help. */
export async function showConfig(
  { name, argv, config: file }: Asked,
  commands: Registry,
  environment: NodeJS.ProcessEnv,
  settings: ParserSettings,
): Promise<CommandResult | undefined> {
  const { command } = await (commands[name] ?? missing(name)).load();
  const table = mergeTables(command.arguments, command.options, commonOptions);
  const typed = parseArguments(command, argv, settings);
  if (!typed) return undefined;
  const sources = [typed, fromEnvironment(table, environment)];
  if (file) sources.push(fromConfigFile(file, name, Object.keys(commands), table));
  const shown = settingsFrom(table, sources);
  const rows = shown.map(({ name, value, from, by }) => [name, text(value), by === null || by === from ? from : `${from}: ${by}`]); // prettier-ignore
  return { data: { for: name, settings: shown }, text: columns([['setting', 'value', 'from'], ...rows], 'lll') };
}

function missing(name: string): never {
  throw bug(`no command ${name}`);
}

function settingsFrom(table: OptionTable, sources: readonly ReadonlyMap<string, Given>[]): Setting[] {
  return Object.entries(table).map(([key, spec]): Setting => {
    const name = flagName(key);
    const given = sources.map((source) => source.get(key)).find((g) => g !== undefined);
    if (given) return { name, value: readGiven(spec, given), from: given.from, by: given.name };
    if (spec.required) return { name, value: null, from: 'not given', by: null };
    const { default: value = null, defaultNote } = spec;
    return { name, value, from: 'default', by: value === null ? (defaultNote ?? null) : null };
  });
}

function text(value: unknown): string {
  if (value === null || value === undefined) return '';
  if (Array.isArray(value)) return value.join(', ');
  return typeof value === 'string' ? value : JSON.stringify(value);
}
