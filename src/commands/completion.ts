import { choice, asTyped, type OptionTable } from '../base/options.js';
import { commonOptions } from './shared.js';
import { defineCommand, type Command } from './types.js';

const shells = ['bash', 'zsh', 'fish'] as const;

type Registry = Readonly<
  Record<string, { readonly summary: string; readonly load: () => Promise<{ command: Command }> }>
>;

/** The command, for the commands that there are. */
export const completion = (commands: Registry): Command =>
  defineCommand({
    name: 'completion',
    description:
      'Prints a script that completes commands, options and their values with Tab. To use it:\n' +
      '  bash: eval "$(deepseek-convert completion bash)"      in ~/.bashrc\n' +
      '  zsh:  eval "$(deepseek-convert completion zsh)"       in ~/.zshrc, after compinit\n' +
      '  fish: deepseek-convert completion fish | source       in ~/.config/fish/config.fish',
    arguments: { shell: choice(shells, { required: true, value: 'shell', help: 'bash, zsh or fish.' }) },
    options: {},
    examples: [['completion bash', 'The script for bash.']],
    async run({ shell }) {
      const tables = await Promise.all(
        Object.entries(commands).map(async ([name, { summary, load }]): Promise<CommandTable> => {
          const { arguments: places, options } = (await load()).command;
          return {
            name,
            summary,
            places: Object.values(places).map(({ choices }) => choices ?? []),
            flags: flagsOf({ ...options, ...commonOptions }),
          };
        }),
      );
      const script = { bash, zsh, fish }[shell](tables);
      return { data: { shell, script }, text: script };
    },
  });

interface Flag {
  readonly name: string;
  readonly help: string;
  readonly takesValue: boolean;
  readonly choices: readonly string[];
}
interface CommandTable {
  readonly name: string;
  readonly summary: string;
  /** The only values of each argument; none: files. */
  readonly places: readonly (readonly string[])[];
  readonly flags: readonly Flag[];
}

const flagsOf = (table: OptionTable): Flag[] =>
  Object.entries(table).map(([key, spec]) => ({
    ...asTyped(key, spec),
    takesValue: spec.kind !== 'flag',
    choices: spec.choices ?? [],
  }));

const names = (tables: readonly CommandTable[]): string => tables.map(({ name }) => name).join(' ');

/** Values of flags first, then flags and values of arguments; files where nothing else fits. */
function bash(tables: readonly CommandTable[]): string {
  const cases = tables.map(({ name, places, flags }) => {
    const values = flags
      .filter(({ takesValue }) => takesValue)
      .map((f) => `        --${f.name}) ${f.choices.length > 0 ? `words='${f.choices.join(' ')}'` : 'return'} ;;\n`);
    const chosen = places.flatMap((choices, i) => choices.length > 0 ? [`            ${i + 2}) words='${choices.join(' ')}' ;;\n`] : []); // prettier-ignore
    return `    ${name})
      words='${flags.map((flag) => `--${flag.name}`).join(' ')}'
      case $before in
${values.join('')}        *) if [[ $now != -* ]]; then
          case $COMP_CWORD in
${chosen.join('')}            *) return ;;
          esac
        fi ;;
      esac ;;
`;
  });
  return `_deepseek_convert() {
  local now=\${COMP_WORDS[COMP_CWORD]} before=\${COMP_WORDS[COMP_CWORD - 1]} name=\${COMP_WORDS[1]} words=
  COMPREPLY=()
  # Behind "config show" stands the command line of another command.
  [[ $name == config ]] && ((COMP_CWORD > 3)) && name=\${COMP_WORDS[3]}
  case $name in
${cases.join('')}    *) ((COMP_CWORD == 1)) && words='${names(tables)} --help --version' ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$now"))
}
complete -o default -F _deepseek_convert deepseek-convert`;
}

const zshQuote = (text: string): string => `'${text.replaceAll("'", `'\\''`)}'`;
/** Within \`_arguments\` specifications brackets and colons have a meaning. */
const zshHelp = (text: string): string => text.replace(/[[\]:\\]/g, '\\$&');

function zsh(tables: readonly CommandTable[]): string {
  const list = tables.map(({ name, summary }) => zshQuote(`${name}:${summary.replaceAll(':', '\\:')}`)).join(' ');
  const cases = tables.map(({ name, places, flags }) => {
    const chosen = places.map((choices, i) => `'${i + 1}:value:${choices.length > 0 ? `(${choices.join(' ')})` : '_files'}'`); // prettier-ignore
    const specs = flags.map((flag) => {
      const value = !flag.takesValue
        ? ''
        : `:value:${flag.choices.length > 0 ? `(${flag.choices.join(' ')})` : '_files'}`;
      return zshQuote(`--${flag.name}[${zshHelp(flag.help)}]${value}`);
    });
    return `    ${name}) _arguments ${[...specs, ...chosen].join(' ')} '*:file:_files' ;;`;
  });
  return `_deepseek_convert() {
  local -a commands=(${list})
  if ((CURRENT == 2)); then _describe command commands; return; fi
  local name=\${words[2]}
  shift words; ((CURRENT--))
  # Behind "config show" stands the command line of another command.
  if [[ $name == config ]] && ((CURRENT > 3)); then name=\${words[3]}; shift 2 words; ((CURRENT -= 2)); fi
  case $name in
${cases.join('\n')}
  esac
}
compdef _deepseek_convert deepseek-convert`;
}

const fishQuote = (text: string): string => `'${text.replaceAll('\\', '\\\\').replaceAll("'", "\\'")}'`;

function fish(tables: readonly CommandTable[]): string {
  const lines = tables.flatMap(({ name, summary, places, flags }) => [
    `complete -c deepseek-convert -n __fish_use_subcommand -a ${name} -d ${fishQuote(summary)}`,
    ...places.filter((choices) => choices.length > 0).map((choices) => `complete -c deepseek-convert -n '__fish_seen_subcommand_from ${name}' -x -a ${fishQuote(choices.join(' '))}`), // prettier-ignore
    ...flags.map((flag) => {
      const value = !flag.takesValue ? '' : flag.choices.length > 0 ? ` -x -a ${fishQuote(flag.choices.join(' '))}` : ' -r'; // prettier-ignore
      return `complete -c deepseek-convert -n '__fish_seen_subcommand_from ${name}' -l ${flag.name}${value} -d ${fishQuote(flag.help)}`;
    }),
  ]);
  return lines.join('\n');
}
