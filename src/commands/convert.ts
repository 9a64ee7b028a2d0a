import { basename, dirname, resolve } from 'node:path';
import { badUsage, noResource } from '../base/errors.js';
import { formatBytes, freeBytes } from '../base/files.js';
import { byteSize, choice, flag, integer, list, text } from '../base/options.js';
import { columns, count, duration } from '../base/text.js';
import type { ConvertPlan } from '../export/convert-plan.js';
import type { FusionReport } from '../export/fuse-check.js';
import type { Fuse } from '../export/fusion.js';
import { recordConversion } from './history-file.js';
import { deviceOptions, input, inputOptions, openEnvironment, anyOutputOptions } from './shared.js';
import { defineCommand, type CommandResult, type Io } from './types.js';

const formats = ['safetensors', 'torch', 'gguf', 'onnx', 'deepseek-native'] as const;
const blocks = ['q8_0', 'q6_k', 'q4_k', 'q4_0', 'q4_k_s', 'q4_k_m'] as const;
const isBlocks = (dtype: string | undefined): dtype is (typeof blocks)[number] =>
  (blocks as readonly string[]).includes(dtype ?? '');

export const command = defineCommand({
  name: 'convert',
  description:
    'Tensors stream from file to file: memory does not grow with the model. Without --dtype weights keep their bytes;\n' +
    'with it, quantized weights are decoded too. Weights that are not finite are refused, and so are values that the\n' +
    'new type cannot hold. The output is read back before it gets its name.',
  arguments: { input },
  options: {
    ...anyOutputOptions,
    ...inputOptions,
    dtype: choice(['bf16', 'f16', 'f32', ...blocks], {
      defaultNote: 'as they are',
      help: 'What weights become; q8_0 to q4_0 are blocks of GGUF files (rounded, not calibrated: see quantize).',
    }),
    format: choice(formats, {
      defaultNote: 'by the name of the output; a folder gets safetensors',
      help: 'File format of the output.',
    }),
    imatrix: text({
      value: 'file',
      help: 'Importance of columns for the blocks of GGUF files, as llama.cpp or quantize --format imatrix wrote it.',
    }),
    fuse: list({
      separator: ',',
      choices: ['qkv', 'gate-up', 'split', 'fold'],
      value: 'name,...',
      help: 'qkv, gate-up: one matrix for each set (ONNX: packed attention; both in a folder: Phi-3’s container). split: such matrices as their linears. fold: consecutive linears as one where that is smaller. Each is checked by products with random inputs.',
    }),
    mergeLora: text({ value: 'folder', help: 'Merge the LoRA adapter of this PEFT folder into the weights.' }),
    shardSize: byteSize({ default: 5e9, help: 'Largest file of a folder.' }),
    modelParallel: integer({ min: 1, default: 1, help: "Shards of DeepSeek's native layout." }),
    allowSaturation: flag({ help: 'Accept values that become infinite (f16 ends at 65504).' }),
    ioBudget: byteSize({
      default: 128e6,
      help: 'Memory for tensors under way, from read to written; one larger tensor goes alone.',
    }),
    ...deviceOptions,
    device: { ...deviceOptions.device, default: 'cpu', help: 'Where to compute; the CPU is as fast as the disk.' },
  },
  examples: [
    ['convert fixtures/v1.0/v1.0_checkpoint.bin -o out/v1-folder', 'A PyTorch file as a Hugging Face folder.'],
    ['convert fixtures/moe-6m -o out/moe-6m.bin --dtype f16', 'A folder as one PyTorch file in fp16.'],
    ['convert fixtures/moe-6m -o out/moe-6m.gguf --dtype q8_0', 'A GGUF file for llama.cpp, tokenizer inside.'],
    ['convert fixtures/moe-6m -o out/moe-onnx --format onnx', 'A graph for ONNX Runtime, with its KV cache.'],
    ['convert fixtures/moe-6m -o out/moe-f32 --dtype f32 --dry-run', 'What would be done, tensor by tensor.'],
  ],
  async run(given, io) {
    const { planConversion } = await import('../export/convert-plan.js');
    const { checkFuse } = await import('../export/fuse.js');
    const format = given.format ?? formatOf(given.out) ?? 'safetensors';
    checkName(given.out, format);
    const { dtype: wanted, modelParallel } = given;
    if (isBlocks(wanted) && format !== 'gguf') {
      throw badUsage(`--dtype ${wanted} is a block type of GGUF files`, { got: `--format ${format}`, expected: '--format gguf, or an output that ends in .gguf' }); // prettier-ignore
    }
    if (given.imatrix !== undefined && !isBlocks(wanted)) {
      throw badUsage('--imatrix steers the rounding to blocks of GGUF files', { got: `--dtype ${wanted ?? '(none)'}`, expected: `--dtype ${blocks.join(', ')}` }); // prettier-ignore
    }
    if (given.mergeLora !== undefined && format !== 'safetensors' && format !== 'torch') {
      throw badUsage(`--merge-lora does not go together with --format ${format}`, { expected: 'safetensors or torch', hint: 'Merge first, then convert the result.' }); // prettier-ignore
    }
    const fuse = new Set(given.fuse as readonly Fuse[]);
    checkFuse(fuse, format, given.mergeLora !== undefined, isBlocks(wanted));
    const options = {
      input: given.input,
      config: given.config,
      dtype: isBlocks(wanted) ? undefined : wanted,
      format,
      ...(isBlocks(wanted) && { blocks: wanted }),
      ...(given.imatrix !== undefined && { imatrix: given.imatrix }),
      ...(fuse.size > 0 && { fuse }),
      ...(given.mergeLora !== undefined && { mergeLora: given.mergeLora }),
      ...(format === 'deepseek-native' && { modelParallel }),
    };
    const plan = await planConversion(options);
    try {
      for (const note of plan.notes) io.log.info(note);
      if (given.dryRun) return await dryRun(plan, given, format, io);
      const { runConversion } = await import('../export/convert.js');
      using env = await openEnvironment(given, io);
      const started = performance.now();
      const { out, overwrite, restart, shardSize, ioBudget, allowSaturation } = given;
      const report = await runConversion(
        plan,
        {
          ...options,
          ...{ out, overwrite, restart, shardSize, ioBudget, allowSaturation },
          recipe: io.settings,
          resumeHint: io.commandLine,
        },
        env,
      );
      const seconds = (performance.now() - started) / 1000;
      await recordConversion(given.out, io);
      const saturated = Object.entries(report.saturated);
      for (const [name, values] of saturated) io.log.warn(`${name}: ${count(values)} values became infinite.`);
      const rate = formatBytes((report.reads + report.writes) / seconds);
      return {
        data: { out: resolve(given.out), format, dtype: given.dtype ?? null, ...report, seconds },
        text: [
          ...report.fused.map(fusedLine),
          `${given.out}: ${count(report.tensors)} tensors, ${formatBytes(report.writes)} (${format}) in ${duration(seconds)}, ${rate}/s read and written.`,
        ].join('\n'),
      };
    } finally {
      await plan.close();
    }
  },
});

