import { acceptance, acceptanceOptions } from './acceptance.js';
import { recordConversion } from './history-file.js';
import { report } from './quantize.js';
import { deviceOptions, openEnvironment, outputOptions } from './shared.js';
import { deviceOf, plannedJob, workFolder } from './shards.js';
import { defineCommand } from './types.js';

const options = {
  overwrite: outputOptions.overwrite,
  ...acceptanceOptions,
  ...deviceOptions,
} as const;

export const command = defineCommand({
  name: 'merge',
  description:
    'Puts the shards of a plan together, reads the result back, compares, validates it as quantize does, and gives it its\n' +
    'name: that of the folder, without .part. Refuses while shards are missing. Interrupted, the same command goes on.',
  arguments: { workFolder },
  options,
  examples: [['merge out/sharded.part', 'Makes out/sharded, once all shards are done.']],
  async run(given, io) {
    const { plan, values, job } = await plannedJob(given.workFolder, io);
    const { mergeShards } = await import('../quant/shards/merge.js');
    using env = await openEnvironment(deviceOf(given, plan), io);
    const { input, config, seed, rotate } = values;
    const { accept, extend } = acceptance({ ...given, input, config, seed, rotate, out: plan.out }, io, env);
    const { overwrite } = given;
    const result = await mergeShards(plan, { ...job, overwrite, ...(accept && { accept }) }, env);
    await recordConversion(plan.out, io);
    return extend(report(result, io));
  },
});
