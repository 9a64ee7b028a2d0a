import { readFileSync } from 'node:fs';
import { badUsage } from '../base/errors.js';
import { byteSize, choice, custom, Expected, integer, list, number, text, flag, type Values } from '../base/options.js';
import { count, duration, short } from '../base/text.js';
import type { DistillOptions, DistillResult } from '../train/distill/options.js';
import { groupOptions, inputOptions, openEnvironment, folderOutputOptions, readScaled, seedOption } from './shared.js';
import { defineCommand, type CommandResult, type Io } from './types.js';

const { dryRun: _, ...output } = folderOutputOptions;
const size = 'The student:';
const training = 'Training:';
const text_ = 'Text:';
const options = {
  ...inputOptions,
  ...output,
  targetParams: custom(
    { section: size, help: 'Parameters of the student: 650M, 1.5B, 50% of the teacher’s. Sizes that are not given follow from it.' },
    '650M|50%',
    readParameters,
  ),
  layers: integer({ min: 1, section: size, help: 'Layers that it keeps.' }),
  hidden: integer({ min: 1, section: size, help: 'Width of its hidden states.' }),
  heads: integer({ min: 1, section: size, help: 'Attention heads; groups that share keys and values are kept whole.' }),
  kvHeads: integer({ min: 1, section: size, help: 'Key/value heads; with --heads also the size of their groups.' }),
  intermediate: integer({ min: 1, section: size, help: 'Neurons of a feed-forward part.' }),
  init: choice(['teacher', 'random'], {
    default: 'teacher',
    section: size,
    help: 'Begin as the parts of the teacher that do most on the text, or from scratch, to compare with.',
  }),
  epochs: integer({ min: 1, max: 1000, section: training, defaultNote: '1', help: 'Rounds through the text.' }),
  tokens: custom(
    { section: training, help: 'Tokens to train on in all, in place of --epochs: 200M.' },
    '200M',
    (given) => readScaled(given, 'a number of tokens: 200000, 200K, 1.5B'),
  ),
  batch: integer({ min: 1, max: 4096, default: 8, section: training, help: 'Windows of text a step; gradients of as many passes as memory needs add up.' }),
  lr: number({ min: 0, max: 1e6, default: 5e-4, section: training, help: 'Largest learning rate.' }),
  warmup: number({ min: 0, max: 1, default: 0.05, section: training, help: 'Share of the steps over which the learning rate rises; it falls by a cosine.' }),
  gradClip: number({ min: 0, max: 1e9, default: 1, section: training, help: 'Largest norm of the gradient; larger ones are scaled down.' }),
  weightDecay: number({ min: 0, max: 1, default: 0, section: training, help: 'Decoupled weight decay of matrices.' }),
  klWeight: number({ min: 0, max: 1e6, default: 1, section: training, help: 'Weight of the divergence from the teacher’s predictions.' }),
  hiddenWeight: number({ min: 0, max: 1e6, default: 1, section: training, help: 'Weight of the relative error of hidden states behind each layer.' }),
  ceWeight: number({ min: 0, max: 1e6, default: 0, section: training, help: 'Weight of cross-entropy with the text.' }),
  temperature: number({ min: 0.01, max: 100, default: 1, section: training, help: 'Divides both models’ logits before they are compared.' }),
  failOnGradientAlarm: flag({ section: training, help: 'Stop with exit code 3 when gradients vanish, explode or are not finite.' }),
  dtype: choice(['f32', 'bf16'], {
    section: training,
    defaultNote: 'f32 on the CPU, bf16 on a GPU',
    help: 'Precision to compute in; what learns is held in f32.',
  }),
  calibration: list({
    value: 'file|self|continue',
    section: text_,
    help: 'Text to train on: .txt or .jsonl files, self for text that the teacher writes; beside files self, or continue (it goes on from pieces of them), for what they do not hold. Default: a small set that comes with the tool.',
  }),
  samples: integer({ min: 1, default: 1024, section: text_, help: 'Windows of text; a sixteenth of them judges and is not trained on.' }),
  seqLen: integer({ min: 2, section: text_, defaultNote: '2048, or the context of the model', help: 'Tokens a window.' }),
  ...seedOption,
  trainingReport: text({ value: 'training.html', section: 'Reports:', help: 'Write losses and gradient norms as one self-contained HTML file.' }),
  shardSize: byteSize({ default: 5e9, help: 'Largest size of a file of the output.' }),
  ...groupOptions,
} as const; // prettier-ignore

