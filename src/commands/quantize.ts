import { Expected, choice, custom, flag, integer, list, number, text, byteSize, type Values } from '../base/options.js';
import { badUsage } from '../base/errors.js';
import { formatBytes } from '../base/files.js';
import { columns, count, duration } from '../base/text.js';
import { readFileSync } from 'node:fs';
import type { QuantizeOptions, QuantizePreview, QuantizeResult } from '../quant/options.js';
import type { Override } from '../quant/scheme.js';
import { acceptance, acceptanceOptions } from './acceptance.js';
import { recordConversion } from './history-file.js';
import { deviceOptions, input, inputOptions, openEnvironment, folderOutputOptions, seedOption } from './shared.js';
import { defineCommand, type CommandResult, type Io } from './types.js';

const calibrationSection = 'Calibration:';
const roundingSection = 'Learned rounding (--method autoround):';
export const quantizeOptions = {
  ...inputOptions,
  ...folderOutputOptions,
  method: choice(['gptq', 'rtn', 'awq', 'awq-gptq', 'autoround'], {
    default: 'gptq',
    help: 'gptq: error feedback on calibration text. rtn: rounding alone, on the best grid; weighted where --calibration is given. awq: activation-aware scales in the norms, then rounding, or (awq-gptq) error feedback. autoround: from there rounding and scales learn, block by block, what the full-precision model’s blocks give.',
  }),
  bits: custom({ default: 4, help: 'Bits a weight: 2, 3, 4 or 8.' }, '2|3|4|8', (given): 2 | 3 | 4 | 8 => {
    const bits = ([2, 3, 4, 8] as const).find((width) => String(width) === given);
    if (bits === undefined) throw new Expected('2, 3, 4 or 8');
    return bits;
  }),
  targetBpw: number({
    min: 2,
    max: 9,
    help: 'Bits a weight on average, scales included: each set of fused linears gets 2, 3, 4 or 8 bits as its measured sensitivity asks.',
  }),
  groupSize: integer({ min: -1, default: 128, help: 'Columns that share a scale: 32 to 1024; -1 is one scale a row.' }),
  sym: flag({ default: true, help: 'Symmetric grids, without zero points.', off: 'The same as --asym.' }),
  asym: flag({ help: 'Asymmetric grids, with a zero point a group.' }),
  format: list({
    separator: ',',
    choices: ['compressed-tensors', 'gptq', 'awq', 'gguf', 'onnx', 'safetensors', 'imatrix'],
    default: ['compressed-tensors'],
    value: 'name,...',
    help: 'How the result is stored; several share one calibration and become folders of the output. safetensors: the weights that the codes stand for. imatrix: the statistics as llama.cpp’s importance matrix.',
  }),
  ggufType: choice(['q4_k_m', 'q4_k_s', 'q4_k', 'q5_k', 'q6_k', 'q8_0', 'q4_0', 'q3_k', 'q2_k'], {
    default: 'q4_k',
    help: 'Block type of --format gguf; alone it decides bits and groups. q4_k_m, q4_k_s: more bits for some, as llama.cpp mixes them.',
  }),
  emit: list({
    separator: ',',
    choices: ['vllm', 'triton', 'sglang', 'llama.cpp', 'prometheus'],
    value: 'name,...',
    help: 'Deployment files beside the output: launch scripts with batching, and what Prometheus and Grafana need.',
  }),
  tp: list({
    separator: ',',
    value: 'n,...',
    help: 'Tensor-parallel sizes into which the output must divide, as vLLM splits it: checked before the work.',
  }),
  scope: text({
    defaultNote: 'all; experts for DeepSeek',
    value: 'all|experts|name',
    help: 'What to quantize: all linears of the layers, the routed experts only, or those whose name has this part (re:... for a regular expression).',
  }),
  keep: list({
    value: 'name',
    help: 'Leave these linears in high precision: a part of a name such as down_proj or layers.0, or re:...',
  }),
  rotate: choice(['hadamard'], {
    help: 'Rotate hidden states by a randomized Hadamard matrix that is folded into the weights: engines notice nothing. Spreads outliers; for one scale a row (--group-size -1).',
  }),
  override: list({
    value: 'name=scheme',
    help: 'Another scheme for some linears: down_proj=8, layers.0=bits:8,group:64, re:k_proj=asym. Linears that engines fuse follow; the last one that fits counts.',
  }),
  calibration: list({
    value: 'file|self|continue',
    section: calibrationSection,
    help: 'Text to calibrate on: .txt or .jsonl files, self for text that the model writes; beside files self, or continue (it goes on from pieces of them), for what they do not hold. Default: a small set that comes with the tool.',
  }),
  samples: integer({ min: 1, default: 128, section: calibrationSection, help: 'Windows of text.' }),
  seqLen: integer({
    min: 1,
    section: calibrationSection,
    defaultNote: '2048, or the context of the model',
    help: 'Tokens a window.',
  }),
  bpeDropout: number({ min: 0, max: 0.99, default: 0, section: calibrationSection, help: 'Chance that a merge of the tokenizer is left out: other spellings of the same words.' }), // prettier-ignore
  ...seedOption,
  damp: number({
    min: 0,
    max: 10,
    default: 0.01,
    section: calibrationSection,
    help: 'Share of the mean diagonal added to each Hessian; raised where it must be.',
  }),
  maxUncovered: number({
    min: 0,
    max: 1,
    default: 0.1,
    section: calibrationSection,
    help: 'Largest share of routed experts that no token may reach; more fails with exit code 3.',
  }),
  calibrateAllExperts: flag({
    section: calibrationSection,
    help: 'Calibrate every expert on every token, not only on those that its router sends it.',
  }),
  states: choice(['f32', 'bf16'], {
    section: calibrationSection,
    defaultNote: 'bf16; f32 for models of other types on the CPU',
    help: 'Precision of hidden states and forward pass while calibrating.',
  }),
  independentBlocks: flag({
    section: calibrationSection,
    help: 'Calibrate each block on the model as it is, not on what the quantized blocks before it make: as plan, worker and merge do.',
  }),
  roundingSteps: integer({ min: 1, max: 100_000, section: roundingSection, defaultNote: '200', help: 'Steps of signed gradient descent a block.' }), // prettier-ignore
  roundingBatch: integer({ min: 1, section: roundingSection, defaultNote: '8', help: 'Windows of text a step.' }),
  roundingLr: number({ min: 1e-6, max: 1, section: roundingSection, defaultNote: '1 / steps', help: 'First learning rate, in rounding cells a step; falls to zero along a line.' }), // prettier-ignore
  roundingStart: choice(['gptq', 'rtn'], { section: roundingSection, defaultNote: 'gptq', help: 'Where it begins: at the codes of error feedback, or at the weights themselves, on the best grid.' }), // prettier-ignore
  shardSize: byteSize({ default: 5e9, help: 'Largest size of a file of the output.' }),
  ...acceptanceOptions,
  ...deviceOptions,
} as const;

