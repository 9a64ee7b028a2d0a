import type { ConvertError } from '../base/errors.js';
import type { Log } from '../base/log.js';
import type { Json } from '../base/job.js';
import type { OptionTable, Values } from '../base/options.js';
import type { Paint } from '../base/paint.js';

/**
 * One subcommand. Its file in src/commands exports `command = defineCommand({...})` and imports nothing heavy at its
 * top: `run` imports the job (`const { quantize } = await import('../quant/run.js')`), so that help and completion
 * start at once. Registered by one line in src/commands/index.ts, where the summary stands.
 */
export interface CommandSpec<A extends OptionTable, O extends OptionTable> {
  readonly name: string;
  /** A paragraph for `--help`, below the summary. */
  readonly description?: string;
  /** Positional arguments in order. They can also stand in a config file, and under `aliases` as flags. */
  readonly arguments: A;
  readonly options: O;
  /** Command lines without the program's name, and what each does; every one is run by a test. */
  readonly examples: readonly (readonly [line: string, does: string])[];
  /** `given` is frozen and holds arguments and options alike. Throws ConvertError only. */
  run(given: Values<A> & Values<O>, io: Io): Promise<CommandResult>;
}

/** A command with its option types forgotten, as src/cli.ts sees it. */
export interface Command {
  readonly name: string;
  readonly description?: string;
  readonly arguments: OptionTable;
  readonly options: OptionTable;
  readonly examples: readonly (readonly [line: string, does: string])[];
  run(given: never, io: Io): Promise<CommandResult>;
}

export const defineCommand = <const A extends OptionTable, const O extends OptionTable>(
  command: CommandSpec<A, O>,
): Command => command;

export interface CommandResult {
  /** For `--json`: goes into the one object on stdout, beside schema, version, command and ok. */
  readonly data: Readonly<Record<string, unknown>> & {
    readonly schema?: never;
    readonly version?: never;
    readonly command?: never;
    readonly ok?: never;
    readonly error?: never;
  };
  /** For people: printed to stdout when `--json` is off. */
  readonly text: string;
  /** The command did its work, and the outcome is a failure (a quality gate): its message and exit code are used. */
  readonly failure?: ConvertError;
}

/** The run's surroundings, as a command sees them. */
export interface Io {
  readonly log: Log;
  /** Aborted by Ctrl-C or SIGTERM. */
  readonly signal: AbortSignal;
  /** Colours for `text`: none where stdout is no terminal, with NO_COLOR, and so on. */
  readonly paint: Paint;
  /** Columns of the terminal; Infinity where stdout is none: what goes to a program is not cut or wrapped. */
  readonly width: number;
  /** What was asked for, after defaults: goes into the output's provenance. */
  readonly settings: Settings;
  /** The command line as it was typed, quoted for a shell: "run this again to resume". */
  readonly commandLine: string;
}

/** A type, not an interface, so that it is JSON for provenance files. */
export type Settings = {
  readonly command: string;
  readonly options: Readonly<Record<string, Json>>;
  /** Where each value that is not a default came from. */
  readonly from: Readonly<Record<string, string>>;
};
