// `quantize --method gptq` from file to file beside the plain PyTorch GPTQ loop on the same layers, in turns.
//   npm run bench:ptq [-- MODEL] [--samples 128] [--seq-len 512] [--threads N] [--rounds 1]
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { commit } from './commit.mjs';

const { values: options, positionals } = parseArgs({
  options: {
    samples: { type: 'string', default: '128' },
    'seq-len': { type: 'string', default: '512' },
    threads: { type: 'string', default: String(availableParallelism()) },
    rounds: { type: 'string', default: '1' },
    states: { type: 'string' },
  },
  allowPositionals: true,
});
const shared = resolve('../shared');
const model = positionals[0] ?? [`${shared}/models/dense-32m`, 'fixtures/v1.0/v1.0_checkpoint.bin'].find(existsSync);
const texts = ['en-books', 'en-docs', 'zh'].map((name) => `${shared}/text/calibration.${name}.txt`).filter(existsSync);
const calibration = (texts.length > 0 ? texts : ['fixtures/samples.jsonl']).flatMap((path) => ['--calibration', path]);
const python = '.venv/bin/python';
const folder = mkdtempSync(join(tmpdir(), 'bench-ptq-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

/** Runs a child; seconds on the clock, and of all processors. */
function timed(command, args) {
  const begin = performance.now();
  const run = spawnSync('/usr/bin/env', ['time', '-f', 'cpu %U %S', command, ...args], {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  });
  const wall = (performance.now() - begin) / 1e3;
  if (run.status !== 0) throw new Error(`${command} ${args.join(' ')}: ${run.stderr}`);
  const [, user, system] = /cpu ([\d.]+) ([\d.]+)/.exec(run.stderr) ?? [0, NaN, NaN];
  return { wall, cpu: Number(user) + Number(system), stdout: run.stdout };
}

function ours() {
  const out = join(folder, 'out');
  const run = timed(process.execPath, [
    'bin/deepseek-convert.js', 'quantize', model, '-o', out, '--overwrite', '--method', 'gptq', '--device', 'cpu',
    '--samples', options.samples, '--seq-len', options['seq-len'], ...calibration, '--no-validate', '--threads', options.threads,
    ...(options.states ? ['--states', options.states] : []), '--progress', 'none', '--json',
  ]); // prettier-ignore
  const { stages, ...rest } = JSON.parse(run.stdout);
  return { ...run, stages: stages ?? rest.data.stages };
}

const peer = () => {
  const run = timed(python, ['test/bench/ptq-peer.py', model, options.samples, options['seq-len'], options.threads]);
  return { ...run, ...JSON.parse(run.stdout) };
};

const flags = readFileSync('/proc/cpuinfo', 'utf8');
const isa = ['amx_bf16', 'avx512f', 'avx2'].find((name) => flags.includes(name)) ?? 'base';
console.log(`commit ${commit}, ${cpus()[0].model} (${isa}), ${options.threads} threads`);
console.log(`${model}, ${options.samples} x ${options['seq-len']} tokens\n`);
const row = (name, wall, cpu) =>
  console.log(
    `${name.padEnd(44)} ${wall.toFixed(1).padStart(8)} ${cpu === undefined ? '' : cpu.toFixed(1).padStart(8)}`,
  );
console.log(`${''.padEnd(44)}   wall s    CPU s`);
const best = { ours: undefined, peer: undefined };
for (let round = 0; round < Number(options.rounds); round++) {
  const runs = { ours: ours(), ...(existsSync(python) && { peer: peer() }) };
  for (const [name, run] of Object.entries(runs)) if (!best[name] || run.cpu < best[name].cpu) best[name] = run;
}
row('deepseek-convert quantize, file to file', best.ours.wall, best.ours.cpu);
for (const [name, seconds] of Object.entries(best.ours.stages)) row(`  ${name}`, seconds);
if (best.peer) {
  const { stages, torch, dtype } = best.peer;
  const sum = (i) => Object.values(stages).reduce((all, stage) => all + stage[i], 0);
  row(`PyTorch ${torch} loop (${dtype}), without I/O`, sum(0), sum(1));
  for (const [name, [wall, cpu]] of Object.entries(stages)) row(`  ${name}`, wall, cpu);
  console.log(
    `\nPyTorch / ours: wall ${(sum(0) / best.ours.wall).toFixed(2)}, CPU ${(sum(1) / best.ours.cpu).toFixed(2)}`,
  );
} else console.log(`\nno ${python}: ours alone`);
