// How much faster `distill` is on several GPUs than on the first of them alone, at the same windows a step, and whether
// it learns the same. A model for it: python3 test/gpu/make_llama.py OUT 8
//   node build/gpu/test/gpu/data-parallel.js MODEL [cuda:0,cuda:1] [more options of distill]
import { spawn } from 'node:child_process';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { performance } from 'node:perf_hooks';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Random } from './random.js';

const cli = fileURLToPath(new URL('../../src/cli.js', import.meta.url));
/** What the target says of two GPUs. */
const required = 1.8;
/** Sums are made in another order, in bf16. */
const bound = 0.01;
/** 240 windows are trained on, in 15 steps, and 16 judge: both divide by 2, 4 and 8 devices. */
const size = ['--samples', '256', '--seq-len', '2048', '--batch', '16', '--target-params', '50%', '--lr', '1e-4'];

interface Run {
  readonly tokensPerSecond: number;
  readonly losses: readonly number[];
  readonly seconds: number;
}
interface Progress {
  readonly event?: string;
  readonly stage?: string;
  readonly done?: number;
  readonly data?: { readonly tokens?: number };
}
interface Result {
  readonly training: { readonly steps: readonly { readonly loss: number }[] };
  readonly seconds: number;
}

/** Words of letters, about five tokens each at most. */
function text(words: number): string {
  const random = new Random(1);
  const word = () => Array.from({ length: random.integer(2, 8) }, () => String.fromCharCode(random.integer(97, 122)));
  return Array.from({ length: words }, (_, i) => word().join('') + (i % 12 === 11 ? '.\n' : ' ')).join('');
}

async function distill(args: readonly string[]): Promise<Run> {
  const child = spawn(process.execPath, [cli, 'distill', ...args, '--json', '--progress', 'json']);
  // From the second step on: the first one starts libraries and fills caches.
  let [started, ended, tokens] = [0, 0, 0];
  const complaints: string[] = [];
  createInterface({ input: child.stderr }).on('line', (line) => {
    const { stage, done = 0, data }: Progress = line.startsWith('{') ? (JSON.parse(line) as Progress) : {};
    if (stage !== 'distill') complaints.push(line);
    else if (done === 2) started = performance.now();
    else if (done > 2) [ended, tokens] = [performance.now(), tokens + (data?.tokens ?? 0)];
  });
  let stdout = '';
  child.stdout.on('data', (part: Buffer) => (stdout += part.toString()));
  const status = await new Promise((resolve) => child.on('close', resolve));
  if (status !== 0) throw new Error(`distill ${args.join(' ')}: exit ${String(status)}\n${complaints.join('\n')}\n${stdout}`); // prettier-ignore
  const { training, seconds } = JSON.parse(stdout) as Result;
  return { tokensPerSecond: (1000 * tokens) / (ended - started), losses: training.steps.map(({ loss }) => loss), seconds };
} // prettier-ignore

const [model, devices = 'cuda:0,cuda:1', ...more] = process.argv.slice(2);
if (model === undefined) throw new Error('the model to distill is not named');
const folder = mkdtempSync(join(tmpdir(), 'data-parallel-'));
try {
  const words = join(folder, 'words.txt');
  writeFileSync(words, text(600_000));
  const runs: Run[] = [];
  for (const list of [devices.split(',')[0]!, devices]) {
    const out = join(folder, String(runs.length));
    const run = await distill([model, '-o', out, '--devices', list, '--calibration', words, ...size, ...more]);
    rmSync(out, { recursive: true });
    const last = run.losses.at(-1)!;
    console.log(`${list.padEnd(24)} ${run.tokensPerSecond.toFixed(0).padStart(8)} tokens/s  last loss ${last.toPrecision(6)}  ${run.seconds.toFixed(1)} s in all`); // prettier-ignore
    runs.push(run);
  }
  const [one, many] = runs as [Run, Run];
  const apart = Math.max(...one.losses.map((loss, i) => Math.abs(many.losses[i]! / loss - 1)));
  const ratio = many.tokensPerSecond / one.tokensPerSecond;
  console.log(`ratio ${ratio.toFixed(3)} (two GPUs: ${required} required: ${ratio >= required ? 'met' : 'missed'}); losses of ${one.losses.length} steps at most ${apart.toExponential(1)} apart`); // prettier-ignore
  if (!(apart <= bound) || one.losses.length !== many.losses.length) {
    console.log(`FAILED: losses differ by more than ${bound}`);
    process.exitCode = 1;
  }
} finally {
  rmSync(folder, { recursive: true, force: true });
}
