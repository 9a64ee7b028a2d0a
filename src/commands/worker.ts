import { custom, Expected } from '../base/options.js';
import { duration } from '../base/text.js';
import { deviceOptions, openEnvironment } from './shared.js';
import { deviceOf, plannedJob, workFolder } from './shards.js';
import { defineCommand } from './types.js';

const options = {
  shard: custom({ required: true, help: 'Which shard, counted from 0, of how many: 0/4.' }, 'i/n', (given) => {
    const [, shard, of] = /^(\d{1,6})\/(\d{1,6})$/.exec(given) ?? [];
    if (shard === undefined || Number(shard) >= Number(of)) throw new Expected('0/n, 1/n ... n-1/n');
    return { shard: Number(shard), of: Number(of) };
  }),
  ...deviceOptions,
} as const;

export const command = defineCommand({
  name: 'worker',
  description:
    'Solves the blocks of one shard of a plan, into the folder of the plan. Each block is durable: the same command goes on\n' +
    'after the last one, and does nothing where the shard is done. One worker at a time has a shard. --device auto is the\n' +
    'kind of device that plan had.',
  arguments: { workFolder },
  options,
  examples: [
    ['worker out/sharded.part --shard 0/2', 'The first shard.'],
    ['worker out/sharded.part --shard 1/2', 'The second, at the same time or later.'],
  ],
  async run(given, io) {
    const { plan, job } = await plannedJob(given.workFolder, io);
    const { runShard } = await import('../quant/shards/worker.js');
    using env = await openEnvironment(deviceOf(given, plan), io);
    const { folder, blocks, reports, before, resumed, seconds } = await runShard(plan, given.shard, job, env);
    const linears = reports.flatMap((report) => report.linears);
    const [first, last] = blocks;
    const { shard, of } = given.shard;
    const lines = [
      io.paint.bold(folder),
      `shard ${shard} of ${of}, blocks ${first} to ${last}: ${linears.length} linears${before ? ', done before' : ''}; ${duration(seconds)}`,
    ];
    return {
      data: { folder, shard, shards: of, blocks, linears, before, resumed, seconds },
      text: `${lines.join('\n')}\n`,
    };
  },
});
