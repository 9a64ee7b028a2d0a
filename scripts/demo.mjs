// npm run demo: a trained dense model in one PyTorch file becomes a MoE, the MoE becomes INT4, and both are validated,
// on the CPU. Everything is made in build/demo; the numbers at the end are read from what the commands report.
import { spawn } from 'node:child_process';
import { mkdirSync, rmSync } from 'node:fs';
import { dirname, join, relative } from 'node:path';
import { fileURLToPath } from 'node:url';

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const out = join(root, 'build/demo');
const bin = join(root, 'bin/deepseek-convert.js');
const path = (...names) => relative(root, join(...names));
const v1 = path(root, 'fixtures/v1.0/v1.0_checkpoint.bin');
const v2 = path(out, 'v2.0_converted.bin');
const v3 = path(out, 'v3.0-int4');
const started = performance.now();

/** Runs a command, its progress shown as it comes; gives the object that --json prints. Exit code 3 is a result too. */
function run(title, ...args) {
  console.log(`\n## ${title}\n$ deepseek-convert ${args.join(' ')}`);
  return new Promise((resolve, reject) => {
    const began = performance.now();
    const child = spawn(process.execPath, [bin, ...args, '--json'], {
      cwd: root,
      stdio: ['ignore', 'pipe', 'inherit'],
    });
    let stdout = '';
    child.stdout.setEncoding('utf8').on('data', (text) => (stdout += text));
    child.on('error', reject);
    child.on('close', (code) => {
      const result = stdout === '' ? {} : JSON.parse(stdout);
      if (code !== 0 && code !== 3) return reject(new Error(`exit code ${code}: ${result.error?.message ?? stdout}`));
      resolve({ ...result, code, seconds: (performance.now() - began) / 1000 });
    });
  });
}

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
const cpu = ['--device', 'cpu'];
const calibration = ['--samples', '32', '--seq-len', '256'];
const compare = ['--samples', '8', '--seq-len', '256', '--generations', '4', '--new-tokens', '32'];

const before = await run('What it is', 'inspect', v1);
const moe = await run('Dense to MoE: 8 experts, 4 active', '--input-model', v1, '--output-model', v2,
  '--target-arch', 'moe', '--expert-num', '8', '--active', '4', ...calibration, ...cpu); // prettier-ignore
const int4 = await run('MoE to INT4', 'quantize', v2, '-o', v3, ...calibration, ...cpu);
const after = await run('What became of it', 'inspect', v3);
const gate = await run('INT4 against the MoE that it was made of', 'validate', v2, v3, ...compare, ...cpu,
  '--report', path(out, 'report.html')); // prettier-ignore
const whole = await run(
  'INT4 MoE against the dense model',
  'validate',
  v1,
  v3,
  ...compare,
  '--generations',
  '0',
  ...cpu,
);
const prompt = 'The old man looked at the sea and';
const speech = await Promise.all(
  [v1, v3].map((model) =>
    run('The two speak', 'generate', model, '--prompt', prompt, '--max-new-tokens', '24', '--temperature', '0.7', '-q', ...cpu),
  ),
); // prettier-ignore

const size = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const millions = (n) => `${(n / 1e6).toFixed(2)} M`;
const of = (files) => files.reduce((n, file) => n + file.bytes, 0);
const logits = ({ report }) => report.logits;
const rows = [
  ['', 'v1.0, dense', 'v3.0, MoE INT4'],
  ['on disk', size(of(before.files)), size(of(after.files))],
  ['parameters', millions(before.parameters.total), millions(after.parameters.total)],
  ['active a token', millions(before.parameters.active), millions(after.parameters.active)],
  ['perplexity', ...['reference', 'candidate'].map((side) => logits(whole).perplexity[side].toFixed(2))],
];
const width = (c) => Math.max(...rows.map((row) => row[c].length));
console.log(`\n## Summary, ${((performance.now() - started) / 1000).toFixed(0)} s in all\n`);
for (const row of rows) console.log(row.map((cell, c) => (c === 0 ? cell.padEnd(width(c)) : cell.padStart(width(c)))).join('  ')); // prettier-ignore
const verdict = ({ report }) => (report.passed ? 'passed' : `FAILED: ${report.gates.filter((g) => g.status === 'fail').map((g) => g.metric).join(', ')}`); // prettier-ignore
console.log(`
INT4 against its MoE:   ${verdict(gate)}; KL ${logits(gate).kl.mean.toFixed(4)}, perplexity x ${logits(gate).perplexity.ratio.toFixed(4)}, same first choice ${(logits(gate).top1 * 100).toFixed(1)}%
INT4 MoE against dense: ${verdict(whole)}; KL ${logits(whole).kl.mean.toFixed(4)}, perplexity x ${logits(whole).perplexity.ratio.toFixed(4)}, same first choice ${(logits(whole).top1 * 100).toFixed(1)}%
${int4.totals.quantized} linears at ${int4.totals.bitsPerWeight.toFixed(2)} bits; MoE ${moe.seconds.toFixed(0)} s, INT4 ${int4.seconds.toFixed(0)} s, validation ${(gate.seconds + whole.seconds).toFixed(0)} s

v1.0: ${prompt}${speech[0].generations[0].text.replaceAll('\n', ' ')}
v3.0: ${prompt}${speech[1].generations[0].text.replaceAll('\n', ' ')}

The models and the report are in ${path(out)}.`);
if (gate.code !== 0) process.exitCode = gate.code;