export const command = defineCommand({
  name: 'quantize',
  description:
    'Works through the model layer by layer: memory does not grow with its size. Interrupted, the same command goes on ' +
    'where it stopped. The output is read back and compared before it gets its name.',
  arguments: { input },
  options: quantizeOptions,
  examples: [
    ['quantize fixtures/v1.0/v1.0_checkpoint.bin -o out/int4 --samples 16 --seq-len 128', 'INT4, groups of 128, on the tool’s own text.'],
    ['quantize fixtures/moe-6m -o out/moe-int4 --scope experts --samples 16 --seq-len 128', 'The routed experts alone.'],
    ['quantize fixtures/v1.0/v1.0_checkpoint.bin -o out/plan --dry-run', 'What would be done, and what it would take.'],
  ], // prettier-ignore
  async run(given, io) {
    const { quantize } = await import('../quant/run.js');
    const { previewQuantize } = await import('../quant/prepare.js');
    const job = await quantizeJob(given, io);
    if (given.dryRun) return await showPlan(await previewQuantize(job), job, given, io);
    using env = await openEnvironment(given, io);
    const { accept, extend } = acceptance(given, io, env);
    const result = await quantize({ ...job, ...(accept && { accept }) }, env);
    await recordConversion(given.out, io);
    return extend(report(result, io));
  },
});

export type QuantizeValues = Values<typeof quantizeOptions> & { readonly input: string };

