import { existsSync, statSync } from 'node:fs';
import { join } from 'node:path';
import { elementCount } from '../base/dtype.js';
import { badInput, badUsage } from '../base/errors.js';
import { formatBytes, readJsonFile } from '../base/files.js';
import type { Values } from '../base/options.js';
import { columns, count, shellQuote } from '../base/text.js';
import type { Model } from '../arch/types.js';
import { activationBytes } from '../quant/footprint.js';
import {
  bf16,
  choose,
  figuresOf,
  footprints,
  schemes,
  type Figures,
  type Scheme,
  type Wanted,
} from './advise-figures.js';
import { adviseOptions } from './advise-options.js';
import { explain } from './advise-explain.js';
import { findGpu, readHardware, type Gpu, type Hardware } from './hardware.js';
import { input } from './shared.js';
import { defineCommand, type Io } from './types.js';

export const command = defineCommand({
  name: 'advise',
  description:
    "Reads the config (and headers, where there are weights): what fits a GPU at which precision, memory, decoding speed by the GPU's bandwidth, and the command to run next. Every figure is arithmetic on data sheets, not a measurement: --explain shows it.",
  arguments: { input: { ...input, value: 'model', help: 'A model, or its config.json alone.' } },
  options: adviseOptions,
  examples: [
    ['advise fixtures/moe-6m --gpu l4', 'What to make of a model for one L4.'],
    ['advise fixtures/advise/llama-3-8b.config.json --gpu a100-40g --goal latency --context 8192 --explain', 'The fastest form, with every formula.'],
    ['advise fixtures/advise/deepseek-v3.config.json --context 32768', 'Which GPUs would do, and how many.'],
  ],
  async run(given, io) {
    const hardware = await readHardware(given.hardware);
    if (given.explain && given.gpu === undefined) {
      throw badUsage('--explain needs --gpu', { hint: 'For example: --gpu h100-80g --explain' });
    }
    const gpu = given.gpu === undefined ? undefined : findGpu(hardware, given.gpu);
    const source = await readModel(given.input, given.config);
    const context = given.context ?? source.model.context;
    if (context > source.model.context) {
      throw badUsage('--context is longer than the positions that the model was made for', {
        got: String(context),
        expected: `at most ${source.model.context}`,
      });
    }
    const { goal, sequences, utilization } = given;
    const activations = activationBytes(source.model, Math.max(sequences, Math.min(given.prefill, context)), sequences);
    const wanted: Wanted = { goal, context, sequences, utilization, activations };
    const prints = footprints(source.model, source.candidates, source.stores);
    const on = (one: Gpu, gpus: number) =>
      prints.map((print) => figuresOf(source.model, print, { gpu: one, gpus, efficiency: hardware.efficiency }, wanted));
    return gpu ? forOne({ ...given, ...wanted, asked: given.context }, source, hardware, gpu, on, io) : forAll({ ...given, ...wanted, asked: given.context }, source, hardware, on, io);
  },
}); // prettier-ignore

type Given = Omit<Values<typeof adviseOptions>, 'context'> & Wanted & { readonly asked: number | undefined };
type On = (gpu: Gpu, gpus: number) => Figures[];

interface Source {
  readonly model: Model;
  /** From the most exact to the least. */
  readonly candidates: readonly Scheme[];
  /** How it is stored now, where that is one of the candidates. */
  readonly now: Scheme | undefined;
  /** The folder or file with the weights; `MODEL` where there is only a config. */
  readonly path: string;
  readonly stores: (name: string) => boolean;
  readonly notes: readonly string[];
}

/** A checkpoint's headers, or a config.json without weights. */
async function readModel(path: string, given: string | undefined): Promise<Source> {
  const { buildModel } = await import('../arch/registry.js');
  const lone = loneConfig(path);
  if (lone !== undefined) {
    const config = (await readJsonFile(lone)) as Readonly<Record<string, unknown>>;
    const dense = config.quantization_config === undefined ? bf16 : undefined;
    return sourceOf(buildModel(config, lone), config, 'MODEL', () => false, dense, ['Only the config was read. MODEL in the commands is the folder with the weights.']); // prettier-ignore
  }
  const { openModel } = await import('../arch/open.js');
  const open = await openModel(path, { config: given });
  try {
    const entries = [...open.checkpoint.tensors.values()];
    const values = (list: typeof entries) => list.reduce((n, { shape }) => n + elementCount(shape), 0);
    const halves = entries.filter(({ encoding }) => encoding.kind === 'plain' && /^b?f16$/.test(encoding.dtype));
    // Biases of routers and the like are in fp32 in models that count as bf16.
    const half = open.layout === undefined && values(halves) > 0.95 * values(entries);
    const names = new Set(open.tensors.keys());
    return sourceOf(open.model, open.checkpoint.config, path, (name) => names.has(name), half ? bf16 : undefined, open.notes); // prettier-ignore
  } finally {
    await open.close();
  }
}

