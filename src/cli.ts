import { readFileSync } from 'node:fs';
import { nativeScanner } from './backend/native.js';
import { ConvertError, bug, didYouMean } from './base/errors.js';
import { errorCode, ioError } from './base/files.js';
import { environmentName, fromEnvironment, mergeTables, resolveOptions, type Values } from './base/options.js';
import { createPaint, noPaint, takesColors, type Paint } from './base/paint.js';
import type { ProgressLog, ProgressMode } from './base/progress.js';
import { provideScanner } from './base/scanner.js';
import { columns, reflow, shellQuote } from './base/text.js';
import { usageOf } from './base/usage.js';
import { commands } from './commands/index.js';
import { route } from './commands/route.js';
import { settingsOf } from './commands/settings.js';
import { commonOptions, devicesUsed } from './commands/shared.js';
import type { CommandResult, Io } from './commands/types.js';

const { version } = JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')) as {
  version: string;
};
const schema = 'deepseek-convert/1';
const names = Object.keys(commands);

interface Run {
  readonly argv: readonly string[];
  readonly environment: NodeJS.ProcessEnv;
  /** Known before the options are: errors in them are JSON too. */
  json: boolean;
  command: string | undefined;
  paintOut: Paint;
  paintErr: Paint;
  log: ProgressLog | undefined;
}

const run: Run = {
  argv: process.argv.slice(2),
  environment: process.env,
  json: process.argv.includes('--json') || /^(true|yes|on|1)$/i.test(process.env.DEEPSEEK_CONVERT_JSON ?? ''),
  command: undefined,
  paintOut: await createPaint(takesColors(process.stdout, process.env)),
  paintErr: await createPaint(takesColors(process.stderr, process.env)),
  log: undefined,
};

provideScanner(nativeScanner);
process.stdout.on('error', ignoreClosedPipe);
process.stderr.on('error', ignoreClosedPipe);
process.on('uncaughtException', (error) => void leave(report(error)));
void leave(await main().catch(report));

/** The program; the only place that catches, prints errors and decides the exit code. */
async function main(): Promise<number> {
  const way = await route(run.argv, run.environment, commonOptions, names);
  if (way.kind === 'welcome') {
    print((await import('./commands/welcome.js')).welcome(process.cwd(), process.stdout.columns));
    return 0;
  }
  if (way.kind === 'help') print(help());
  if (way.kind === 'version') print(run.json ? JSON.stringify({ schema, version, node: process.version }) : version);
  const width = Math.max(60, Math.min(process.stdout.columns ?? 80, 120));
  const writeOut = (text: string) => print(text.trimEnd());
  if (way.kind === 'settings') {
    run.command = 'config';
    const { showConfig } = await import('./commands/config.js');
    const { summary } = commands[way.name]!;
    const shown = await showConfig({ config: undefined, ...way }, commands, run.environment, { summary, common: commonOptions, width, writeOut }); // prettier-ignore
    return shown ? finish(shown) : 0;
  }
  if (way.kind !== 'command') return 0;

  run.command = way.name;
  const entry = commands[way.name]!;
  const [{ command }, { parseArguments }] = await Promise.all([entry.load(), import('./commands/parse.js')]);
  const table = mergeTables(command.arguments, command.options, commonOptions);
  const typed = parseArguments(command, way.argv, {
    summary: entry.summary,
    common: commonOptions,
    width,
    writeOut,
  });
  if (typed === undefined) return 0;
  const sources = [typed, fromEnvironment(table, run.environment)];
  if (way.config) sources.push((await import('./base/config.js')).fromConfigFile(way.config, way.name, names, table));
  const { values, from } = resolveOptions(table, sources);
  await requireInputsElsewhere(values);
  const common = values as Values<typeof commonOptions>;
  run.json = common.json;
  if (!common.color) run.paintOut = run.paintErr = noPaint;
  const { createProgress } = await import('./base/progress.js');
  run.log = await createProgress({
    mode: progressMode(common.progress),
    quiet: common.quiet,
    verbose: common.verbose,
    stream: process.stderr,
    warnColor: run.paintErr.yellow,
    dimColor: run.paintErr.dim,
    usage: () => ({ ...usageOf('self'), devices: devicesUsed }),
  });
  await warnOfUnknownVariables(run.log);
  const io: Io = {
    log: run.log,
    signal: watchSignals(),
    paint: run.paintOut,
    width: process.stdout.isTTY ? width : Infinity,
    settings: settingsOf(command.name, values, from),
    commandLine: ['deepseek-convert', ...run.argv].map(shellQuote).join(' '),
  };
  const result = await command.run(values as never, io);
  run.log.stop();
  return finish(result);
}

/** Before a job of hours begins; its writer would learn of it at the end. */
async function requireInputsElsewhere({
  input,
  paths,
  out,
  overwrite,
}: Readonly<Record<string, unknown>>): Promise<void> {
  if (overwrite !== true || typeof out !== 'string') return;
  const { requireInputElsewhere } = await import('./base/job.js');
  for (const path of [input, ...(Array.isArray(paths) ? (paths as unknown[]) : [])]) {
    if (typeof path === 'string') await requireInputElsewhere(path, out);
  }
}

function finish({ data, text, failure }: CommandResult): number {
  if (run.json) {
    const error = failure && { error: errorFacts(failure) };
    print(JSON.stringify({ schema, version, command: run.command, ok: failure === undefined, ...error, ...data }));
  } else {
    print(reflow(text, columnsOf(process.stdout)));
  }
  if (failure && !run.json) writeError(failure);
  return failure?.exitCode ?? 0;
}