/** The job that options ask for. */
export async function quantizeJob(given: QuantizeValues, io: Io): Promise<QuantizeOptions> {
  const { defaultRecipe, defaultRounding } = await import('../quant/scheme.js');
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const overrides = await overridesOf(given.override);
  const wanted =
    given.format.includes('imatrix') ||
    given.method !== 'rtn' ||
    given.targetBpw !== undefined ||
    given.calibration.length > 0;
  requireLearnedRounding(given);
  const source = given.calibration.length > 0 ? given.calibration : 'default';
  return {
    input: given.input,
    out: given.out,
    overwrite: given.overwrite,
    restart: given.restart,
    ...(given.config !== undefined && { config: given.config }),
    recipe: {
      ...defaultRecipe,
      method: given.method,
      bits: given.bits,
      groupSize: given.groupSize,
      symmetric: given.sym && !given.asym,
      damp: given.damp,
      ...(given.method === 'autoround' && { rounding: { ...defaultRounding, ...roundingOf(given) } }),
      ...(given.rotate !== undefined && { rotation: { kind: given.rotate, seed: given.seed } }),
      ...(overrides.length > 0 && { overrides }),
      ...(given.targetBpw !== undefined && { targetBpw: given.targetBpw }),
      ...(given.format.includes('gguf') && blocksOf(given.ggufType)),
    },
    formats: given.format as QuantizeOptions['formats'],
    emit: given.emit as NonNullable<QuantizeOptions['emit']>,
    tensorParallel: given.tp.map(tensorParallel),
    ...(given.scope !== undefined && { scope: given.scope }),
    keep: given.keep,
    ...(wanted && {
      calibration: {
        source,
        samples: given.samples,
        seed: given.seed,
        bpeDropout: given.bpeDropout,
        ...(given.seqLen !== undefined && { seqLen: given.seqLen }),
      },
    }),
    ...(given.states !== undefined && { states: given.states }),
    maxUncovered: given.maxUncovered,
    calibrateAllExperts: given.calibrateAllExperts,
    independentBlocks: given.independentBlocks,
    shardSize: given.shardSize,
    tool: { name: 'deepseek-convert', version },
    commandLine: io.commandLine,
  };
}

const roundingOf = ({ roundingSteps, roundingBatch, roundingLr, roundingStart, seed }: QuantizeValues) => ({
  seed,
  ...(roundingSteps !== undefined && { steps: roundingSteps }),
  ...(roundingBatch !== undefined && { batch: roundingBatch }),
  ...(roundingLr !== undefined && { lr: roundingLr }),
  ...(roundingStart !== undefined && { start: roundingStart }),
});

function requireLearnedRounding(given: QuantizeValues): void {
  const keys = ['roundingSteps', 'roundingBatch', 'roundingLr', 'roundingStart'] as const;
  const key = keys.find((one) => given[one] !== undefined);
  if (key === undefined || given.method === 'autoround') return;
  throw badUsage(`--rounding-${key.slice('rounding'.length).toLowerCase()} goes with --method autoround`, {
    got: `--method ${given.method}`,
  });
}

async function overridesOf(given: readonly string[]): Promise<Override[]> {
  const { parseOverride } = await import('../quant/overrides.js');
  const { badUsage } = await import('../base/errors.js');
  return given.map((one) => {
    const override = parseOverride(one);
    if (override) return override;
    throw badUsage('--override is not understood', { got: one, expected: 'name=8, name=bits:8,group:64 or name=asym' });
  });
}

const blocksOf = (type: QuantizeValues['ggufType']) =>
  type === 'q4_k_m' || type === 'q4_k_s' ? { blocks: 'q4_k' as const, mixture: type } : { blocks: type };

function tensorParallel(given: string): number {
  const size = Number(given);
  if (Number.isSafeInteger(size) && size >= 1 && size <= 1024) return size;
  throw badUsage('Invalid value for --tp', { expected: 'numbers of GPUs such as 1,2,4', got: given });
}

/** What a finished quantization says of itself. */
export function report(result: QuantizeResult, io: Io): CommandResult {
  const { plan, blocks, stages } = result;
  const linears = blocks.flatMap((block) => block.linears);
  const coverage = blocks.flatMap((block) => block.coverage ?? []);
  const left = [...plan.linears.values()].flatMap(({ linear, reason }) => (reason === undefined ? [] : [{ name: linear.name, reason }])); // prettier-ignore
  const mean = (key: 'error' | 'plainError') => linears.reduce((sum, linear) => sum + linear[key], 0) / linears.length;
  const { totals } = plan;
  const lines = [
    `${io.paint.bold(result.out)}`,
    `${totals.quantized} linears at ${totals.bitsPerWeight.toFixed(2)} bits a weight, ${totals.left} left in high precision`,
    `${formatBytes(result.inputBytes)} -> ${formatBytes(result.outputBytes)}`,
    `mean relative output error ${mean('error').toExponential(2)}, by plain rounding ${mean('plainError').toExponential(2)}`,
    ...(result.calibration === undefined ? [] : [`calibration: ${result.calibration}`]),
    ...coverage.filter(({ uncovered, starved }) => uncovered + starved > 0).map(coverageLine),
    ...counted(left.map(({ reason }) => reason)).map(([reason, n]) => `left: ${n} (${reason})`),
    ...linears.filter(({ note }) => note !== undefined).slice(0, 10).map(({ name, note }) => `${name}: ${note}`), // prettier-ignore
    ...fallbackLine(linears),
    `verified ${result.verified} linears as read back; ${duration(result.seconds)}`,
  ];
  const data = {
    out: result.out,
    bytes: { input: result.inputBytes, output: result.outputBytes },
    totals,
    schemes: plan.use.groups.map(({ scheme, linears: names }) => ({ ...scheme, linears: names.length })),
    linears,
    left,
    experts: coverage,
    calibration: result.calibration ?? null,
    notices: result.notices,
    verified: result.verified,
    resumed: result.resumed,
    seconds: result.seconds,
    stages,
  };
  return { data, text: `${lines.join('\n')}\n` };
}