/** The config, where the path is one or a folder that holds nothing else to read. */
function loneConfig(path: string): string | undefined {
  if (!existsSync(path)) return undefined;
  if (!statSync(path).isDirectory()) return path.endsWith('config.json') ? path : undefined;
  const inside = join(path, 'config.json');
  const weights = ['model.safetensors', 'model.safetensors.index.json', 'pytorch_model.bin', 'pytorch_model.bin.index.json']; // prettier-ignore
  return existsSync(inside) && !weights.some((name) => existsSync(join(path, name))) ? inside : undefined;
}

function sourceOf(
  model: Model,
  config: Readonly<Record<string, unknown>>,
  path: string,
  stores: (name: string) => boolean,
  now: Scheme | undefined,
  notes: readonly string[],
): Source {
  const carried = model.carried.length > 0 ? [`Not counted, because no step of decoding needs it: ${model.carried.join(', ')}`] : []; // prettier-ignore
  const base = { model, path, stores, notes: [...notes, ...carried] };
  const quantized = storedScheme(config);
  if (quantized === undefined) return { ...base, now, candidates: [bf16, ...schemes] };
  if (quantized.storage.kind === 'fp8') return { ...base, now: quantized, candidates: [bf16, quantized, ...schemes] };
  // Codes are not rounded a second time: what there is, is what there is to serve.
  return { ...base, now: quantized, candidates: [quantized] };
}

/** What `quantization_config` says of a model's own storage. Errors: one that this arithmetic does not know. */
function storedScheme(config: Readonly<Record<string, unknown>>): Scheme | undefined {
  const found = config.quantization_config as Record<string, unknown> | null | undefined;
  if (found === undefined || found === null) return undefined;
  if (found.quant_method === 'fp8') {
    const [rows, tileColumns] = Array.isArray(found.weight_block_size) ? (found.weight_block_size as number[]) : [128, 128]; // prettier-ignore
    return { name: 'fp8, stored', storage: { kind: 'fp8', tile: [rows!, tileColumns!] }, options: undefined };
  }
  const groups = Object.values((found.config_groups ?? {}) as Record<string, { weights?: { num_bits?: unknown; group_size?: unknown } }>); // prettier-ignore
  const bits = found.bits ?? groups[0]?.weights?.num_bits;
  const group = found.group_size ?? groups[0]?.weights?.group_size ?? -1;
  if (typeof bits !== 'number' || typeof group !== 'number' || groups.length > 1) {
    throw badInput('The quantization of this model has no one width to count with', {
      got: JSON.stringify(found).slice(0, 200),
      expected: 'fp8, or one number of bits and one group size',
      hint: 'deepseek-convert inspect <model> shows what is stored.',
    });
  }
  return {
    name: `int${bits} ${group === -1 ? 'rows' : `g${group}`}, stored`,
    storage: { kind: 'grid', bits, group },
    options: undefined,
  };
}

function forOne(given: Given, source: Source, hardware: Hardware, gpu: Gpu, on: On, io: Io) {
  const all = on(gpu, given.gpus);
  const chosen = choose(all, given.goal);
  const needed = chosen ? undefined : enough(on, gpu, given);
  const rows = all.map((f) => [
    f === chosen ? '>' : '',
    f.scheme.name,
    ...[f.weights, f.cache, f.activations, f.total].map(formatBytes),
    f.fits ? 'yes' : 'no',
    f.fits ? count(f.mostSequences) : '',
    count(Number(f.tokensPerSecond.toPrecision(3))),
  ]);
  const heads = ['', 'stored as', 'weights', 'KV cache', 'activ.', 'all', 'fits', 'at once', 'tokens/s'];
  const many = given.gpus === 1 ? gpu.name : `${given.gpus} x ${gpu.name}`;
  const picked = chosen ?? needed;
  const next = picked ? nextCommands(source, picked, given) : [];
  const price = picked && priceOf(given.price ?? gpu.usdPerHour, picked);
  const verdict = verdictOf(chosen, needed, many, gpu, given);
  const parts = [
    `${many}: ${formatBytes(gpu.memoryGB * 1e9)} each, of which ${Math.round(100 * given.utilization)}% are used; ${count(given.context)} tokens, ${count(given.sequences)} at once`,
    columns([heads.map((head) => io.paint.bold(head)), ...rows], 'llrrrrlrr'),
    verdict + (price === undefined ? '' : ` ${price.toPrecision(3)} dollars a million tokens.`),
    ...(next.length > 0 ? [`Next:\n${next.map((line) => `  ${line}`).join('\n')}`] : []),
    ...(given.explain && picked ? [explain(source.model, picked, gpu, hardware, given)] : []),
    ...source.notes.map((note) => `${io.paint.yellow('note:')} ${note}`),
    `Speeds are what the data sheet's bandwidth allows at ${hardware.efficiency.bandwidth} of its rate, a bound: launches, sampling and communication come on top. "at once": sequences of that length that fit.${given.explain ? '' : ' --explain shows every formula.'}`,
  ]; // prettier-ignore
  return Promise.resolve({
    data: {
      model: source.path,
      gpu,
      gpus: given.gpus,
      goal: given.goal,
      context: given.context,
      sequences: given.sequences,
      hardwareDate: hardware.date,
      efficiency: hardware.efficiency,
      schemes: all.map(plain),
      chosen: chosen?.scheme.name ?? null,
      gpusNeeded: picked?.gpus ?? null,
      next,
      usdPerMillionTokens: price ?? null,
      notes: source.notes,
    },
    text: parts.join('\n\n'),
  });
}