const fusedLine = ({ kind, from, into, bytes, error, tolerance }: FusionReport): string =>
  `${kind}: ${from.join(', ')} -> ${into.join(', ')}, ${formatBytes(bytes.before)} -> ${formatBytes(bytes.after)}, difference ${error.toExponential(1)} (exact: at most ${tolerance.toExponential(1)})`;

/** The format that the name of an output says; undefined for a folder. */
function formatOf(out: string): (typeof formats)[number] | undefined {
  if (/\.(bin|pt|pth)$/.test(out)) return 'torch';
  if (out.endsWith('.safetensors')) return 'safetensors';
  return out.endsWith('.gguf') ? 'gguf' : undefined;
}

/** A name that says one format and a flag that says another would make a file that other tools refuse. */
function checkName(out: string, format: (typeof formats)[number]): void {
  if ((formatOf(out) ?? format) !== format) {
    throw badUsage('The name of the output and --format disagree', {
      got: `${out} and --format ${format}`,
      hint: 'Leave --format out, or name the output otherwise.',
    });
  }
  if (out.endsWith('.onnx') || (format === 'onnx' && formatOf(out) !== undefined)) {
    throw badUsage('An ONNX model is a folder: graph, weights, tokenizer and genai_config.json', {
      got: out,
      expected: 'a folder name for -o, and --format onnx',
    });
  }
}

