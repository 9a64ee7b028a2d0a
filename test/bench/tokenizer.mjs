// `tokenizer train` beside the Hugging Face tokenizers library on the same 20 MB of text, in turns: seconds, and whether
// the merges are the same. The text is ../shared/text in the order of names, from the beginning again until it is full.
//   npm run bench:tokenizer [-- --bytes 20000000] [--vocab-size 32000] [--rounds 1] [--pre-tokenizer gpt2,llama3,deepseek-v3]
import { execFileSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';

const { values: options } = parseArgs({
  options: {
    bytes: { type: 'string', default: '20000000' },
    'vocab-size': { type: 'string', default: '32000' },
    rounds: { type: 'string', default: '1' },
    'pre-tokenizer': { type: 'string', default: 'gpt2,llama3,deepseek-v3' },
  },
});
const folder = mkdtempSync(join(tmpdir(), 'bench-tokenizer-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

const shared = resolve('../shared/text');
const parts = readdirSync(shared).sort().map((name) => readFileSync(join(shared, name))); // prettier-ignore
const whole = Buffer.concat(parts);
const size = Number(options.bytes);
const full = Buffer.concat(Array.from({ length: Math.ceil(size / whole.length) }, () => whole)).subarray(0, size);
const text = join(folder, 'text.txt');
writeFileSync(text, full.subarray(0, full.lastIndexOf(10) + 1));
console.log(`${cpus()[0].model.trim()}, ${availableParallelism()} cores; ${size / 1e6} MB: ${parts.length} files of ${(whole.length / 1e6).toFixed(2)} MB together, ${(size / whole.length).toFixed(2)} times; ${options['vocab-size']} tokens`); // prettier-ignore

const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
for (const name of options['pre-tokenizer'].split(',')) {
  const [ours, theirs] = [[], []];
  let [same, cpu] = [true, 0];
  for (let round = 0; round < Number(options.rounds); round++) {
    const out = join(folder, `${name}-${round}`);
    const args = ['bin/deepseek-convert.js', 'tokenizer', 'train', text, '-o', out, '--vocab-size', options['vocab-size'], '--pre-tokenizer', name, '--json', '--quiet']; // prettier-ignore
    // All of the command: reading, checking and writing too. Of the library: train() alone.
    ours.push(JSON.parse(execFileSync(process.execPath, args, { encoding: 'utf8' })).seconds);
    const { merges } = JSON.parse(readFileSync(join(out, 'tokenizer.json'), 'utf8')).model;
    const hash = createHash('sha256').update(merges.map((merge) => merge.join(' ')).join('\n')).digest('hex'); // prettier-ignore
    const made = JSON.parse(execFileSync('.venv/bin/python', ['test/bench/tokenizer.py', text, join(out, 'tokenizer.json')], { encoding: 'utf8' })); // prettier-ignore
    theirs.push(made.seconds);
    cpu = made.cpu;
    same &&= made.merges === hash;
  }
  const [a, b] = [median(ours), median(theirs)];
  console.log(`${name}: ours ${a.toFixed(2)} s, library ${b.toFixed(2)} s (${cpu.toFixed(1)} s of all cores), ratio ${(a / b).toFixed(3)}; merges ${same ? 'the same' : 'DIFFER'}`); // prettier-ignore
  if (!same) process.exitCode = 1;
}
