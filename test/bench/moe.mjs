// Dense -> MoE beside its baselines, as whole models: mean KL and perplexity ratio on held-out text.
//   npm run bench:moe [-- MODEL] [--off 25,50] [--experts 64,8] [--seeds 3] [--samples 64] [--seq-len 512] [--windows 78]
//     [--methods static,fitted,cmoe,random] [--device cpu|cuda] [--states f32|bf16] [--distill-tokens 2M [--distill-train full] [--distill-lr x]]
//     [--quick]: one seed, 25% off, 64 experts, less text, static mask and this tool only
// Needs ../shared/text; converts and validates 4 models for each setting and seed, which takes minutes. With
// --distill-tokens it also makes each model distilled, and says what share of the loss is left.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, rmSync } from 'node:fs';
import { availableParallelism, cpus, tmpdir } from 'node:os';
import { join, resolve } from 'node:path';
import { parseArgs } from 'node:util';
import { commit } from './commit.mjs';

const text = { type: 'string' };
const { values: given, positionals } = parseArgs({
  options: {
    ...{ off: text, experts: text, seeds: text, samples: text, 'seq-len': text, windows: text, methods: text },
    ...{ device: text, states: text, threads: text, 'distill-tokens': text, 'distill-train': text, 'distill-lr': text },
    quick: { type: 'boolean' },
  },
  allowPositionals: true,
});
const options = {
  ...{ off: '25,50', experts: '64,8', seeds: '3', samples: '64', 'seq-len': '512', windows: '78' },
  ...{ methods: 'static,fitted,cmoe,random', device: 'cpu', threads: String(availableParallelism()) },
  ...(given.quick && { off: '25', experts: '64', seeds: '1', samples: '32', windows: '15', methods: 'static,fitted' }),
  ...given,
};
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
  const common = ['--device', options.device, '--threads', options.threads, '--progress', 'none', '--json'];
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
function measure(parts, off, seed, args) {
  const active = Math.round(parts * (1 - off / 100)) - 1;
  const out = join(folder, 'out');
  const made = cli([
    'moe', model, '-o', out, '--overwrite', '--container', 'glm4_moe', '--experts', String(parts - 1), '--shared', '1',
    '--active', String(active), '--pad', parts === 8 ? '1' : 'auto', '--samples', options.samples,
    '--seq-len', options['seq-len'], '--seed', String(seed), ...calibration.flatMap((path) => ['--calibration', path]),
    '--no-validate', ...(options.states === undefined ? [] : ['--states', options.states]), ...args,
  ]); // prettier-ignore
  const judged = cli(
    ['validate', model, out, '--samples', options.windows, '--seq-len', '512', '--generations', '0', ...evaluation.flatMap((path) => ['--text', path])],
    [0, 3],
  ); // prettier-ignore
  const { report } = judged.data ?? judged;
  const texts = report.logits.texts;
  const mean = (read) => texts.reduce((sum, text) => sum + read(text), 0) / texts.length;
  return {
    kl: mean(({ kl }) => kl.mean),
    ratio: Math.exp(mean(({ perplexity }) => Math.log(perplexity.ratio))),
    texts: texts.map(({ kl }) => kl.mean),
    seconds: made.took,
  };
}

console.log(
  `commit ${commit}, ${cpus()[0].model}, ${options.threads} threads; ${options.samples} x ${options['seq-len']} tokens`,
);
const average = (runs, read) => runs.reduce((sum, run) => sum + read(run), 0) / runs.length;
const distillation = ['tokens', 'train', 'lr'].flatMap((key) =>
  options[`distill-${key}`] === undefined ? [] : [`--distill-${key}`, options[`distill-${key}`]],
);
const chosen = methods
  .filter(([, args]) => options.methods.split(',').includes(args[1]))
  .flatMap(([name, args]) => [
    [name, args],
    // What cannot have been refitted is a baseline as it stands.
    ...(distillation.length > 0 && args.includes('--refit')
      ? [[`${name}, distilled`, [...args, ...distillation]]]
      : []),
  ]);
let failed = false;
for (const parts of options.experts.split(',').map(Number)) {
  for (const off of options.off.split(',').map(Number)) {
    console.log(
      `\n${parts} parts, ${off}% off: mean KL, perplexity ratio, KL by text (en-books, zh, wikitext-2), seconds`,
    );
    const result = {};
    for (const [name, args] of chosen) {
      const runs = Array.from({ length: Number(options.seeds) }, (_, seed) => measure(parts, off, seed, args));
      const kl = average(runs, (run) => run.kl);
      const texts = runs[0].texts.map((_, i) => average(runs, (run) => run.texts[i]));
      result[name] = kl;
      console.log(
        `${name.padEnd(34)} ${kl.toFixed(4)}  ${average(runs, (run) => run.ratio).toFixed(4)}  ${texts.map((x) => x.toFixed(4)).join(' ')}  ${average(runs, (run) => run.seconds).toFixed(0)} s`,
      );
    }
    // At 8 parts there is no target: the figure is stated.
    const targets = [
      ['this tool', 'static mask, refitted', parts === 8 ? undefined : off === 25 ? 0.8 : 0.75],
      ['this tool', 'CMoE-style', parts === 8 ? undefined : 0.5],
      ['this tool, distilled', 'this tool', off === 25 && parts !== 8 ? 0.5 : undefined],
      ['this tool, distilled', 'static mask, refitted, distilled', undefined],
    ];
    for (const [name, other, bound] of targets) {
      if (result[name] === undefined || result[other] === undefined) continue;
      const share = result[name] / result[other];
      const holds = bound === undefined || share <= bound;
      failed ||= !holds;
      const verdict = bound === undefined ? 'stated' : holds ? 'holds' : 'FAILS';
      console.log(
        `${verdict}: ${name} ${share.toFixed(3)} x ${other}${bound === undefined ? '' : ` (at most ${bound})`}`,
      );
    }
  }
}
process.exitCode = failed ? 1 : 0;
