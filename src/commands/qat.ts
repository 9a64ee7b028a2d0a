import { readFileSync } from 'node:fs';
import { byteSize, choice, flag, integer, list, number, text, type Values } from '../base/options.js';
import { formatBytes } from '../base/files.js';
import { duration } from '../base/text.js';
import type { QatOptions, QatResult } from '../train/options.js';
import { acceptance, acceptanceOptions } from './acceptance.js';
import { groupOptions, input, inputOptions, openEnvironment, folderOutputOptions, seedOption } from './shared.js';
import { defineCommand, type CommandResult, type Io } from './types.js';

const { dryRun: _, ...output } = folderOutputOptions;
const training = 'Training:';
const text_ = 'Text:';
const whole = 'The whole model:';
const options = {
  ...inputOptions,
  ...output,
  from: text({
    value: 'folder',
    help: 'The input quantized (compressed-tensors), to start from. Default: GPTQ on the training text.',
  }),
  groupSize: integer({ min: -1, default: 128, help: 'Columns that share a scale: 32 to 1024; -1 is one scale a row.' }),
  fakeQuant: flag({
    default: true,
    help: 'Train through the rounding.',
    off: 'Train without rounding: all weights learn in full precision, and the output is an ordinary checkpoint.',
  }),
  epochs: integer({ min: 0, max: 1000, default: 2, section: training, help: 'Rounds through the text, block by block; 0: none.' }),
  batch: integer({ min: 1, max: 4096, default: 4, section: training, help: 'Windows of text a step.' }),
  lr: number({
    min: 0,
    max: 1e6,
    section: training,
    defaultNote: '0.01, at most 10 / steps',
    help: 'Learning rate block by block, in rounding cells: how far a weight moves a step.',
  }),
  warmup: number({ min: 0, max: 1, default: 0.05, section: training, help: 'Share of the steps over which the learning rate rises; it falls by a cosine.' }),
  gradClip: number({ min: 0, max: 1e9, default: 1, section: training, help: 'Largest norm of the gradient; larger ones are scaled down.' }),
  weightDecay: number({ min: 0, max: 1, default: 0, section: training, help: 'Decoupled weight decay, where weights learn in full precision.' }),
  cleanInputs: number({
    min: 0,
    max: 1,
    default: 0.25,
    section: training,
    help: 'Share of block inputs that come from the full-precision model instead of the quantized one.',
  }),
  failOnGradientAlarm: flag({ section: training, help: 'Stop with exit code 3 when gradients vanish, explode or are not finite.' }),
  dtype: choice(['f32', 'bf16'], {
    section: training,
    defaultNote: 'f32 on the CPU, bf16 on a GPU',
    help: 'Precision to compute in; what learns is held in f32.',
  }),
  endToEnd: choice(['none', 'scales', 'lora', 'full'], {
    default: 'none',
    section: whole,
    help: 'Then train the whole model against its teacher: scales alone, low-rank additions to the weights, or all quantized weights.',
  }),
  endToEndEpochs: integer({ min: 1, max: 1000, section: whole, defaultNote: 'as --epochs, at least 1', help: 'Rounds through the text.' }),
  endToEndLr: number({ min: 0, max: 1e6, section: whole, defaultNote: '0.01, at most 10 / steps; 0.0001 without fake quantization', help: 'Learning rate, in rounding cells; absolute without fake quantization.' }),
  maxSteps: integer({ min: 1, section: whole, help: 'End after this many steps.' }),
  klWeight: number({ min: 0, max: 1e6, section: whole, defaultNote: '1; 0 without fake quantization', help: 'Weight of the divergence from the teacher’s predictions.' }),
  hiddenWeight: number({ min: 0, max: 1e6, section: whole, defaultNote: '20; 0 without fake quantization', help: 'Weight of the relative error of hidden states behind each layer.' }),
  ceWeight: number({ min: 0, max: 1e6, section: whole, defaultNote: '0; 1 without fake quantization', help: 'Weight of cross-entropy with the text.' }),
  rank: integer({ min: 1, max: 4096, default: 16, section: whole, help: 'Rank of the additions of --end-to-end lora.' }),
  calibration: list({
    value: 'file|self|continue',
    section: text_,
    help: 'Text to train on: .txt or .jsonl files, self for text that the model writes; beside files self, or continue (it goes on from pieces of them), for what they do not hold. Default: a small set that comes with the tool.',
  }),
  samples: integer({ min: 1, default: 128, section: text_, help: 'Windows of text; a sixteenth of them judges and is not trained on.' }),
  seqLen: integer({ min: 2, section: text_, defaultNote: '2048, or the context of the model', help: 'Tokens a window.' }),
  bpeDropout: number({ min: 0, max: 0.99, default: 0, section: text_, help: 'Chance that a merge of the tokenizer is left out: the model sees words in other spellings too.' }),
  ...seedOption,
  trainingReport: text({ value: 'training.html', section: 'Reports:', help: 'Write losses and gradient norms as one self-contained HTML file.' }),
  shardSize: byteSize({ default: 5e9, help: 'Largest size of a file of the output.' }),
  ...acceptanceOptions,
  ...groupOptions,
} as const; // prettier-ignore