/** Tells of an error in the way that was asked for; gives the exit code. */
function report(thrown: unknown): number {
  run.log?.stop();
  const error = classify(thrown);
  if (run.json) {
    print(JSON.stringify({ schema, version, command: run.command ?? null, ok: false, error: errorFacts(error) }));
  }
  // Under --json stderr stays readable for machines, except that a bug's stack is always shown.
  if (!run.json || error.kind === 'internal') writeError(error);
  return error.exitCode;
}

function classify(thrown: unknown): ConvertError {
  if (thrown instanceof ConvertError) return thrown;
  const code = errorCode(thrown);
  if (code === 'ENOSPC' || code === 'EDQUOT' || code === 'ENOMEM' || code === 'EMFILE' || code === 'EIO') {
    const { path, syscall } = thrown as NodeJS.ErrnoException;
    return ioError(thrown, syscall ?? 'go on', path ?? 'a file');
  }
  return bug(thrown instanceof Error ? thrown.message : String(thrown), { cause: thrown });
}

function errorFacts({ kind, exitCode, message, facts }: ConvertError) {
  const { where, got, expected, hint } = facts;
  return { kind, exitCode, message, where, got, expected, hint };
}

function writeError(error: ConvertError): void {
  const paint = run.paintErr;
  process.stderr.write(`${reflow(`${paint.bold(paint.red('error:'))} ${error.message}`, columnsOf(process.stderr))}\n`);
  const again = ['deepseek-convert', ...run.argv].map(shellQuote).join(' ');
  if (error.kind === 'interrupted' && !error.message.includes(again)) process.stderr.write(`To go on: ${again}\n`);
  if (error.kind !== 'internal') return;
  const cause = error.cause instanceof Error ? error.cause : error;
  const machine = `deepseek-convert ${version}, Node ${process.version}, ${process.platform}-${process.arch}`;
  process.stderr.write(`${paint.dim(cause.stack ?? String(cause))}\n`);
  process.stderr.write(`This is a bug in deepseek-convert, not in your input. ${machine}\n`);
}

/** Of a terminal; what goes to a file or a program is not broken. */
function columnsOf({ isTTY, columns = 80 }: NodeJS.WriteStream): number {
  return isTTY ? columns : Infinity;
}

function print(text: string): void {
  process.stdout.write(text.endsWith('\n') ? text : `${text}\n`);
}

/** Exits when all output has been taken; native threads that still wait must not keep the process. */
async function leave(code: number): Promise<void> {
  process.exitCode = code;
  await Promise.all(
    [process.stdout, process.stderr].map((s) => new Promise<void>((done) => s.write('', () => done()))),
  );
  process.exit(code);
}

/** `deepseek-convert ... | head`: whoever reads has seen enough. */
function ignoreClosedPipe(error: NodeJS.ErrnoException): void {
  if (error.code !== 'EPIPE') throw error;
}

function watchSignals(): AbortSignal {
  const controller = new AbortController();
  const stop = (signal: NodeJS.Signals) => {
    if (controller.signal.aborted) {
      void leave(report(new ConvertError('interrupted', 'Stopped at once; finished blocks of an output are saved')));
      return;
    }
    const again = signal === 'SIGINT' ? ' (Ctrl-C again stops at once)' : '';
    run.log?.warn(`${signal}: stopping after this step${again}.`);
    controller.abort();
  };
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) process.on(signal, stop);
  return controller.signal;
}

function progressMode(asked: Values<typeof commonOptions>['progress']): ProgressMode {
  if (asked !== 'auto') return asked;
  return process.stderr.isTTY && process.env.TERM !== 'dumb' ? 'tty' : 'plain';
}

/** A variable with our prefix that no command knows is a typing error; a job would run with a default unnoticed. */
async function warnOfUnknownVariables(log: ProgressLog): Promise<void> {
  const prefix = environmentName('');
  const set = Object.keys(run.environment).filter((name) => name.startsWith(prefix));
  if (set.length === 0) return;
  const tables = await Promise.all(Object.values(commands).map(async ({ load }) => (await load()).command));
  const known = new Set(
    ['BUILD', 'BLAS', 'COMMIT', 'CUDA_LIBRARIES', 'ISA', 'LOCK_WAIT', 'TARGET_ARCH', 'TEST_CUDA', 'TEST_SEED'].map(
      (name) => prefix + name,
    ),
  );
  for (const table of [commonOptions, ...tables.flatMap((t) => [t.arguments, t.options])]) {
    for (const [key, { aliases }] of Object.entries(table)) {
      for (const name of [key, ...aliases]) known.add(environmentName(name));
    }
  }
  for (const name of set.filter((name) => !known.has(name))) {
    const near = didYouMean(name, known);
    log.warn(`${name} in the environment is no option of any command${near ? `; did you mean ${near}?` : ''}`);
  }
}

function help(): string {
  const rows = Object.entries(commands).map(([name, { summary }]) => [`  ${name}`, summary]);
  return `deepseek-convert: language-model checkpoints to verified INT4 and MoE ones.

Usage: deepseek-convert <command> ...
       deepseek-convert --input-model <in> --output-model <out>
                        --target-arch moe --expert-num 8

Commands:
${columns(rows, 'll')}

Options:
  -h, --help     Show this; deepseek-convert <command> --help shows a command's.
  -V, --version  Show the version.

Exit codes: 0 done, 1 bad input, 2 usage, 3 a quality gate failed,
4 resources (disk, memory, device), 70 a bug of ours,
75 interrupted: the same command goes on.`;
}