const coverageLine = ({ layer, experts, starved, uncovered }: { layer: number; experts: number; starved: number; uncovered: number }): string =>
  `layer ${layer}: ${uncovered} of ${experts} experts saw no token, ${starved} too few`; // prettier-ignore

function fallbackLine(linears: readonly { fallbackRows: number }[]): string[] {
  const rows = linears.reduce((sum, { fallbackRows }) => sum + fallbackRows, 0);
  return rows === 0 ? [] : [`${count(rows)} output rows fell back to plain rounding, which was better there`];
}

function counted(items: readonly string[]): [string, number][] {
  const counts = new Map<string, number>();
  for (const item of items) counts.set(item, (counts.get(item) ?? 0) + 1);
  return [...counts];
}

/** For `--dry-run`: what becomes of each tensor, sizes, time. */
export async function showPlan(
  preview: QuantizePreview,
  job: QuantizeOptions,
  given: QuantizeValues,
  io: Io,
): Promise<CommandResult> {
  const { estimate, secondsFor } = await import('../quant/estimate.js');
  const { patternOf } = await import('../quant/widths.js');
  const { describeScheme } = await import('../quant/scheme.js');
  const { plan, output, model } = preview;
  const seqLen = job.calibration?.seqLen ?? Math.min(2048, model.context);
  const tokens = job.calibration === undefined ? 0 : job.calibration.samples * seqLen;
  using env = await openEnvironment(given, io);
  const { statesOf } = await import('../quant/prepare.js');
  const size = statesOf(job, preview, env) === 'f32' ? 4 : 2;
  const needs = estimate(model, plan, job.recipe, tokens, job.calibration?.samples ?? 1, size);
  const { forward, capture, solve, tune } = needs.flops;
  const eta = await secondsFor(env.device, forward + capture + solve + tune);
  const rows = counted(
    [...plan.linears.values()].map(({ linear, stored, scheme, reason }) => {
      const shape = `[${stored.outFeatures}, ${stored.inFeatures}]`;
      return [patternOf(linear.name), shape, scheme ? describeScheme(scheme) : `left: ${reason}`].join('\t');
    }),
  ).map(([line, n]) => [...line.split('\t').slice(0, 2), `x ${n}`, line.split('\t')[2]!]);
  const disk = output.bytes + 2 * needs.stateBytes;
  const lines = [
    columns(rows, 'lrrl'),
    '',
    `${plan.totals.quantized} linears at ${plan.totals.bitsPerWeight.toFixed(2)} bits a weight, ${plan.totals.left} left in high precision`,
    `output ${formatBytes(output.bytes)} (input ${formatBytes(preview.inputBytes)}); disk needed while working ${formatBytes(disk)}`,
    `memory on ${env.device.kind === 'cpu' ? 'the host' : 'the GPU'} about ${formatBytes(needs.memory)}; time roughly ${duration(eta)}`,
    ...preview.notices,
  ];
  const data = {
    dryRun: true,
    out: job.out,
    bytes: { input: preview.inputBytes, output: output.bytes, disk, memory: needs.memory },
    seconds: eta,
    totals: plan.totals,
    tensors: output.tensors.map(({ planned, origin }) => ({ ...planned, from: origin.kind })),
    left: [...plan.linears.values()].flatMap(({ linear, reason }) => (reason === undefined ? [] : [{ name: linear.name, reason }])), // prettier-ignore
    notices: preview.notices,
  };
  return { data, text: `${lines.join('\n')}\n` };
}