function forAll(given: Given, source: Source, hardware: Hardware, on: On, io: Io) {
  const found = [...hardware.gpus.values()].map((gpu) => ({ gpu, figures: choose(on(gpu, given.gpus), given.goal) ?? enough(on, gpu, given) })); // prettier-ignore
  const rows = found.map(({ gpu, figures }) =>
    figures === undefined
      ? [gpu.name, 'none', '', '', '', '']
      : [gpu.name, String(figures.gpus), figures.scheme.name, `${formatBytes(figures.total)} of ${formatBytes(gpu.memoryGB * 1e9)}`, count(Number(figures.tokensPerSecond.toPrecision(3))), priceOf(given.price ?? gpu.usdPerHour, figures)?.toPrecision(3) ?? ''],
  ); // prettier-ignore
  const priced = rows.some((row) => row[5] !== '');
  const heads = ['GPU', 'needed', 'stored as', 'memory of each', 'tokens/s', priced ? 'USD/M' : ''].map((head) =>
    io.paint.bold(head),
  );
  return Promise.resolve({
    data: {
      model: source.path,
      goal: given.goal,
      context: given.context,
      sequences: given.sequences,
      hardwareDate: hardware.date,
      gpus: found.map(({ gpu, figures }) => ({
        gpu: gpu.name,
        chosen: figures ? plain(figures) : null,
        usdPerMillionTokens: (figures && priceOf(given.price ?? gpu.usdPerHour, figures)) ?? null,
      })),
      notes: source.notes,
    },
    text: [
      `${count(given.context)} tokens, ${count(given.sequences)} at once, goal ${given.goal}`,
      columns([heads, ...rows], 'lrlrrr'),
      ...source.notes.map((note) => `${io.paint.yellow('note:')} ${note}`),
      'With --gpu <name>: every precision on it, and the command to run next.',
    ].join('\n\n'),
  });
}

/** The fewest GPUs, doubled from those given, on which something fits. */
function enough(on: On, gpu: Gpu, { gpus, goal }: Given): Figures | undefined {
  for (let n = 2 * gpus; n <= 64; n *= 2) {
    const chosen = choose(on(gpu, n), goal);
    if (chosen) return chosen;
  }
  return undefined;
}

function verdictOf(chosen: Figures | undefined, needed: Figures | undefined, many: string, gpu: Gpu, { goal }: Given) {
  if (chosen) {
    const { scheme, total, usable, tokensPerSecond, boundBy } = chosen;
    return `For ${goal}: ${scheme.name}. ${formatBytes(total)} of ${formatBytes(usable)}; about ${count(Number(tokensPerSecond.toPrecision(3)))} tokens/s a sequence, bound by ${boundBy}.`;
  }
  const instead = needed
    ? `${needed.gpus} of them would do, with ${needed.scheme.name}: ${formatBytes(needed.total)} of ${formatBytes(needed.usable)} each.`
    : `64 ${gpu.name} would not do either: a shorter --context or fewer --sequences would.`;
  return `Nothing fits on ${many}. ${instead}`;
}

/** Commands as they can be typed: what makes the form, and what serves it. */
function nextCommands({ path, now }: Source, { scheme, gpus }: Figures, given: Given): string[] {
  const serve = (model: string) => {
    const parallel = gpus > 1 ? ` --tensor-parallel-size ${gpus}` : '';
    const length = given.asked === undefined ? '' : ` --max-model-len ${given.asked}`;
    return `vllm serve ${shellQuote(model)}${parallel}${length}`;
  };
  const stem = path.replace(/\/+$/, '').replace(/\.(safetensors|bin|pt|pth|gguf|config\.json)$/, '');
  if (scheme.options !== undefined) {
    const out = `${stem}-${scheme.name.replaceAll(' ', '-')}`;
    return [['deepseek-convert quantize', shellQuote(path), '-o', shellQuote(out), ...scheme.options].join(' '), serve(out)]; // prettier-ignore
  }
  if (now?.name === scheme.name) return [serve(path)];
  const out = `${stem}-bf16`;
  return [`deepseek-convert convert ${shellQuote(path)} -o ${shellQuote(out)} --dtype bf16`, serve(out)];
}

/** Dollars a million tokens, all sequences together. */
const priceOf = (usdPerHour: number | undefined, { allTokensPerSecond, gpus }: Figures): number | undefined =>
  usdPerHour === undefined ? undefined : (usdPerHour * gpus * 1e6) / (3600 * allTokensPerSecond);

const plain = ({ scheme, print, ...figures }: Figures) => ({
  scheme: scheme.name,
  ...figures,
  weightsOfAll: print.weights,
  activeParameters: Math.round(print.activeParameters),
});
