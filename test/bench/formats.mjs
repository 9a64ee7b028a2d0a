// `quantize --format` with four formats at once beside one of them, in turns: at most 1.3 times the time.
//   npm run bench:formats [-- MODEL] [--samples 128] [--seq-len 512] [--rounds 3]
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { parseArgs } from 'node:util';

const { values: options, positionals } = parseArgs({
  options: {
    samples: { type: 'string', default: '128' },
    'seq-len': { type: 'string', default: '512' },
    rounds: { type: 'string', default: '3' },
  },
  allowPositionals: true,
});
const model = positionals[0] ?? ['../shared/models/dense-32m', 'fixtures/v1.0/v1.0_checkpoint.bin'].find(existsSync);
const folder = mkdtempSync(join(tmpdir(), 'bench-formats-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));
const four = ['compressed-tensors', 'gptq', 'awq', 'onnx'];
const bound = 1.3;

/** Seconds on the clock, and of all processors: the latter say the same on a busy machine. */
function quantize(formats) {
  const args = ['--format', formats.join(), '--samples', options.samples, '--seq-len', options['seq-len']];
  const command = ['node', 'bin/deepseek-convert.js', 'quantize', model, '-o', join(folder, 'out'), ...args, '--overwrite', '--no-validate']; // prettier-ignore
  const begin = performance.now();
  const script = '"$@" >/dev/null 2>"$0"; code=$?; times; exit $code';
  const run = spawnSync('bash', ['-c', script, join(folder, 'log'), ...command], { encoding: 'utf8' });
  const wall = (performance.now() - begin) / 1e3;
  if (run.status !== 0) throw new Error(`${command.join(' ')} failed with ${run.status}`);
  const [user, system] = [...run.stdout.trim().split('\n')[1].matchAll(/(\d+)m([\d.]+)s/g)].map(([, m, s]) => 60 * m + Number(s)); // prettier-ignore
  return { wall, cpu: user + system };
}

const median = (values) => values.toSorted((a, b) => a - b)[Math.floor(values.length / 2)];
const rounds = [];
for (let round = 0; round < Number(options.rounds); round++) {
  const [one, all] = [quantize(four.slice(0, 1)), quantize(four)];
  rounds.push({ cpu: all.cpu / one.cpu, wall: all.wall / one.wall });
  console.log(
    `${four[0]}: ${one.wall.toFixed(1)} s, ${one.cpu.toFixed(1)} CPU s; four: ${all.wall.toFixed(1)} s, ${all.cpu.toFixed(1)} CPU s`,
  );
}
const [cpu, wall] = ['cpu', 'wall'].map((key) => median(rounds.map((round) => round[key])));
console.log(`${model}, ${four.join(', ')}: ${cpu.toFixed(2)} times the CPU time of one, ${wall.toFixed(2)} times the clock (at most ${bound})`); // prettier-ignore
if (cpu > bound) process.exitCode = 1;