export const command = defineCommand({
  name: 'qat',
  description:
    'Quantization-aware training: from the GPTQ solution, weights and scales learn block by block what rounding took, ' +
    'then optionally all together against the full-precision model’s predictions. The best that was seen is kept, so ' +
    'the result is never worse than its start. Interrupted, the same command goes on where it stopped.',
  arguments: { input },
  options,
  examples: [
    ['qat fixtures/v1.0/v1.0_checkpoint.bin -o out/qat --samples 16 --seq-len 64 --epochs 1', 'Block by block, on the tool’s own text.'],
    ['qat fixtures/v1.0/v1.0_checkpoint.bin -o out/scales --samples 16 --seq-len 64 --epochs 0 --end-to-end scales', 'GPTQ, then the scales against the teacher.'],
  ], // prettier-ignore
  async run(given, io) {
    const { runQat } = await import('../train/run.js');
    using env = await openEnvironment(given, io);
    const { accept, extend } = acceptance(given, io, env);
    const result = await runQat({ ...jobOptions(given, io), ...(accept && { accept }) }, env);
    if (given.trainingReport !== undefined) {
      const { writeTrainingReport } = await import('../train/report.js');
      await writeTrainingReport(given.trainingReport, result);
    }
    return extend(report(result, io));
  },
});

type Given = Values<typeof options> & { readonly input: string };

function jobOptions(given: Given, io: Io): QatOptions {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const { calibration, fakeQuant } = given;
  const source = calibration.length > 0 ? calibration : 'default';
  const optional = <K extends string, V>(key: K, value: V | undefined) =>
    (value === undefined ? {} : { [key]: value }) as { readonly [k in K]?: V };
  return {
    ...{ input: given.input, out: given.out, overwrite: given.overwrite, restart: given.restart },
    ...optional('config', given.config),
    ...optional('from', given.from),
    ...optional('maxSteps', given.maxSteps),
    ...optional('dtype', given.dtype),
    ...{ groupSize: given.groupSize, fakeQuant, batch: given.batch, warmup: given.warmup },
    calibration: {
      source,
      samples: given.samples,
      seed: given.seed,
      bpeDropout: given.bpeDropout,
      ...optional('seqLen', given.seqLen),
    },
    epochs: fakeQuant ? given.epochs : 0,
    endToEnd: given.endToEnd,
    endToEndEpochs: given.endToEndEpochs ?? Math.max(1, given.epochs),
    ...optional('lr', given.lr),
    ...optional('endToEndLr', given.endToEndLr),
    ...{ gradClip: given.gradClip, weightDecay: given.weightDecay, cleanInputs: given.cleanInputs, rank: given.rank },
    kl: given.klWeight ?? (fakeQuant ? 1 : 0),
    hidden: given.hiddenWeight ?? (fakeQuant ? 20 : 0),
    crossEntropy: given.ceWeight ?? (fakeQuant ? 0 : 1),
    failOnAlarm: given.failOnGradientAlarm,
    ...{ seed: given.seed, shardSize: given.shardSize },
    tool: { name: 'deepseek-convert', version },
    commandLine: io.commandLine,
  };
}

function report(result: QatResult, io: Io): CommandResult {
  const { blocks, endToEnd } = result;
  const mean = (key: 'before' | 'after') => blocks.reduce((sum, block) => sum + block[key], 0) / blocks.length;
  const alarms = [...blocks.flatMap(({ health }) => health.alarms), ...(endToEnd?.health.alarms ?? [])];
  const lines = [
    io.paint.bold(result.out),
    ...(result.linears > 0 ? [`${result.linears} linears trained and read back, ${formatBytes(result.outputBytes)}`] : []),
    ...(blocks.length > 0 ? [`block by block: relative error ${mean('before').toExponential(2)} -> ${mean('after').toExponential(2)} on held-out windows`] : []),
    ...(endToEnd ? endToEndLines(endToEnd) : []),
    alarms.length === 0 ? 'gradients: no alarm' : `gradients: ${alarms.length} alarms (${[...new Set(alarms.map(({ kind }) => kind))].join(', ')})`,
    `text: ${result.calibration}`,
    `${duration(result.seconds)}${result.resumed ? ', resumed' : ''}`,
  ]; // prettier-ignore
  return { data: { ...result, endToEnd: endToEnd ?? null }, text: `${lines.join('\n')}\n` };
}

function endToEndLines({ judgements, best, steps }: NonNullable<QatResult['endToEnd']>): string[] {
  const kept = judgements.find(({ step }) => step === best);
  const of = (one: (typeof judgements)[number]) =>
    one.kl === null ? `loss ${one.loss.toPrecision(4)}` : `KL ${one.kl.toPrecision(4)}, cross-entropy ${one.crossEntropy.toPrecision(4)}`; // prettier-ignore
  const [first] = judgements;
  if (!first || !kept) return [`end to end: ${steps.length} steps`];
  return [`end to end: ${of(first)} -> ${of(kept)} on held-out windows (step ${best} of ${steps.length})`];
}
