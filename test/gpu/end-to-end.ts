// Whole jobs on CUDA beside the CPU, through the command line: quantize and moe of the fixtures. Rounding alone gives
// the same model. Error feedback carries every tie that falls the other way on to the columns behind it, so there what
// must agree is how good the solutions are: the output error of each linear, the divergence of the whole.
import { spawnSync } from 'node:child_process';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { performance } from 'node:perf_hooks';
import { fileURLToPath } from 'node:url';

const cli = fileURLToPath(new URL('../../src/cli.js', import.meta.url));
const fixtures = resolve('fixtures');
const dense = join(fixtures, 'v1.0/v1.0_checkpoint.bin');
const text = ['--samples', '32', '--seq-len', '256'];

interface Case {
  readonly name: string;
  readonly input: string;
  readonly args: readonly string[];
  /** Largest KL (CPU's output || CUDA's output), as a share of KL (input || CPU's output). */
  readonly apart: number;
  /** Largest relative difference of KL (input || output). */
  readonly quality: number;
  /** Largest relative difference of the linears' output errors, on average and at worst. */
  readonly errors?: readonly [number, number];
}
const cases: readonly Case[] = [
  { name: 'round dense', input: dense, args: ['quantize', dense, '--method', 'rtn'], apart: 1e-3, quality: 2e-3, errors: [1e-3, 1e-2] },
  { name: 'quantize dense', input: dense, args: ['quantize', dense, ...text], apart: 1, quality: 0.1, errors: [0.02, 0.15] },
  { name: 'quantize dense, g32 asymmetric', input: dense, args: ['quantize', dense, '--asym', '--group-size', '32', ...text], apart: 1, quality: 0.1, errors: [0.02, 0.15] },
  { name: 'quantize moe', input: join(fixtures, 'moe-6m'), args: ['quantize', join(fixtures, 'moe-6m'), ...text], apart: 1, quality: 0.2, errors: [0.03, 0.3] },
  { name: 'moe of dense, 6 of 8', input: dense, args: ['moe', dense, '--experts', '8', '--active', '6', ...text], apart: 1, quality: 0.1 },
]; // prettier-ignore

interface Quantized {
  readonly linears?: readonly { readonly name: string; readonly error: number }[];
}
interface Validated {
  readonly report: { readonly logits: { readonly kl: { readonly mean: number } } };
}

function run(args: readonly string[]): { seconds: number; stdout: string; status: number | null; stderr: string } {
  const started = performance.now();
  const done = spawnSync(process.execPath, [cli, ...args, '--progress', 'none'], { encoding: 'utf8', maxBuffer: 1 << 28 });
  return { seconds: (performance.now() - started) / 1e3, stdout: done.stdout, status: done.status, stderr: done.stderr };
} // prettier-ignore

function divergence(reference: string, candidate: string): number {
  const done = run(['validate', reference, candidate, '--device', 'cpu', '--json', '--samples', '16']);
  if (done.status !== 0 && done.status !== 3) throw new Error(done.stderr);
  return (JSON.parse(done.stdout) as Validated).report.logits.kl.mean;
}

/** Relative difference of the linears' output errors from the first device to the second: on average, at worst. */
function differences([a, b]: readonly Quantized[]): [number, number] {
  const ratios = (a?.linears ?? []).map(({ name, error }) => {
    const other = b?.linears?.find((linear) => linear.name === name);
    if (!other) throw new Error(`${name} is missing in one of the reports`);
    return error === 0 && other.error === 0 ? 0 : other.error / error - 1;
  });
  if (ratios.length === 0) throw new Error('a report names no linears');
  return [ratios.reduce((x, y) => x + y, 0) / ratios.length, Math.max(...ratios.map(Math.abs))];
}

/** Prints a table; `devices` are those compared: cpu and cuda. */
export function endToEnd(devices: readonly [string, string], filter: string): { passed: number; failed: number } {
  const folder = mkdtempSync(join(tmpdir(), 'deepseek-convert-gpu-'));
  const count = { passed: 0, failed: 0 };
  console.log(
    `\n${'whole jobs'.padEnd(34)} ${'KL, cpu'.padStart(9)} ${'KL, cuda'.padStart(9)} ${'apart'.padStart(9)} ${'errors'.padStart(9)} ${'worst'.padStart(9)}  s cpu  s cuda`,
  );
  try {
    for (const [i, c] of cases.entries()) {
      if (!c.name.includes(filter)) continue;
      const outputs = devices.map((device) => join(folder, `${i}-${device}`));
      const jobs = devices.map((device, d) =>
        run([...c.args, '-o', outputs[d]!, '--device', device, '--no-validate', '--states', 'f32', '--json']),
      );
      const broken = jobs.find((job) => job.status !== 0);
      if (broken) {
        count.failed++;
        console.log(`FAILED ${c.name}: exit ${broken.status}\n${broken.stderr}`);
        continue;
      }
      const [cpu, cuda] = outputs.map((output) => divergence(c.input, output)) as [number, number];
      const apart = divergence(outputs[0]!, outputs[1]!);
      const [mean, worst] = c.errors ? differences(jobs.map(({ stdout }) => JSON.parse(stdout) as Quantized)) : [0, 0];
      const good =
        Math.abs(cuda / cpu - 1) <= c.quality &&
        apart <= c.apart * cpu &&
        (!c.errors || (Math.abs(mean) <= c.errors[0] && worst <= c.errors[1]));
      count[good ? 'passed' : 'failed']++;
      const numbers = [cpu, cuda, apart, mean, worst].map((x) => x.toFixed(5).padStart(9)).join(' ');
      console.log(`${c.name.padEnd(34)} ${numbers} ${jobs.map((job) => job.seconds.toFixed(1).padStart(6)).join('  ')}${good ? '' : '  FAILED'}`); // prettier-ignore
    }
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
  return count;
}