export const command = defineCommand({
  name: 'distill',
  description:
    'Make a smaller model of a dense one (Llama, Mistral, Qwen 2 and 3). Layers, hidden channels, attention heads and ' +
    'neurons that do least on the text are left out; what remains is trained on the teacher’s predictions and hidden ' +
    'states. The output is an ordinary checkpoint with the teacher’s tokenizer. Interrupted, the same command goes on ' +
    'where it stopped.',
  arguments: {
    input: text({
      required: true,
      value: 'teacher',
      aliases: ['input-model'],
      help: 'The teacher: a Hugging Face folder, or one .safetensors, .bin, .pt, .pth, .gguf or .onnx file.',
    }),
  },
  options,
  examples: [
    ['distill fixtures/v1.0/v1.0_checkpoint.bin -o out/student --target-params 50% --samples 16 --seq-len 64', 'Half the parameters, on the tool’s own text.'],
    ['distill fixtures/v1.0/v1.0_checkpoint.bin -o out/shallow --layers 2 --samples 16 --seq-len 64 --temperature 2', 'Fewer layers of the same width.'],
  ], // prettier-ignore
  async run(given, io) {
    const { runDistill } = await import('../train/distill/run.js');
    const job = jobOptions(given, io);
    using env = await openEnvironment(given, io);
    const result = await runDistill(job, env);
    if (given.trainingReport !== undefined) {
      const { writeTrainingReport } = await import('../train/report.js');
      await writeTrainingReport(given.trainingReport, { ...result, blocks: [], endToEnd: result.training });
    }
    return report(result, io);
  },
});

type Given = Values<typeof options> & { readonly input: string };

/** A number of parameters, or as a share of the teacher's a number below 1. */
function readParameters(given: string): number {
  const expected = 'a number of parameters (650M, 1.5B), or a share of the teacher’s between 0 and 100% (50%)';
  if (!given.endsWith('%')) return readScaled(given, expected);
  const share = Number(given.slice(0, -1)) / 100;
  if (!(share > 0 && share < 1)) throw new Expected(expected);
  return share;
}

function jobOptions(given: Given, io: Io): DistillOptions {
  const { version } = JSON.parse(readFileSync(new URL('../../package.json', import.meta.url), 'utf8')) as {
    version: string;
  };
  const { calibration } = given;
  if (given.tokens !== undefined && given.epochs !== undefined) {
    throw badUsage('--tokens and --epochs both say how long to train', { expected: 'one of them' });
  }
  const source = calibration.length > 0 ? calibration : 'default';
  const optional = <K extends string, V>(key: K, value: V | undefined) =>
    (value === undefined ? {} : { [key]: value }) as { readonly [k in K]?: V };
  return {
    ...{ input: given.input, out: given.out, overwrite: given.overwrite, restart: given.restart },
    ...optional('config', given.config),
    shape: {
      ...optional('targetParams', given.targetParams),
      ...optional('layers', given.layers),
      ...optional('hidden', given.hidden),
      ...optional('heads', given.heads),
      ...optional('kvHeads', given.kvHeads),
      ...optional('intermediate', given.intermediate),
    },
    init: given.init,
    calibration: { source, samples: given.samples, seed: given.seed, ...optional('seqLen', given.seqLen) },
    epochs: given.epochs ?? 1,
    ...optional('tokens', given.tokens),
    ...optional('dtype', given.dtype),
    ...{ batch: given.batch, lr: given.lr, warmup: given.warmup, weightDecay: given.weightDecay },
    ...{ gradClip: given.gradClip, kl: given.klWeight, hidden: given.hiddenWeight, crossEntropy: given.ceWeight },
    ...{ temperature: given.temperature, failOnAlarm: given.failOnGradientAlarm, seed: given.seed },
    shardSize: given.shardSize,
    tool: { name: 'deepseek-convert', version },
    commandLine: io.commandLine,
  };
}

function report(result: DistillResult, io: Io): CommandResult {
  const { out, shape, parameters, teacherParameters, layers, training: trained, perplexity } = result;
  const { judgements, best, steps, health } = trained;
  const loss = (step: number) => judgements.find((one) => one.step === step)!.loss.toPrecision(4);
  const kinds = [...new Set(health.alarms.map(({ kind }) => kind))].join(', ');
  const lines = [
    io.paint.bold(out),
    `${short(parameters)} parameters of ${short(teacherParameters)} (${((100 * parameters) / teacherParameters).toFixed(1)}%): ${shape.layers} layers, ${shape.hidden} wide, ${shape.heads} heads on ${shape.kvHeads}, ${shape.intermediate} neurons`,
    layers ? `began as the teacher's layers ${layers.join(', ')}` : 'began at random',
    `${count(result.tokens)} tokens trained on: loss ${loss(0)} -> ${loss(best)} on held-out windows (step ${best} of ${steps.length})`,
    `perplexity on held-out windows: ${perplexity.student.toPrecision(4)}, of the teacher ${perplexity.teacher.toPrecision(4)}`,
    health.alarms.length === 0 ? 'gradients: no alarm' : `gradients: ${health.alarms.length} alarms (${kinds})`,
    `text: ${result.calibration}`,
    `${duration(result.seconds)}${result.resumed ? ', resumed' : ''}`,
  ];
  return { data: { ...result, layers: layers ?? null }, text: `${lines.join('\n')}\n` };
}
