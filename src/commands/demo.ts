import { mkdtemp, readdir, rm, stat } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { bug } from '../base/errors.js';
import { formatBytes } from '../base/files.js';
import { mergeTables, resolveOptions, text } from '../base/options.js';
import { columns, duration, shellQuote } from '../base/text.js';
import { parseArguments } from './parse.js';
import { settingsOf } from './settings.js';
import { commonOptions, deviceOptions, openEnvironment, seedOption } from './shared.js';
import { defineCommand, type Command, type CommandResult, type Io } from './types.js';

type Registry = Readonly<Record<string, { readonly load: () => Promise<{ command: Command }> }>>;

export const demo = (commands: Registry): Command =>
  defineCommand({
    name: 'demo',
    description:
      'Makes a tiny model of random weights and runs convert, moe, quantize and validate on it, in a few seconds. It shows\n' +
      'that everything works on this machine; random weights say nothing of quality.',
    arguments: {
      folder: text({ value: 'folder', help: 'Keep the models here; without it they go away at the end.' }),
    },
    options: { ...seedOption, ...deviceOptions },
    examples: [['demo', 'Does everything work here?']],
    async run({ folder, ...given }, io) {
      const place = folder ?? (await mkdtemp(join(tmpdir(), 'deepseek-convert-demo-')));
      try {
        const steps = await runSteps(commands, place, given, io);
        const failure = steps.find(({ result }) => result.failure)?.result.failure;
        const rows = steps.map((s) => [s.command, s.does, duration(s.seconds), s.bytes === undefined ? '' : formatBytes(s.bytes)]); // prettier-ignore
        const { text: verdict } = steps.at(-1)!.result;
        const closing = [
          'The weights are random: that all of it works here is what this shows, not how good such models are.',
          folder === undefined ? 'The models are removed.' : `The models are in ${folder}.`,
          'Next: deepseek-convert inspect <model>, deepseek-convert quantize <model> -o <out>',
        ];
        return {
          data: {
            folder: folder ?? null,
            steps: steps.map(({ result, ...step }) => ({ ...step, ok: !result.failure })),
            validation: steps.at(-1)!.result.data,
          },
          text: [columns(rows, 'llrr'), verdict.trimEnd(), closing.join('\n')].join('\n\n'),
          ...(failure && { failure }),
        };
      } finally {
        if (folder === undefined) await rm(place, { recursive: true, force: true });
      }
    },
  });

interface Step {
  readonly command: string;
  readonly does: string;
  readonly seconds: number;
  readonly bytes: number | undefined;
  readonly result: CommandResult;
}

async function runSteps(
  commands: Registry,
  folder: string,
  given: Parameters<typeof openEnvironment>[0] & { readonly seed: number },
  io: Io,
): Promise<Step[]> {
  const at = (name: string) => join(folder, name);
  const { writeDemoModel } = await import('./demo-model.js');
  {
    using env = await openEnvironment(given, io);
    await writeDemoModel(at('v1-dense'), env, given.seed);
  }
  const computing = ['--device', given.device, ...(given.threads === undefined ? [] : ['--threads', String(given.threads)])]; // prettier-ignore
  const few = ['--samples', '8', '--seq-len', '128', '--overwrite', ...computing];
  const lines: readonly (readonly [does: string, out: string | undefined, line: readonly string[]])[] = [
    ['a folder becomes one PyTorch file', 'v1.bin', ['convert', at('v1-dense'), '-o', at('v1.bin'), '--overwrite']],
    ['dense becomes a mixture of 8 experts', 'v2-moe', ['moe', at('v1.bin'), '-o', at('v2-moe'), '--experts', '8', ...few]], // prettier-ignore
    ['bf16 becomes INT4', 'v3-int4', ['quantize', at('v2-moe'), '-o', at('v3-int4'), '--group-size', '32', ...few]],
    ['INT4 against the mixture', undefined, ['validate', at('v2-moe'), at('v3-int4'), '--samples', '8', '--seq-len', '128', '--generations', '2', '--new-tokens', '16', ...computing]], // prettier-ignore
  ];
  const steps: Step[] = [];
  for (const [does, out, line] of lines) {
    io.log.info(`\n$ deepseek-convert ${line.map(shellQuote).join(' ')}`);
    const started = performance.now();
    const result = await runLine(commands, line, io);
    const seconds = (performance.now() - started) / 1000;
    steps.push({ command: line[0]!, does, seconds, bytes: out === undefined ? undefined : await sizeOf(at(out)), result }); // prettier-ignore
  }
  return steps;
}

/** A command line as the program itself would run it, without environment and config file. */
async function runLine(commands: Registry, [name, ...argv]: readonly string[], io: Io): Promise<CommandResult> {
  const { command } = await commands[name!]!.load();
  const typed = parseArguments(command, argv, { summary: '', common: commonOptions, width: 80, writeOut: () => {} });
  if (!typed) throw bug(`the demo asked ${name} for help`);
  const { values, from } = resolveOptions(mergeTables(command.arguments, command.options, commonOptions), [typed]);
  const commandLine = ['deepseek-convert', name!, ...argv].map(shellQuote).join(' ');
  return command.run(values as never, { ...io, settings: settingsOf(command.name, values, from), commandLine });
}

async function sizeOf(path: string): Promise<number> {
  const found = await stat(path);
  if (!found.isDirectory()) return found.size;
  const sizes = await Promise.all((await readdir(path)).map((name) => stat(join(path, name))));
  return sizes.reduce((n, { size }) => n + size, 0);
}
