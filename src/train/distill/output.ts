import type { Job, Json } from '../../base/job.js';
import { count } from '../../base/text.js';
import type { FloatDType } from '../../base/dtype.js';
import type { JobEnv } from '../../backend/env.js';
import type { CalibrationSet } from '../../arch/calibration.js';
import { openModel, type OpenModel } from '../../arch/open.js';
import { createWriter } from '../../checkpoint/writer.js';
import { cast } from '../../tensor/ops.js';
import { Scope } from '../../tensor/tensor.js';
import { pass } from '../pass.js';
import { StudentReader } from '../student.js';
import type { DistillOptions, Perplexities } from './options.js';
import { parametersOf } from './shape.js';
import type { Student } from './student.js';

export interface Judging {
  readonly env: JobEnv;
  /** [n, length]. */
  readonly tokens: Int32Array;
  readonly length: number;
  readonly microBatch: number;
  readonly dtype: 'f32' | 'bf16';
}

/** Perplexity of a model as it is stored. */
export async function perplexityOf(
  open: OpenModel,
  { env, tokens, length, microBatch, dtype }: Judging,
): Promise<number> {
  using scope = new Scope(env.device);
  const reader = new StudentReader(open, env.device, dtype);
  const { model } = open;
  const outer = await reader.fixed(model.outer, scope);
  const blocks = [];
  for (const block of model.blocks) blocks.push(await reader.fixed(block.tensors, scope));
  const loss = { crossEntropy: 1, kl: 0, hidden: 0 };
  const n = tokens.length / length;
  let sum = 0;
  for (let row = 0; row < n; row += microBatch) {
    const rows = Math.min(microBatch, n - row);
    const ids = tokens.slice(row * length, (row + rows) * length);
    const { crossEntropy } = await pass({ device: env.device, model, outer, blocks, loss, recompute: true }, ids, rows, n); // prettier-ignore
    sum += crossEntropy;
  }
  return Math.exp(sum);
}

export interface Written {
  readonly perplexity: Perplexities;
}

interface WriteOptions {
  readonly options: DistillOptions;
  readonly env: JobEnv;
  readonly job: Job;
  readonly set: CalibrationSet;
  readonly teacher: OpenModel;
  readonly student: Student;
  readonly recipe: Readonly<Record<string, Json>>;
  readonly judging: Judging;
  /** For the provenance file. */
  readonly report: Json;
  readonly teacherPerplexity: number;
  /** Records that everything is known, before the output gets its name. */
  readonly mark: (perplexity: Perplexities) => Promise<void>;
}

/** Writes the student as an ordinary checkpoint, opens what was written, and measures it. */
export async function writeStudent(o: WriteOptions): Promise<Written> {
  const { options, env, job, set, teacher, student, recipe } = o;
  const { checkpoint } = teacher;
  const units = [student.outer, ...student.blocks].flatMap(({ plain }) => plain);
  const dtype = storedPrecision(teacher);
  let perplexity: Perplexities | undefined;
  const writer = await createWriter({
    job,
    format: 'safetensors',
    tensors: units.map(({ names, parameter }) => ({ name: names[0]!, shape: parameter.value.shape, dtype })),
    inPlanOrder: true,
    ...(options.shardSize !== undefined && { shardSize: options.shardSize }),
    config: student.model.config,
    companions: checkpoint.companions,
    extraFiles: new Map([...checkpoint.extraFiles, ['README.md', card(o)]]),
    provenance: {
      tool: options.tool,
      recipe: { command: options.commandLine, ...recipe },
      inputs: checkpoint.files,
    },
    accept: async ({ path }) => {
      const open = await openModel(path);
      try {
        perplexity = { teacher: o.teacherPerplexity, student: await perplexityOf(open, o.judging) };
        await o.mark(perplexity);
        return { windows: o.judging.tokens.length / o.judging.length, perplexity: { ...perplexity } };
      } finally {
        await open.close();
      }
    },
  });
  try {
    for (const { names, parameter } of units) {
      using scope = new Scope(env.device);
      if (!writer.has(names[0]!)) await writer.write(names[0]!, cast(scope, parameter.value, dtype).source());
    }
    await checkpoint.assertUnchanged();
    await writer.finish({ distillation: o.report, text: set.description });
    return { perplexity: perplexity! };
  } finally {
    await writer.close();
  }
}

/** What the teacher's matrices are stored in; bf16 where that is no plain type. */
function storedPrecision({ model, tensors }: OpenModel): FloatDType {
  const { encoding } = tensors.get(`${model.blocks[0]!.attention.grouped!.q.name}.weight`)!.entry;
  const { dtype } = encoding.kind === 'plain' ? encoding : { dtype: 'bf16' };
  return dtype === 'f32' || dtype === 'f16' ? dtype : 'bf16';
}

/** README.md of the output. */
function card({ options, set, student, teacher }: WriteOptions): string {
  const { tool, init, kl, hidden, crossEntropy, temperature } = options;
  const { model } = student;
  const began =
    init === 'random'
      ? 'It began with random weights.'
      : 'It began as the layers, hidden channels, heads and neurons of its teacher that do most on the training text.';
  return [
    '# Student of a larger model',
    '',
    `Made by ${tool.name} ${tool.version}: ${count(parametersOf(model))} parameters, its teacher has ${count(parametersOf(teacher.model))}. ${began}`,
    '',
    `- ${model.blocks.length} layers, ${model.hidden} wide, ${model.heads} heads on ${model.kvHeads} key/value heads`,
    `- losses: KL x ${kl} (temperature ${temperature}), hidden states x ${hidden}, cross-entropy x ${crossEntropy}`,
    `- text: ${set.description} (SHA-256 of the tokens ${set.hash})`,
    '',
    'Settings, chosen parts, losses, gradient norms and perplexities stand in `deepseek-convert.json`.',
    '',
  ].join('\n');
}
