// Many jobs of three kinds in one process: node --expose-gc test/soak/in-process.mjs <model> <folder> <rounds> <early>
// Prints what is left after `early` rounds and after all.
import { mkdirSync } from 'node:fs';
import { join } from 'node:path';
import { resolveOptions, mergeTables } from '../../dist/base/options.js';
import { commands } from '../../dist/commands/index.js';
import { commonOptions } from '../../dist/commands/shared.js';
import { silentLog } from '../../dist/base/log.js';
import { measure } from './probe.mjs';

const [model, folder, rounds, early] = process.argv.slice(2);
const paint = new Proxy({}, { get: () => (text) => text });

async function run(name, given) {
  const { command } = await commands[name].load();
  const table = mergeTables(command.arguments, command.options, commonOptions);
  const from = new Map(Object.entries(given).map(([key, raw]) => [key, { raw, from: 'here' }]));
  const { values } = resolveOptions(table, [from]);
  const settings = { command: name, options: {}, from: {} };
  const io = { log: silentLog, signal: new AbortController().signal, paint, width: 80, settings, commandLine: name };
  await command.run(values, io);
}

const found = [];
for (let i = 1; i <= Number(rounds); i++) {
  const round = join(folder, `round-${i}`);
  mkdirSync(round);
  await run('inspect', { input: model });
  await run('convert', { input: model, out: join(round, 'half'), dtype: 'f16' });
  const small = { method: 'rtn', groupSize: '32', device: 'cpu', threads: '1', validate: false };
  await run('quantize', { input: model, out: join(round, 'int4'), ...small });
  if (i === Number(early) || i === Number(rounds)) found.push(await measure());
}
console.log(JSON.stringify(found));
