import { resolve } from 'node:path';
import { integer } from '../base/options.js';
import { duration, shellQuote } from '../base/text.js';
import { quantizeJob, quantizeOptions, showPlan } from './quantize.js';
import { input, openEnvironment } from './shared.js';
import { fixedOptions, mergeFlags } from './shards.js';
import { defineCommand } from './types.js';

const options = {
  shards: integer({ min: 1, max: 100_000, required: true, help: 'Ranges of blocks, of about equal work: at most as many as the model has blocks.' }), // prettier-ignore
  ...quantizeOptions,
} as const;

export const command = defineCommand({
  name: 'plan',
  description:
    'Fixes options and calibration tokens of a quantization and stores the hidden states with which each shard begins; then\n' +
    'workers solve the shards, on this machine or others that see the same files, and merge puts them together.\n' +
    'It takes the options of quantize and implies --independent-blocks. See docs/batch.md.',
  arguments: { input },
  options,
  examples: [
    ['plan fixtures/v1.0/v1.0_checkpoint.bin -o out/sharded --shards 2 --samples 16 --seq-len 128', 'Two shards; prints the commands to go on with.'],
  ], // prettier-ignore
  async run(given, io) {
    const values = { ...given, independentBlocks: true };
    const job = await quantizeJob(values, io);
    const { shards } = given;
    if (given.dryRun) {
      const { previewQuantize } = await import('../quant/prepare.js');
      const { shardRanges } = await import('../quant/shards/ranges.js');
      const preview = await previewQuantize(job);
      const ranges = shardRanges(preview.model, shards).map(({ from, to }) => to - from);
      const { data, text } = await showPlan(preview, job, values, io);
      return { data: { ...data, shards: ranges }, text: `${text}${shards} shards of ${ranges.join(', ')} blocks\n` };
    }
    const { planShards } = await import('../quant/shards/plan.js');
    using env = await openEnvironment(given, io);
    const absolute = { ...values, input: resolve(given.input), config: given.config && resolve(given.config) };
    const made = await planShards({ options: job, shards, given: fixedOptions(absolute) }, env);
    const workers = made.shards.map((shard) => ({ ...shard, argv: ['worker', made.folder, '--shard', `${shard.shard}/${shards}`] })); // prettier-ignore
    const merge = { argv: ['merge', made.folder, ...mergeFlags(given, io.settings.from)] };
    const line = (argv: readonly string[]): string => ['deepseek-convert', ...argv].map(shellQuote).join(' ');
    const left = workers.filter(({ done }) => !done);
    const lines = [
      io.paint.bold(made.folder),
      `${shards} shards${left.length < shards ? `, ${shards - left.length} of them done` : ''}; ${duration(made.seconds)}`,
      ...(left.length > 0
        ? ['', 'Wherever these files are, in any order:', ...left.map(({ argv }) => line(argv))]
        : []),
      '',
      left.length > 0 ? 'Then:' : 'Now:',
      line(merge.argv),
    ];
    const { out, folder, calibration, notices, seconds } = made;
    return {
      data: { out, workFolder: folder, shards, workers, merge, calibration: calibration ?? null, notices, seconds },
      text: `${lines.join('\n')}\n`,
    };
  },
});