interface Given {
  readonly out: string;
  readonly shardSize: number;
  readonly ioBudget: number;
}

async function dryRun(
  plan: ConvertPlan,
  given: Given,
  format: (typeof formats)[number],
  io: Io,
): Promise<CommandResult> {
  const { planLayout } = await import('../checkpoint/layout.js');
  const { isFileOutput } = await import('../checkpoint/writer.js');

  const { files } = planLayout({
    format,
    tensors: plan.outputs,
    shardSize: given.shardSize,
    fileName: isFileOutput(given.out) ? basename(given.out) : undefined,
    metadata: { format: 'pt' },
    gguf: plan.gguf,
    onnx: plan.onnx,
  });
  const sum = (of: 'reads' | 'writes') => plan.tensors.reduce((n, tensor) => n + tensor[of], 0);
  const [reads, writes] = [sum('reads'), files.reduce((n, { size }) => n + size, 0)];
  const whole = plan.tensors.filter(({ action }) => action === 'decode' || action === 'encode').map(({ reads, shape }) => reads + 8 * shape.reduce((a, b) => a * b, 1)); // prettier-ignore
  // The program itself, and what is under way.
  const memory = 1.2e8 + Math.max(given.ioBudget, ...whole);
  const disk = await freeBytes(await firstFolder(given.out));
  const eta = (reads + writes) / 1e9;
  const actions = plan.tensors.map(({ name, shape, action, from, to, reads, writes }) => ({ name, shape, action, from, to, reads, writes })); // prettier-ignore
  const rows = actions.map((t) => [t.name, `[${t.shape.join(', ')}]`, t.action, t.from === t.to ? t.from : `${t.from} -> ${t.to}`, formatBytes(t.writes)]); // prettier-ignore
  const summary = [
    ['Reads', formatBytes(reads)],
    ['Writes', `${formatBytes(writes)} into ${files.length === 1 ? files[0]!.name : `${files.length} files`}`],
    ['Disk', `${formatBytes(disk)} free`],
    ['Memory', `at most about ${formatBytes(memory)}`],
    ['Time', `about ${duration(eta)} at 1 GB/s read and written`],
  ];
  const short = disk < writes;
  return {
    data: {
      dryRun: true,
      out: resolve(given.out),
      format,
      files: files.map(({ name, size }) => ({ name, bytes: size })),
      tensors: actions,
      reads,
      writes,
      diskFree: disk,
      memory,
      seconds: eta,
      notes: plan.notes,
      fusions: (plan.fusions ?? []).map(({ kind, from, into, bytes }) => ({ kind, from, into, bytes })),
    },
    text: `${columns(rows, 'llllr')}\n\n${columns(summary.map(([a, b]) => [io.paint.bold(a!), b!]), 'll')}\n\nNothing was written.`,
    ...(short && {
      failure: noResource('Not enough disk space for the output', {
        where: given.out,
        expected: `${formatBytes(writes)} free`,
        got: formatBytes(disk),
        hint: 'Free some space, or write to another disk with -o.',
      }),
    }),
  }; // prettier-ignore
}

/** The nearest folder that exists: the output's own may still have to be made. */
async function firstFolder(path: string): Promise<string> {
  const { exists } = await import('../base/files.js');
  let folder = dirname(resolve(path));
  while (!(await exists(folder)) && dirname(folder) !== folder) folder = dirname(folder);
  return folder;
}
