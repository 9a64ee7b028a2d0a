// Writes docs/cli.md and the manual page from the option tables of src/commands (npm run docs). With --check: says
// whether they are current.
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import { manPage } from './make-man.mjs';

const root = new URL('../', import.meta.url);
const { commands } = await import(new URL('dist/commands/index.js', root));
const { commonOptions, deviceOptions } = await import(new URL('dist/commands/shared.js', root));
const { asTyped } = await import(new URL('dist/base/options.js', root));

const cell = (text) => text.replaceAll('|', '\\|').replaceAll('\n', ' ');
const meaning = (spec) => {
  if (spec.required) return 'required';
  if (spec.defaultNote !== undefined) return cell(spec.defaultNote);
  if (spec.kind === 'flag') return 'off';
  return spec.default === undefined || spec.default.length === 0 ? '' : `\`${cell(String(spec.default))}\``;
};
const helpOf = (key, spec) => asTyped(key, spec).help;
const flagOf = (key, spec) => {
  const { name } = asTyped(key, spec);
  const short = spec.short ? `\`-${spec.short}\`, ` : '';
  const value = spec.kind === 'flag' ? '' : ` <${spec.value}>`;
  return `${short}\`--${cell(name + value)}\``;
};
const table = (options) =>
  [
    '| option | default | |',
    '|---|---|---|',
    ...Object.entries(options).map(([k, s]) => `| ${flagOf(k, s)} | ${meaning(s)} | ${cell(helpOf(k, s))} |`),
  ].join('\n');

const machine = new Set(Object.keys(deviceOptions));
const parts = [];
const loaded = [];
for (const [name, { summary, load }] of Object.entries(commands)) {
  const { command } = await load();
  loaded.push([name, { summary, command }]);
  const places = Object.values(command.arguments).map((s) => (s.required ? `<${s.value}>` : `[${s.value}]`));
  const own = Object.fromEntries(Object.entries(command.options).filter(([key]) => !machine.has(key)));
  parts.push(
    `## ${name}\n\n${summary[0].toUpperCase()}${summary.slice(1)}.`,
    ...(command.description ? [command.description] : []),
    `\`deepseek-convert ${[name, ...places].join(' ')} [options]\``,
    ...Object.values(command.arguments).map((s) => `\`<${s.value}>\`: ${s.help}`),
    ...(Object.keys(own).length > 0 ? [table(own)] : []),
    ...(Object.keys(command.options).some((key) => machine.has(key))
      ? ['And the [options of the machine](#the-machine).']
      : []),
    ['```sh', ...command.examples.map(([line, does]) => `# ${does}\ndeepseek-convert ${line}`), '```'].join('\n'),
  );
}

const document = `<!-- Made from the option tables of src/commands by: npm run docs -->

# The command line

\`deepseek-convert <command> ...\`, or without a command the form

\`\`\`sh
deepseek-convert --input-model fixtures/v1.0/v1.0_checkpoint.bin --output-model out/v2.0_converted.bin --target-arch moe --expert-num 8
\`\`\`

which is \`moe\` (\`--target-arch dense\` is \`convert\`) with all its options. \`deepseek-convert <command> --help\` shows
what stands below. No arguments: three commands that fit the folder.

- **stdout is the result**, stderr is progress and messages. \`--json\` gives one object, also for errors:
  \`{"schema": "deepseek-convert/1", "version": ..., "command": ..., "ok": true, ...}\` or
  \`{..., "ok": false, "error": {"kind", "exitCode", "message", "where", "got", "expected", "hint"}}\`.
- **Every option** is a flag (\`--group-size 64\`), a variable (\`DEEPSEEK_CONVERT_GROUP_SIZE=64\`) and a key of
  \`--config-file job.yaml\` (\`group-size: 64\`). The command line wins over the environment, the environment over the
  file, the file over the default. In the file, keys below a command's name (\`quantize:\`) are for that command alone,
  \`command:\` chooses one, and arguments have names too (\`input:\`, \`out:\`). What was decided is written into the
  output's \`deepseek-convert.json\`.
- **Inputs**: a Hugging Face folder, an index file, or one file. The config of a lone \`X.bin\` is \`X.config.json\`, else
  \`config.json\` beside it, else \`--config\`. **Outputs**: a folder, or one file with \`X.config.json\` beside it; another
  model's files are never replaced.
- **Interrupted** (Ctrl-C, a kill, a full disk), a job that writes keeps its finished work in \`<out>.part\`; the same command goes on
  and ends with the same bytes. Ctrl-C twice stops at once. \`--restart\` begins anew.
- Exit codes and what to do: [errors.md](errors.md).

${parts.join('\n\n')}

## The machine

${table(deviceOptions)}

## Output of every command

${table(commonOptions)}
`;

const { version } = JSON.parse(readFileSync(new URL('package.json', root), 'utf8'));
const man = manPage(loaded, { common: commonOptions, machine: deviceOptions, version, flagOf, helpOf, meaning });
for (const [path, made] of [
  ['docs/cli.md', document],
  ['man/deepseek-convert.1', man],
]) {
  const target = new URL(path, root);
  if (process.argv.includes('--check')) {
    const current = readFileSync(target, 'utf8') === made;
    console.log(current ? `${path} is current.` : `${path} is not what the option tables say: npm run docs`);
    if (!current) process.exitCode = 1;
  } else {
    mkdirSync(new URL('.', target), { recursive: true });
    writeFileSync(target, made);
  }
}
