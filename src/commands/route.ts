import { badInput, badUsage, didYouMean } from '../base/errors.js';
import type { ConfigFile } from '../base/config.js';
import { flagName, type OptionTable } from '../base/options.js';

/** What the arguments ask for: a command with the rest of the arguments, or one of the program's own answers. */
export type Route =
  | { readonly kind: 'command'; readonly name: string; readonly argv: readonly string[]; readonly config?: ConfigFile }
  /** `config show`: the settings of a command that is not run. */
  | { readonly kind: 'settings'; readonly name: string; readonly argv: readonly string[]; readonly config?: ConfigFile }
  | { readonly kind: 'help' }
  | { readonly kind: 'version' }
  | { readonly kind: 'welcome' };

/** `--target-arch` of the documents' form -> the command that makes it. */
const targets: Readonly<Record<string, string>> = { moe: 'moe', dense: 'convert' };

/** Flags of the documents' form whose values must not be taken for a command's name. */
const documentFlags = ['input-model', 'output-model', 'target-arch', 'expert-num'];

/** Decides which command is meant. Errors: usage, with the nearest name. */
export async function route(
  argv: readonly string[],
  environment: NodeJS.ProcessEnv,
  common: OptionTable,
  names: readonly string[],
): Promise<Route> {
  if (argv.length === 0) return { kind: 'welcome' };
  const config = await configFile(argv, environment);
  const withFile = config && { config };
  const at = firstWord(argv, common);
  const word = at === undefined ? undefined : argv[at]!;
  if (word === 'help') {
    const topic = argv[at! + 1];
    if (topic === undefined) return { kind: 'help' };
    if (!names.includes(topic)) throw unknownCommand(topic, names);
    return { kind: 'command', name: topic, argv: ['--help'] };
  }
  if (word === 'config' && argv[at! + 1] === 'show' && argv[at! + 2]?.startsWith('-') === false) {
    const name = argv[at! + 2]!;
    if (!names.includes(name)) throw unknownCommand(name, names);
    return { kind: 'settings', name, argv: argv.toSpliced(at!, 3), ...withFile };
  }
  if (word !== undefined && names.includes(word)) {
    return { kind: 'command', name: word, argv: argv.toSpliced(at!, 1), ...withFile };
  }
  // `--active 2 --input-model ...`: the first word was only the value of a flag of the command to come.
  const documents = argv[0]!.startsWith('-') && argv.some((a) => /^--(input-model|target-arch)(=|$)/.test(a));
  if (word !== undefined && !documents) throw unknownCommand(word, names);
  if (!documents) {
    if (argv.some((a) => a === '-h' || a === '--help')) return { kind: 'help' };
    if (argv.some((a) => a === '-V' || a === '--version')) return { kind: 'version' };
  }
  const chosen = config && commandOf(config);
  if (chosen !== undefined && !documents) {
    if (!names.includes(chosen)) throw unknownCommand(chosen, names);
    return { kind: 'command', name: chosen, argv, ...withFile };
  }
  const { target, rest } = takeTarget(argv, environment, config);
  return { kind: 'command', name: target, argv: rest, ...withFile };
}

async function configFile(argv: readonly string[], environment: NodeJS.ProcessEnv): Promise<ConfigFile | undefined> {
  const end = argv.indexOf('--');
  const flags = end === -1 ? argv : argv.slice(0, end);
  const at = flags.findLastIndex((a) => a === '--config-file' || a.startsWith('--config-file='));
  const flag = flags[at];
  const path = flag?.includes('=') ? flag.slice(flag.indexOf('=') + 1) : flag && flags[at + 1];
  const chosen = path ?? environment.DEEPSEEK_CONVERT_CONFIG_FILE;
  return chosen === undefined || chosen === '' ? undefined : (await import('../base/config.js')).readConfigFile(chosen);
}

/** The command that a config file asks for by `command:`. */
function commandOf({ path, entries: { command } }: ConfigFile): string | undefined {
  if (command === undefined || typeof command === 'string') return command;
  throw badInput('command must be a name', { where: path, got: JSON.stringify(command) });
}

/** Index of the first argument that is neither a flag nor the value of one. */
function firstWord(argv: readonly string[], common: OptionTable): number | undefined {
  const takesValue = new Set(documentFlags);
  for (const [key, spec] of Object.entries(common)) if (spec.kind !== 'flag') takesValue.add(flagName(key));
  for (let i = 0; i < argv.length; i++) {
    const argument = argv[i]!;
    if (argument === '--') return i + 1 < argv.length ? i + 1 : undefined;
    if (!argument.startsWith('-') || argument === '-') return i;
    if (takesValue.has(argument.slice(2))) i++;
  }
  return undefined;
}

function takeTarget(argv: readonly string[], environment: NodeJS.ProcessEnv, config: ConfigFile | undefined) {
  const rest: string[] = [];
  let given: string | undefined;
  for (let i = 0; i < argv.length; i++) {
    const argument = argv[i]!;
    if (argument === '--target-arch') given = argv[++i];
    else if (argument.startsWith('--target-arch=')) given = argument.slice('--target-arch='.length);
    else rest.push(argument);
  }
  const fromFile = config?.entries['target-arch'] ?? config?.entries['target_arch'];
  given ??= environment.DEEPSEEK_CONVERT_TARGET_ARCH;
  given ??= typeof fromFile === 'string' ? fromFile : undefined;
  if (given === undefined || given === '') {
    throw badUsage('No command, and no --target-arch', {
      expected: 'a command, or --input-model A --output-model B --target-arch moe --expert-num 8',
      hint: 'deepseek-convert --help lists the commands.',
    });
  }
  const target = targets[given];
  if (target === undefined) {
    const near = didYouMean(given, Object.keys(targets));
    throw badUsage('Unknown --target-arch', {
      expected: Object.keys(targets).join(' or '),
      got: `"${given}"`,
      hint:
        near !== undefined
          ? `Did you mean ${near}?`
          : 'INT4 is made by: deepseek-convert quantize <in> -o <out>. What a model is, says: deepseek-convert inspect <model>.',
    });
  }
  return { target, rest };
}

function unknownCommand(word: string, names: readonly string[]) {
  const near = didYouMean(word, names);
  return badUsage(`No command named "${word}"`, {
    hint:
      near !== undefined
        ? `Did you mean ${near}?`
        : `Commands: ${names.join(', ')}. To look at a model: deepseek-convert inspect ${word}`,
  });
}
