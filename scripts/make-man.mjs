// The manual page, man/deepseek-convert.1, from the same option tables as docs/cli.md.

/** Text of roff: backslashes, hyphens and what is not ASCII escaped, no line that begins like a request. */
const roff = (text) =>
  text
    .replaceAll('\\', '\\e')
    .replaceAll('-', '\\-')
    .replaceAll('\n', ' ')
    .replace(/[^\x20-\x7e]/gu, (c) => `\\[u${c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0')}]`)
    .replace(/^([.'])/, '\\&$1');

function optionLines(options, { flagOf, helpOf, meaning }) {
  return Object.entries(options).flatMap(([key, spec]) => {
    const said = meaning(spec).replaceAll('`', '');
    const note = said === '' || said === 'off' ? '' : ` (${said === 'required' ? said : `default: ${said}`})`;
    return ['.TP', `.B ${roff(flagOf(key, spec).replaceAll('`', ''))}`, roff(helpOf(key, spec) + note)];
  });
}

/**
 * @param commands name -> { summary, command }, in order
 * @param common options of every command; `machine` those of the commands that compute, said once
 */
export function manPage(commands, { common, machine, version, flagOf, helpOf, meaning }) {
  const lines = [
    `.TH DEEPSEEK\\-CONVERT 1 "" "deepseek\\-convert ${roff(version)}" "User commands"`,
    '.SH NAME',
    'deepseek\\-convert \\- language\\-model checkpoints to verified INT4 and MoE checkpoints',
    '.SH SYNOPSIS',
    '.B deepseek\\-convert',
    '.I command\n[arguments] [options]',
    '.br',
    '.B deepseek\\-convert \\-\\-input\\-model\n.I in\n.B \\-\\-output\\-model\n.I out\n.B \\-\\-target\\-arch moe \\-\\-expert\\-num\n.I n',
    '.SH COMMANDS',
  ];
  for (const [name, { summary, command }] of commands) {
    const places = Object.values(command.arguments).map((s) => (s.required ? `<${s.value}>` : `[${s.value}]`));
    const own = Object.entries(command.options).filter(([key]) => !(key in machine));
    lines.push(`.SS ${roff([name, ...places].join(' '))}`, `${roff(summary[0].toUpperCase() + summary.slice(1))}.`);
    if (command.description) lines.push('.PP', roff(command.description));
    lines.push(...optionLines(Object.fromEntries(own), { flagOf, helpOf, meaning }));
    if (Object.keys(command.options).some((key) => key in machine)) lines.push('.PP', 'Options of the machine: see below.'); // prettier-ignore
    for (const [line, does] of command.examples) {
      lines.push('.PP', roff(does), '.RS', '.nf', `deepseek\\-convert ${roff(line)}`, '.fi', '.RE');
    }
  }
  lines.push('.SH OPTIONS OF THE MACHINE', ...optionLines(machine, { flagOf, helpOf, meaning }));
  lines.push('.SH OPTIONS OF EVERY COMMAND', ...optionLines(common, { flagOf, helpOf, meaning }));
  lines.push(
    '.SH ENVIRONMENT',
    'Every option can stand in the environment: \\-\\-group\\-size as',
    '.BR DEEPSEEK_CONVERT_GROUP_SIZE .',
    'The command line wins over the environment, the environment over \\-\\-config\\-file, the file over the default;',
    '.B deepseek\\-convert config show',
    'shows what a command would use.',
    '.B NO_COLOR',
    'and',
    '.B FORCE_COLOR',
    'are honoured.',
    '.SH EXIT STATUS',
  );
  const codes = { 0: 'done', 1: 'bad input, or the output exists', 2: 'usage', 3: 'a quality gate failed', 4: 'resources: disk, memory, device', 70: 'a bug', 75: 'interrupted: the same command goes on' }; // prettier-ignore
  for (const [code, meaning] of Object.entries(codes)) lines.push('.TP', `.B ${code}`, roff(meaning));
  lines.push(
    '.SH FILES',
    '.TP',
    '.I out.part',
    'Finished work of a job that was interrupted. The same command goes on; \\-\\-restart begins anew.',
    '.TP',
    '.I out/deepseek\\-convert.json',
    'How an output was made: inputs and outputs with their SHA\\-256, options, errors of each layer.',
  );
  return `${lines.join('\n')}\n`;
}
