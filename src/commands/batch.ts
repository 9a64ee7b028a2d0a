import { existsSync, readdirSync, rmSync } from 'node:fs';
import { basename, join, parse, relative, resolve } from 'node:path';
import { fileURLToPath } from 'node:url';
import { badInput, noResource } from '../base/errors.js';
import { formatBytes } from '../base/files.js';
import { choice, environmentName, flag, integer, text } from '../base/options.js';
import { columns, duration, shellQuote } from '../base/text.js';
import type { JobCommands } from '../batch/types.js';
import type { BatchPlan } from '../batch/plan.js';
import type { BatchReport } from '../batch/run.js';
import { checkCluster, clusterFailure, clusterOptions, runCluster, submissionsOf } from './batch-slurm.js';
import { commonOptions } from './shared.js';
import { defineCommand, type Command, type CommandResult, type Io } from './types.js';

/** What jobs may run; a batch inside a batch or a report for people makes no sense there. */
const runnable = [
  'inspect',
  'convert',
  'quantize',
  'qat',
  'distill',
  'moe',
  'validate',
  'compare',
  'score',
  'generate',
];
/** What the batch decides for all its jobs; --reporter is nothing where the result is read by the batch. */
const decided = ['dryRun', 'restart', 'reporter'];
/** Options of commands whose values are paths that they write. */
const writing = ['out', 'report', 'reportJson', 'reportMd', 'trainingReport'];

const options = {
  parallel: integer({
    min: 1,
    max: 256,
    defaultNote: 'one for each GPU, else 1',
    help: 'Jobs at a time; each gets a GPU, or its share of the CPU’s threads.',
  }),
  keepGoing: flag({ help: 'Go on with jobs that need none of those that failed.' }),
  retries: integer({ min: 0, max: 100, default: 1, help: 'How often a job that crashed or lacked resources is tried again.' }), // prettier-ignore
  dryRun: flag({ help: 'Check the file and show order, devices, sizes, disk and time; read headers only.' }),
  outputRoot: text({ default: '.', value: 'folder', help: 'Jobs may write below this folder only.' }),
  work: text({ value: 'folder', defaultNote: '<name of the file>.batch in the output root', help: 'Where state, logs, results and events are kept.' }), // prettier-ignore
  reporter: choice(['text', 'github', 'junit'], { default: 'text', help: 'What stdout gets: a table, annotations of GitHub Actions, or JUnit XML.' }), // prettier-ignore
  ...clusterOptions,
  emit: choice(['k8s'], { section: 'Cluster:', help: 'Run nothing: write the jobs as Kubernetes Jobs, and the script that applies them.' }), // prettier-ignore
  emitTo: text({ value: 'folder', section: 'Cluster:', defaultNote: '<name of the file>.k8s in the output root', help: 'Where --emit writes.' }), // prettier-ignore
  metricsFile: text({ value: 'file.prom', section: 'Metrics:', help: 'Keep metrics in this file, for node_exporter’s textfile collector.' }), // prettier-ignore
  metricsPort: integer({ min: 0, max: 65535, section: 'Metrics:', help: 'Serve /metrics to Prometheus; 0: a free port.' }), // prettier-ignore
  metricsHost: text({ default: '127.0.0.1', value: 'address', section: 'Metrics:', help: 'Where /metrics is served; 0.0.0.0 for all, unprotected.' }), // prettier-ignore
} as const;

type Registry = Readonly<Record<string, { readonly load: () => Promise<{ readonly command: Command }> }>>;

/** The tables of the commands that jobs may run, for the floor below. */
export async function jobCommands(registry: Registry): Promise<JobCommands> {
  const entries = runnable.map(async (name) => {
    const { command } = await registry[name]!.load();
    const kept = Object.entries(command.options).filter(([key]) => !decided.includes(key));
    const table = Object.fromEntries(kept);
    const writes = writing.filter((key) => key in table);
    return [name, { arguments: command.arguments, options: table, writes, dryRun: 'dryRun' in command.options, inShards: name === 'quantize' }] as const; // prettier-ignore
  });
  return Object.fromEntries(await Promise.all(entries));
}

