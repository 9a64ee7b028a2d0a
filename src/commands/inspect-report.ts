import { stat } from 'node:fs/promises';
import { basename } from 'node:path';
import { ConvertError } from '../base/errors.js';
import { elementCount } from '../base/dtype.js';
import { formatBytes } from '../base/files.js';
import { columns, count, factRows, short } from '../base/text.js';
import { buildModel } from '../arch/registry.js';
import { isPlain, storedWeights, type StoredWeight } from '../arch/stored.js';
import type { Model } from '../arch/types.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { Checkpoint, Encoding, TensorEntry } from '../checkpoint/types.js';
import { detectLayout } from '../layout/detect.js';
import { outlook, type Outlook } from './outlook.js';
import { looks, type LookValues, type Stored } from './inspect-look.js';
import { encodingName, summarize, type Held, type ModelSummary } from './summary.js';
import type { CommandResult, Io } from './types.js';

/** Tensors beyond which plans would take longer than a look at the model should: inspect answers within a second. */
const mostForeseen = 20_000;

export interface Given extends LookValues {
  readonly config: string | undefined;
  readonly tensors: boolean;
}

/** What is in a model, from its headers. */
export async function inspect(given: Given, io: Io): Promise<CommandResult> {
  const checkpoint = await openCheckpoint(given.input, { config: given.config, configOptional: true });
  try {
    return await report(checkpoint, given, io);
  } finally {
    await checkpoint.close();
  }
}

async function report(checkpoint: Checkpoint, given: Given, io: Io): Promise<CommandResult> {
  const { config, configPath } = checkpoint;
  const listed = given.tensors;
  const notes = [...checkpoint.notes];
  const { model, held, weights } = understand(checkpoint, notes);
  const summary = model && summarize(model, held);
  notes.push(...(summary?.problems ?? []));
  const foreseen = checkpoint.tensors.size <= mostForeseen;
  if (!foreseen) notes.push('So many tensors are not planned here: quantize --dry-run and moe --dry-run say what they would do.'); // prettier-ignore
  const would = summary?.problems.length === 0 && foreseen ? await outlook(given.input, given.config) : undefined;
  const files = await Promise.all(checkpoint.files.map(async (path) => ({ path, bytes: (await stat(path)).size })));
  const stored = histogram(checkpoint);
  const tokenizer = checkpoint.companions.find((path) => /tokenizer\.(json|model)$/.test(path));
  const quantization = quantizationOf(config);
  const data = {
    path: checkpoint.path,
    format: checkpoint.format,
    files,
    fingerprint: checkpoint.fingerprint,
    configPath: configPath ?? null,
    modelType: text(config.model_type) ?? null,
    architecture: Array.isArray(config.architectures) ? (config.architectures as unknown[])[0] : null,
    supported: model !== undefined,
    parameters: summary?.parameters ?? { total: null, active: null },
    ...(model && shape(model)),
    experts: summary?.experts ?? null,
    memory: summary?.memory ?? null,
    carried: summary?.carried ?? [],
    would: would ?? null,
    stored,
    quantization: quantization ?? null,
    tokenizer: tokenizer ?? null,
    notes,
    ...(listed && { tensors: tensorList(checkpoint) }),
  };
  const bytes = files.reduce((n, file) => n + file.bytes, 0);
  const rows: string[][] = [
    ['Model', `${checkpoint.path} (${checkpoint.format}, ${plural(files.length, 'file')}, ${formatBytes(bytes)})`],
    ['Architecture', architecture(data.modelType, data.architecture, model)],
    ...(model && summary ? modelRows(model, summary) : []),
    ...(summary && summary.carried.length > 0 ? [['Carried through', carriedThrough(summary.carried)]] : []),
    ['Stored as', stored.map((s) => `${s.type}: ${plural(s.tensors, 'tensor')}, ${formatBytes(s.bytes)}`).join('; ')],
    ...(quantization ? [['Quantized', `${quantization.method}${quantization.bits ? `, ${quantization.bits} bits` : ''}`]] : []),
    ['Tokenizer', tokenizer === undefined ? 'none' : basename(tokenizer)],
    ...(would ? outlookRows(would) : []),
  ]; // prettier-ignore
  const look = looks(given)
    ? await (await import('./inspect-view.js')).view({ checkpoint, model, stored: weights(), types: stored, facts: rows, notes }, given, io) // prettier-ignore
    : undefined;
  const parts = [
    factRows(
      rows.map(([name, value]) => [io.paint.bold(name!), value!]),
      io.width,
    ),
  ];
  if (notes.length > 0) parts.push(notes.map((note) => `${io.paint.yellow('note:')} ${note}`).join('\n'));
  parts.push(...(look?.parts ?? []));
  if (listed) parts.push(tensorTable(checkpoint));
  return { data: { ...data, ...look?.data }, text: parts.join('\n\n') };
}

interface Understood {
  /** Undefined, with a note why: what is stored can be shown all the same. */
  readonly model: Model | undefined;
  readonly held: Held;
  readonly weights: () => ReadonlyMap<string, StoredWeight>;
}

function understand({ config, configPath, tensors }: Checkpoint, notes: string[]): Understood {
  const nothing = { model: undefined, held: new Map(), weights: () => new Map<string, StoredWeight>() };
  if (configPath === undefined) {
    notes.push('No config.json beside it and no --config: only what is stored is known.');
    return nothing;
  }
  try {
    const layout = detectLayout(config, configPath);
    const weights = () => storedWeights(tensors, layout);
    const held = isPlain(tensors, layout) ? tensors : weights();
    return { model: buildModel(config, configPath, (name) => held.has(name)), held, weights };
  } catch (error) {
    if (!(error instanceof ConvertError) || error.kind !== 'input') throw error;
    notes.push(error.message.replace(/\s*\n\s*/g, ' '));
    return nothing;
  }
}

