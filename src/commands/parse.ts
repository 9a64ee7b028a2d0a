import { Command as Parser, CommanderError, Option as ParserOption } from 'commander';
import type { ConvertError } from '../base/errors.js';
import { badUsage } from '../base/errors.js';
import { flagName, type Given, type Option, type OptionTable } from '../base/options.js';
import { wrap } from '../base/text.js';
import type { Command } from './types.js';

const footer = `
Options can also stand in the environment (--dry-run: DEEPSEEK_CONVERT_DRY_RUN)
and in --config-file (dry-run: true); the command line wins, then the
environment. What would be used, and from where: deepseek-convert config show.`;

export interface ParserSettings {
  readonly summary: string;
  readonly common: OptionTable;
  readonly width: number;
  readonly writeOut: (text: string) => void;
}

/**
 * What the command line gives for a command's arguments and options, by key; undefined when it asked for help, which
 * has been printed. Errors: usage, for what the command does not have.
 */
export function parseArguments(
  command: Command,
  argv: readonly string[],
  settings: ParserSettings,
): Map<string, Given> | undefined {
  const given = new Map<string, Given>();
  const parser = buildParser(command, settings, (key, value) => given.set(key, value));
  try {
    parser.parse(argv, { from: 'user' });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.exitCode === 0) return undefined;
    throw usageError(error, command.name);
  }
  for (const [i, key] of Object.keys(command.arguments).entries()) {
    const isList = command.arguments[key]!.kind === 'list';
    const raw = isList ? parser.args.slice(i) : parser.args[i];
    if (raw === undefined || raw.length === 0) continue;
    const earlier = given.get(key);
    if (earlier)
      throw badUsage(`<${command.arguments[key]!.value}> was given twice`, {
        got: `${earlier.name} and ${String(raw)}`,
      });
    given.set(key, { from: 'command line', name: `<${command.arguments[key]!.value}>`, raw });
  }
  return given;
}

function buildParser(command: Command, settings: ParserSettings, take: (key: string, given: Given) => void): Parser {
  const parser = new Parser(`deepseek-convert ${command.name}`)
    .description([sentence(settings.summary), command.description ?? ''].map(unwrapped).join('\n\n').trimEnd())
    .exitOverride()
    .configureHelp({
      padWidth: () => termWidth,
      formatItem: (term, _, description) => item(term, description, settings.width),
    })
    .configureOutput({ writeOut: settings.writeOut, writeErr: () => {}, getOutHelpWidth: () => settings.width })
    .allowExcessArguments(false)
    .helpOption('-h, --help', 'Show this.')
    .optionsGroup('Options:');
  for (const [key, spec] of Object.entries(command.arguments)) {
    const name = spec.kind === 'list' ? `${spec.value}...` : spec.value;
    parser.argument(spec.required ? `<${name}>` : `[${name}]`, spec.help);
    for (const name of [flagName(key), ...spec.aliases]) addOption(parser, key, name, spec, true, take);
    // The flag may stand in for the argument, so its absence is found when all sources are known.
    parser.registeredArguments.at(-1)!.required = false;
  }
  const sections = new Map<string, [string, Option<unknown>][]>();
  for (const entry of Object.entries({ ...command.options, ...settings.common })) {
    const section = entry[1].section ?? 'Options:';
    sections.set(section, [...(sections.get(section) ?? []), entry]);
  }
  for (const [section, entries] of sections) {
    for (const [key, spec] of entries) {
      addOption(parser, key, flagName(key), spec, false, take, section);
      for (const alias of spec.aliases) addOption(parser, key, alias, spec, true, take);
    }
  }
  const examples = command.examples.map(([line, does]) => `  deepseek-convert ${line}\n      ${does}`).join('\n');
  if (examples !== '') parser.addHelpText('after', `\nExamples:\n${examples}`);
  return parser.addHelpText('after', footer);
}

/** Columns of names in help. A longer name stands alone, what it means below it: help fits into 80 columns. */
const termWidth = 26;

function item(term: string, description: string, width: number): string {
  const lines = wrap(description, width - termWidth - 4);
  const first = term.length <= termWidth ? `${term.padEnd(termWidth)}  ${lines.shift()}` : term;
  const rest = lines.map((line) => `${' '.repeat(termWidth + 4)}${line}`);
  return [`  ${first}`.trimEnd(), ...rest].join('\n');
}

const sentence = (summary: string): string => `${summary.charAt(0).toUpperCase()}${summary.slice(1)}.`;

/** Lines of a paragraph as one, to be broken where the terminal ends; indented lines stay as they are. */
const unwrapped = (text: string): string => text.replace(/(\S)\n(?=\S)/g, '$1 ');

/** A required value is shown like any other: `-o, --out <path>`; who lacks it hears so when all sources are read. */
function addOption(
  parser: Parser,
  key: string,
  name: string,
  spec: Option<unknown>,
  hidden: boolean,
  take: (key: string, given: Given) => void,
  section = 'Options:',
): void {
  const add = (flags: string, hide: boolean, written: string, raw?: boolean) => {
    const made = new ParserOption(flags, describe(raw === false ? { ...spec, help: spec.off ?? spec.help } : spec))
      .hideHelp(hide)
      .helpGroup(section);
    parser.addOption(made);
    const seen: string[] = [];
    parser.on(`option:${made.name()}`, (value: string | null) => {
      if (spec.kind === 'list') seen.push(value ?? '');
      take(key, {
        from: 'command line',
        name: written,
        raw: raw ?? (spec.kind === 'list' ? [...seen] : (value ?? '')),
      });
    });
  };
  const prefix = spec.short !== undefined && !hidden ? `-${spec.short}, ` : '';
  if (spec.kind !== 'flag') return add(`${prefix}--${name} <${spec.value}>`, hidden, `--${name}`);
  const offByDefault = spec.default !== true;
  add(`${prefix}--${name}`, hidden || !offByDefault, `--${name}`, true);
  add(`--no-${name}`, hidden || offByDefault, `--no-${name}`, false);
}

function describe(spec: Option<unknown>): string {
  const facts: string[] = [];
  if (spec.required) facts.push('required');
  if (spec.defaultNote !== undefined) facts.push(`default: ${spec.defaultNote}`);
  else if (spec.kind !== 'flag' && spec.default !== undefined && !isEmptyList(spec.default)) {
    facts.push(`default: ${spec.default as string | number}`);
  }
  return facts.length === 0 ? spec.help : `${spec.help} (${facts.join('; ')})`;
}

const isEmptyList = (value: unknown): boolean => Array.isArray(value) && value.length === 0;

function usageError(error: CommanderError, name: string): ConvertError {
  const [what = '', suggestion] = error.message.replace(/^error: /, '').split('\n');
  const hint = suggestion?.replace(/^\((.*)\)$/, '$1') ?? `deepseek-convert ${name} --help lists them.`;
  return badUsage(what.charAt(0).toUpperCase() + what.slice(1), { hint });
}
