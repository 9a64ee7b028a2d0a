// Dense -> MoE beside its baselines, as whole models: mean KL and perplexity ratio on held-out text.
//   npm run bench:moe [-- MODEL] [--off 25,50] [--experts 64,8] [--seeds 3] [--samples 64] [--seq-len 512] [--windows 78] [--methods static,fitted,cmoe,random]
// Needs ../shared/text; converts and validates 4 models for each setting and seed, which takes minutes.
import { spawnSync, execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';

const { values: options, positionals } = parseArgs({
  options: {
    off: { type: 'string', default: '25,50' },
    experts: { type: 'string', default: '64,8' },
    seeds: { type: 'string', default: '3' },
    samples: { type: 'string', default: '64' },
    'seq-len': { type: 'string', default: '512' },
    windows: { type: 'string', default: '78' },
    methods: { type: 'string', default: 'static,fitted,cmoe,random' },
    threads: { type: 'string', default: String(availableParallelism()) },
  },
  allowPositionals: true,
});
const shared = resolve('../shared');
const model = positionals[0] ?? `${shared}/models/dense-32m`;
const calibration = ['en-books', 'en-docs', 'zh'].map((name) => `${shared}/text/calibration.${name}.txt`);
const evaluation = ['en-books', 'zh', 'wikitext2-raw-test'].map((name) => `${shared}/text/eval.${name}.txt`);
for (const path of [model, ...calibration, ...evaluation])
  if (!existsSync(path)) throw new Error(`${path} is not there`);
const folder = mkdtempSync(join(tmpdir(), 'bench-moe-'));
process.on('exit', () => rmSync(folder, { recursive: true, force: true }));

function cli(args, codes = [0]) {
  const begin = performance.now();
  const common = ['--device', 'cpu', '--threads', options.threads, '--progress', 'none', '--json'];
  const run = spawnSync(process.execPath, ['bin/deepseek-convert.js', ...args, ...common], {
    encoding: 'utf8',
    maxBuffer: 2 ** 28,
  });
  if (!codes.includes(run.status)) throw new Error(`${args.join(' ')}: ${run.stdout}${run.stderr}`);
  return { ...JSON.parse(run.stdout), took: (performance.now() - begin) / 1e3 };
}

// The static mask is refitted as the method is, with the penalty that judges best; CMoE has no refit.
const methods = [
  ['static mask, refitted', ['--split', 'static', '--refit']],
  ['this tool', ['--split', 'fitted', '--refit']],
  ['CMoE-style', ['--split', 'cmoe', '--no-refit']],
  ['random parts, ridge, refitted', ['--split', 'random', '--refit']],
];

/** Parts are experts and one shared one; the number that is on leaves `off` percent of the neurons out. */
function measure(parts, off, seed, [name, args]) {
  const active = Math.round(parts * (1 - off / 100)) - 1;
  const out = join(folder, 'out');
  const made = cli([
    'moe', model, '-o', out, '--overwrite', '--container', 'glm4_moe', '--experts', String(parts - 1), '--shared', '1',
    '--active', String(active), '--pad', parts === 8 ? '1' : 'auto', '--samples', options.samples,
    '--seq-len', options['seq-len'], '--seed', String(seed), ...calibration.flatMap((path) => ['--calibration', path]),
    '--no-validate', ...args,
  ]); // prettier-ignore
  const judged = cli(
    ['validate', model, out, '--samples', options.windows, '--seq-len', '512', '--generations', '0', ...evaluation.flatMap((path) => ['--text', path])],
    [0, 3],
  ); // prettier-ignore
  const { report } = judged.data ?? judged;
  const texts = report.logits.texts;
  const mean = (read) => texts.reduce((sum, text) => sum + read(text), 0) / texts.length;
  return {
    name,
    kl: mean(({ kl }) => kl.mean),
    ratio: Math.exp(mean(({ perplexity }) => Math.log(perplexity.ratio))),
    texts: texts.map(({ kl }) => kl.mean),
    seconds: made.took,
  };
}

const commit = execFileSync('git', ['rev-parse', '--short', 'HEAD'], { encoding: 'utf8' }).trim();
console.log(
  `commit ${commit}, ${cpus()[0].model}, ${options.threads} threads; ${options.samples} x ${options['seq-len']} tokens`,
);
const average = (runs, read) => runs.reduce((sum, run) => sum + read(run), 0) / runs.length;
let failed = false;
for (const parts of options.experts.split(',').map(Number)) {
  for (const off of options.off.split(',').map(Number)) {
    console.log(
      `\n${parts} parts, ${off}% off: mean KL, perplexity ratio, KL by text (en-books, zh, wikitext-2), seconds`,
    );
    const result = {};
    for (const method of methods.filter(([, args]) => options.methods.split(',').includes(args[1]))) {
      const runs = Array.from({ length: Number(options.seeds) }, (_, seed) => measure(parts, off, seed, method));
      const kl = average(runs, (run) => run.kl);
      const texts = runs[0].texts.map((_, i) => average(runs, (run) => run.texts[i]));
      result[method[0]] = { kl, texts };
      console.log(
        `${method[0].padEnd(30)} ${kl.toFixed(4)}  ${average(runs, (run) => run.ratio).toFixed(4)}  ${texts.map((x) => x.toFixed(4)).join(' ')}  ${average(runs, (run) => run.seconds).toFixed(0)} s`,
      );
    }
    const own = result['this tool']?.kl;
    if (own === undefined) continue;
    const targets =
      parts === 8
        ? []
        : [
            ['static mask, refitted', off === 25 ? 0.8 : 0.75],
            ['this tool', ['--split', 'fitted', '--refit']],
            ['CMoE-style', 0.5],
          ];
    for (const [name, bound] of targets) {
      if (!result[name]) continue;
      const share = own / result[name].kl;
      failed ||= !(share <= bound);
      console.log(`${share <= bound ? 'holds' : 'FAILS'}: ${share.toFixed(3)} x ${name} (at most ${bound})`);
    }
    if (parts === 8 && result['static mask, refitted'])
      console.log(
        `${(own / result['static mask, refitted'].kl).toFixed(3)} x static mask, refitted (stated, no target)`,
      );
  }
}
process.exitCode = failed ? 1 : 0;