export const batch = (registry: Registry): Command =>
  defineCommand({
    name: 'batch',
    description:
      'The file is checked whole before anything starts. Each job is a process of its own; finished jobs, and finished\n' +
      'blocks of others, are kept: the same command does only what is missing or failed. See docs/batch.md.',
    arguments: { file: text({ required: true, value: 'jobs.yaml', help: 'Jobs: a list, or models x recipes.' }) },
    options,
    examples: [
      ['batch fixtures/batch/jobs.yaml --dry-run', 'What would be done.'],
      ['batch fixtures/batch/jobs.yaml --keep-going --parallel 2', 'Two jobs at a time.'],
      ['batch fixtures/batch/slurm.yaml --executor slurm --dry-run', 'What Slurm would be given.'],
    ],
    async run(given, io) {
      checkCluster(given);
      const { readJobs } = await import('../batch/file.js');
      const commands = await jobCommands(registry);
      const environment = workerEnvironment();
      const workFolder = given.work ?? join(given.outputRoot, `${parse(given.file).name}.batch`);
      const { outputRoot } = given;
      if (!existsSync(outputRoot)) throw badInput('The folder for outputs does not exist', { where: outputRoot, hint: `mkdir -p ${outputRoot}` }); // prettier-ignore
      const jobs = await readJobs(given.file, { commands, environment, outputRoot, workFolder });
      if (given.emit !== undefined) {
        const { name } = parse(given.file);
        const folder = given.emitTo ?? join(outputRoot, `${name}.k8s`);
        const merge = (await registry.merge!.load()).command;
        const { kubernetesFiles } = await import('../batch/kubernetes.js');
        return writeManifests(folder, kubernetesFiles({ jobs, name, retries: given.retries, mergeKeys: Object.keys(merge.options) })); // prettier-ignore
      }
      const gpus = await countGpus();
      const parallel = given.parallel ?? Math.max(1, gpus);
      const program = fileURLToPath(new URL('../../bin/deepseek-convert.js', import.meta.url));
      const common = { jobs, program, environment, parallel, gpus };
      if (given.dryRun) {
        const { planBatch } = await import('../batch/plan.js');
        const { BatchState } = await import('../batch/state.js');
        const records = await BatchState.read(workFolder);
        const plan = await planBatch({ ...common, commands, records, folder: outputRoot }, io.log, io.signal);
        const slurm = given.executor === 'slurm' ? await submissionsOf(jobs, resolve(workFolder)) : undefined;
        return showPlan(plan, slurm, io);
      }
      const { failureOf, runBatch } = await import('../batch/run.js');
      const { keepGoing, retries, metricsFile, metricsHost: host, metricsPort: port } = given;
      const metricsAddress = port === undefined ? undefined : { host, port };
      const options = { ...common, workFolder, keepGoing, retries, metricsFile, metricsAddress };
      const elsewhere = given.executor === 'slurm' || given.status || given.cancel;
      if (!elsewhere) await (await import('../batch/slurm.js')).takeBackFromSlurm(options);
      const report = await (elsewhere ? runCluster(given, options, io) : runBatch(options, io.log, io.signal));
      const failure = elsewhere ? await clusterFailure(report, given) : failureOf(report);
      return {
        data: { file: given.file, ...report },
        text: await textOf(report, given.reporter, basename(given.file), io),
        ...(failure && { failure }),
      };
    },
  });

/** Earlier steps of the same batch go: a shorter batch must not leave one to be applied. */
async function writeManifests(folder: string, files: ReadonlyMap<string, string>): Promise<CommandResult> {
  const { makeFolder, writeFileAtomic } = await import('../base/files.js');
  await makeFolder(folder);
  for (const name of readdirSync(folder)) if (/^step-\d+\.yaml$/.test(name)) rmSync(join(folder, name));
  for (const [name, content] of files) await writeFileAtomic(join(folder, name), content);
  const text = [...files.keys()].map((name) => join(folder, name)).join('\n');
  return { data: { folder, files: [...files.keys()] }, text: `${text}\n\nsh ${shellQuote(join(folder, 'run.sh'))}` };
}

/** What the batch's own options are in the environment must not reach its workers under the same names. */
function workerEnvironment(): NodeJS.ProcessEnv {
  const own = new Set([...Object.keys(options), ...Object.keys(commonOptions), ...decided, 'file'].map(environmentName)); // prettier-ignore
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !own.has(name)));
}

async function textOf(
  report: BatchReport,
  reporter: 'text' | 'github' | 'junit',
  file: string,
  io: Io,
): Promise<string> {
  // prettier-ignore
  const { batchGithub, batchJunit, batchTable } = await import('../batch/report.js');
  if (reporter === 'text') return batchTable(report, io.paint);
  return reporter === 'github' ? batchGithub(report, file) : batchJunit(report, file);
}

/** GPUs that this process may use, without opening one: a worker that crashes must not find them taken. */
async function countGpus(): Promise<number> {
  const { cudaLibraryPath } = await import('../backend/load.js');
  if (!existsSync(cudaLibraryPath())) return 0;
  const nodes = readdirSync('/dev').filter((name) => /^nvidia\d+$/.test(name)).length;
  const visible = process.env.CUDA_VISIBLE_DEVICES;
  return visible === undefined ? nodes : Math.min(nodes, visible.split(',').filter((id) => /^[^-\s]/.test(id)).length);
}

function showPlan(
  plan: BatchPlan,
  slurm: Awaited<ReturnType<typeof submissionsOf>> | undefined,
  io: Io,
): CommandResult {
  const bytes = (value: number | null) => (value === null ? '' : formatBytes(value));
  const rows = plan.jobs.map((job, i) => [
    String(i + 1),
    job.name,
    job.command,
    job.device ?? '',
    bytes(job.reads),
    bytes(job.writes),
    bytes(job.memory),
    job.seconds === null ? '' : duration(job.seconds),
    job.problem?.split('\n')[0] ?? job.note ?? (job.out === null ? '' : relative(process.cwd(), job.out)),
  ]);
  const head = ['', 'job', 'command', 'device', 'reads', 'writes', 'memory', 'time', ''].map((c) => io.paint.bold(c));
  const bad = plan.jobs.filter(({ problem }) => problem !== null);
  const lines = [
    columns([head, ...rows], 'rlllrrrrl'),
    '',
    ...(slurm
      ? [...slurm.map(({ line }) => line), `${plan.jobs.length} jobs, ${slurm.length} for Slurm`]
      : [`${plan.jobs.length} jobs, ${plan.parallel} at a time${plan.gpus > 0 ? `, ${plan.gpus} GPUs` : ''}`]),
    `Outputs of known size: ${formatBytes(plan.writes)}; disk: ${formatBytes(plan.diskFree)} free`,
    'Nothing was written.',
  ];
  const failure =
    bad.length > 0
      ? badInput(`${bad.length} of ${plan.jobs.length} jobs would fail`, { where: bad[0]!.name, got: bad[0]!.problem!.split('\n')[0]! }) // prettier-ignore
      : plan.writes > plan.diskFree
        ? noResource('Not enough disk space for the outputs', { expected: `${formatBytes(plan.writes)} free`, got: formatBytes(plan.diskFree) }) // prettier-ignore
        : undefined;
  return {
    data: { dryRun: true, ...plan, ...(slurm && { slurm }) },
    text: lines.join('\n'),
    ...(failure && { failure }),
  };
}