function outlookRows({ quantize, moe }: Outlook): string[][] {
  const bytes = ({ from, to }: { from: number; to: number }) => `${formatBytes(from)} -> ${formatBytes(to)}`;
  const quantizing = 'refused' in quantize
    ? quantize.refused
    : `${plural(quantize.linears, 'linear')} to ${quantize.bitsPerWeight.toFixed(2)} bits, ${quantize.left.reduce((n, { linears }) => n + linears, 0)} left in high precision, ${bytes(quantize.bytes)}`; // prettier-ignore
  const dividing = 'refused' in moe ? moe.refused : `${moe.shape}, ${bytes(moe.bytes)}`;
  return [
    ['quantize would', quantizing],
    ['moe would', dividing],
  ];
}

const shape = ({ blocks, hidden, heads, kvHeads, headDim, vocab, tied, context }: Model) => ({
  layers: blocks.length,
  hidden,
  heads,
  kvHeads,
  headDim,
  vocab,
  tied,
  context,
});

function modelRows(model: Model, { parameters, experts, memory }: ModelSummary): string[][] {
  const { total, active } = parameters;
  const streams = model.stateWidth / model.hidden;
  const rows = [
    ['Parameters', `${short(total)} (${count(total)})${active < total ? `, ${short(active)} active a token` : ''}`],
    ['Layers', `${model.blocks.length}, hidden ${model.hidden}${streams > 1 ? ` in ${streams} streams` : ''}`],
    ['Attention', `${plural(model.heads, 'head')} of ${model.headDim}, ${model.kvHeads} for keys and values`],
  ];
  if (experts) {
    const shared = experts.shared > 0 ? `, ${experts.shared} shared` : '';
    const where = `in ${experts.layers.length} of ${model.blocks.length} layers`;
    rows.push(['Experts', `${experts.routed}, ${experts.active} active${shared}, width ${experts.width}, ${where}`]);
  }
  rows.push(
    ['Vocabulary', `${count(model.vocab)}${model.tied ? ', head tied to the embedding' : ''}`],
    ['Context', `${count(model.context)} tokens`],
    ['Weights need', `${formatBytes(memory.bf16)} at bf16, ${formatBytes(memory.int4)} at INT4 (groups of 128)`],
    [
      'KV cache needs',
      `${formatBytes(memory.kvCachePerToken)} a token, ${formatBytes(memory.kvCache)} for the whole context (bf16)`,
    ],
  );
  return rows;
}

function architecture(type: string | null, name: unknown, model: Model | undefined): string {
  if (type === null) return 'unknown';
  const known = model ? '' : ', not supported';
  return typeof name === 'string' ? `${type} (${name})${known}` : `${type}${known}`;
}

function histogram({ tensors }: Checkpoint): Stored[] {
  const types = new Map<string, Stored>();
  let type = '';
  let before: TensorEntry | undefined;
  for (const entry of tensors.values()) {
    if (!before || !sameEncoding(entry.encoding, before.encoding)) type = encodingName(entry);
    before = entry;
    const at = types.get(type) ?? { type, tensors: 0, values: 0, bytes: 0 };
    at.tensors += 1;
    at.values += elementCount(entry.shape);
    at.bytes += entry.span.bytes;
    types.set(type, at);
  }
  return [...types.values()].sort((a, b) => b.bytes - a.bytes);
}

/** Whether the name is the same without looking further: neighbours mostly are, and names take time to make. */
const sameEncoding = (a: Encoding, b: Encoding): boolean =>
  a === b || (a.kind === 'scaled' && b.kind === 'scaled' && a.element === b.element && a.block === b.block);

function quantizationOf(config: Checkpoint['config']): { method: string; bits: number | undefined } | undefined {
  const found = config.quantization_config as Record<string, unknown> | undefined;
  if (typeof found !== 'object' || found === null) return undefined;
  const groups = Object.values((found.config_groups ?? {}) as Record<string, { weights?: { num_bits?: number } }>);
  const bits = typeof found.bits === 'number' ? found.bits : groups[0]?.weights?.num_bits;
  return { method: text(found.quant_method) ?? 'unknown', bits };
}

const tensorList = ({ tensors }: Checkpoint) =>
  [...tensors.values()].map((entry) => ({
    name: entry.name,
    type: encodingName(entry),
    shape: entry.shape,
    bytes: entry.span.bytes,
    file: basename(entry.span.path),
    offset: entry.span.offset,
  }));

function tensorTable(checkpoint: Checkpoint): string {
  const several = checkpoint.files.length > 1;
  const rows = tensorList(checkpoint).map(({ name, type, shape, bytes, file }) => [
    name,
    type,
    `[${shape.join(', ')}]`,
    formatBytes(bytes),
    ...(several ? [file] : []),
  ]);
  return columns(rows, several ? 'lllrl' : 'lllr');
}

/** `12 tensors: model.vision_model (10), model.aligner (2)`. */
function carriedThrough(names: readonly string[]): string {
  const parts = new Map<string, number>();
  for (const name of names) {
    const part = name.split('.').slice(0, /^model\.layers\./.test(name) ? 3 : 2).join('.'); // prettier-ignore
    parts.set(part, (parts.get(part) ?? 0) + 1);
  }
  const shown = [...parts].slice(0, 6).map(([part, count]) => `${part} (${count})`);
  return `${plural(names.length, 'tensor')}: ${shown.join(', ')}${parts.size > shown.length ? ' and others' : ''}`;
}

const plural = (n: number, noun: string): string => `${count(n)} ${noun}${n === 1 ? '' : 's'}`;
const text = (value: unknown): string | undefined => (typeof value === 'string' ? value : undefined);
