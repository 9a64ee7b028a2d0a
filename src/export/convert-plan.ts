import { dtypeSize, elementCount, type FloatDType } from '../base/dtype.js';
import { OpenFiles } from '../arch/files.js';
import { openModel } from '../arch/open.js';
import { rotationOf } from '../arch/rotate.js';
import type { StoredWeight } from '../arch/stored.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { Checkpoint, PlannedTensor } from '../checkpoint/types.js';
import type { OutputFormat } from '../checkpoint/layout.js';
import type { GgufMetadata } from '../checkpoint/gguf-config.js';
import type { OnnxGraph } from '../formats/onnx-writer.js';
import { imatrixHash, readImatrix } from '../targets/imatrix.js';
import { readAdapter, requireMergeable, requireUnrotated, withAdapter, type Adapter } from './merge-lora.js';
import { planTensor } from './convert-tensor.js';
import type { PlannedConversion } from './convert-tensor.js';
import { planGgufOutput, planNativeOutput } from './convert-formats.js';
import { planOnnxOutput } from './convert-onnx.js';
import { reshape } from './fuse.js';
import { fusings, type Fuse, type Fusion } from './fusion.js';
import type { BlockType, FormatPlan } from './convert-formats.js';

export interface ConvertOptions {
  readonly input: string;
  readonly config?: string | undefined;
  /** What floating-point weights become; undefined: what they are. */
  readonly dtype?: FloatDType | undefined;
  readonly format: OutputFormat;
  /** GGUF only: weights become blocks of this type. */
  readonly blocks?: BlockType | undefined;
  /** GGUF only: a file of llama.cpp's importance matrix. */
  readonly imatrix?: string | undefined;
  /** A PEFT folder whose LoRA is merged into the weights. */
  readonly mergeLora?: string | undefined;
  /** What is fused, split or folded on the way. */
  readonly fuse?: ReadonlySet<Fuse> | undefined;
  /** DeepSeek's native layout only: the number of shards. */
  readonly modelParallel?: number | undefined;
}

export type { PlannedConversion } from './convert-tensor.js';

export interface ConvertPlan {
  readonly checkpoint: Checkpoint;
  readonly tensors: readonly PlannedConversion[];
  /** Everything that is planned, tied tensors too. */
  readonly outputs: readonly PlannedTensor[];
  /** Only for GGUF. */
  readonly gguf?: GgufMetadata;
  /** Only for ONNX. */
  readonly onnx?: OnnxGraph;
  /** More files of the output by name. */
  readonly extraFiles?: ReadonlyMap<string, string>;
  /** Tensors of the output whose values follow from the config. */
  readonly computed: ReadonlyMap<string, Float32Array>;
  /** Of the importance matrix that was read. */
  readonly imatrixHash?: string;
  readonly adapter?: Adapter;
  /** What stands in the output otherwise than in the input. */
  readonly fusions?: readonly Fusion[];
  readonly config: Readonly<Record<string, unknown>>;
  readonly notes: readonly string[];
  /** What `TensorLoader` needs. */
  readonly source: {
    readonly tensors: ReadonlyMap<string, StoredWeight>;
    readonly file: OpenFiles['get'];
  };
  close(): Promise<void>;
}

const configName: Record<FloatDType, string> = { f32: 'float32', bf16: 'bfloat16', f16: 'float16' };

/**
 * Decides for each tensor what is read, done and written; reads headers only.
 * Errors: what opening the checkpoint refuses; tensors that the output's format cannot hold.
 */
export async function planConversion(options: ConvertOptions): Promise<ConvertPlan> {
  const plan = await planUnmerged(options);
  if (options.mergeLora === undefined) return plan;
  try {
    requireMergeable(plan.tensors, plan.checkpoint.config, options.input);
    requireUnrotated(await rotationOf(plan.checkpoint.path), options.input);
    const shapes = new Map(plan.tensors.map(({ name, shape }) => [name, shape]));
    const adapter = await readAdapter(options.mergeLora, shapes);
    const tensors = withAdapter(plan.tensors, adapter);
    const source = { ...plan.source, tensors: new Map([...plan.source.tensors, ...adapter.tensors]), file: plan.source.file }; // prettier-ignore
    return {
      ...plan,
      tensors,
      adapter,
      source,
      notes: [...plan.notes, adapter.description],
      close: () => plan.close(),
    };
  } catch (error) {
    await plan.close();
    throw error;
  }
}

async function planUnmerged(options: ConvertOptions): Promise<ConvertPlan> {
  const { input, format } = options;
  if (format === 'onnx') return planOnnx(options);
  const isNative = format === 'deepseek-native';
  const stored = await openCheckpoint(input, { config: options.config, keepScales: isNative });
  const { checkpoint: reshaped, fusions, notes } = reshape(stored, options.fuse ?? new Set(), format);
  const checkpoint = { ...reshaped, notes: [...reshaped.notes, ...notes] };
  return { ...(await planStored(checkpoint, options)), fusions };
}

async function planStored(checkpoint: Checkpoint, options: ConvertOptions): Promise<ConvertPlan> {
  const { dtype, format } = options;
  const imatrix = options.imatrix === undefined ? undefined : await readImatrix(options.imatrix);
  if (format === 'gguf') {
    const plan = planFormat(checkpoint, await planGgufOutput(checkpoint, dtype, options.blocks, imatrix));
    return imatrix === undefined ? plan : { ...plan, imatrixHash: imatrixHash(imatrix) };
  }
  if (format === 'deepseek-native')
    return planFormat(checkpoint, planNativeOutput(checkpoint, options.modelParallel ?? 1));
  const quantized = checkpoint.config.quantization_config !== undefined;
  // MatMulNBits stands in ONNX graphs only: elsewhere nobody would read it.
  const wanted = dtype ?? (checkpoint.format === 'onnx' ? 'bf16' : undefined);
  if (quantized && wanted !== undefined) return planDequantization(checkpoint, { ...options, dtype: wanted });
  return planPlain(checkpoint, options);
}

/** Formats that have names and arrangements of their own. */
function planFormat(checkpoint: Checkpoint, plan: FormatPlan): ConvertPlan {
  const files = new OpenFiles();
  const weights = plan.tensors.map(({ name, shape, entry }): [string, StoredWeight] => [
    name,
    { name, shape, entry, sources: [name], files: [entry.span.path] },
  ]);
  return {
    checkpoint,
    computed: new Map(),
    ...plan,
    config: checkpoint.config,
    notes: [...checkpoint.notes, ...plan.notes],
    source: { tensors: new Map(weights), file: (path) => files.get(path) },
    close: async () => {
      await files.close();
      await checkpoint.close();
    },
  };
}

/** A graph that says what the architecture computes, and its weights. */
async function planOnnx({ input, config, dtype, fuse = new Set() }: ConvertOptions): Promise<ConvertPlan> {
  const fusions: Fusion[] = [];
  const folded: string[] = [];
  const before = (checkpoint: Checkpoint): Checkpoint => {
    const done = reshape(checkpoint, fuse, 'onnx');
    fusions.push(...done.fusions);
    folded.push(...done.notes);
    return done.checkpoint;
  };
  const open = await openModel(input, { config, reshape: before });
  try {
    const plan = planOnnxOutput(open, dtype, new Set(fusings.filter((kind) => fuse.has(kind))));
    const notes = [...open.notes, ...folded, ...plan.notes];
    const source = { tensors: new Map([...open.tensors, ...plan.joined]), file: (path: string) => open.file(path) };
    return {
      ...{ checkpoint: open.checkpoint, ...plan, notes, source, fusions: [...fusions, ...plan.fusions] },
      close: () => open.close(),
    };
  } catch (error) {
    await open.close();
    throw error;
  }
}

/** The checkpoint's tensors one by one: no architecture needs to be known. */
function planPlain(checkpoint: Checkpoint, { dtype, format }: ConvertOptions): ConvertPlan {
  const files = new OpenFiles();
  const notes = [...checkpoint.notes];
  const encoded = [...checkpoint.tensors.values()].some(
    ({ encoding: { kind } }) => kind === 'ggml' || kind === 'scaled',
  );
  const weights = new Map<string, StoredWeight>();
  const planned = [...checkpoint.tensors.values()].map((entry) => {
    const { name, shape, span } = entry;
    weights.set(name, { name, shape, entry, sources: [name], files: [span.path] });
    return planTensor(entry, dtype ?? checkpoint.widened.get(name));
  });
  const { tensors, outputs } = shareTied(planned, format, checkpoint.config, notes);
  return {
    checkpoint,
    tensors,
    outputs,
    computed: new Map(),
    config: outputConfig(checkpoint.config, encoded ? (dtype ?? 'bf16') : dtype, encoded),
    notes,
    source: { tensors: weights, file: (path) => files.get(path) },
    close: async () => {
      await files.close();
      await checkpoint.close();
    },
  };
}

/** A quantized checkpoint whose weights are asked for in `dtype`: under the names and shapes of its architecture. */
async function planDequantization(checkpoint: Checkpoint, options: ConvertOptions): Promise<ConvertPlan> {
  await checkpoint.close();
  const open = await openModel(options.input, { config: options.config });
  const dtype = options.dtype!;
  const notes = [...open.notes];
  const planned = [...open.tensors.values()].map((weight): PlannedConversion => {
    if (!weight.linear) return planTensor(weight.entry, dtype);
    const { name, shape } = open.spec(weight.name) ?? weight;
    const reads = [...weight.linear.parts.values()].reduce((n, part) => n + part.span.bytes, 0);
    const from = `${weight.linear.bits}-bit codes`;
    const writes = elementCount(shape) * dtypeSize(dtype);
    return { name, shape, action: 'decode', from, to: dtype, reads, writes, entry: weight.entry, output: { name, shape, dtype } };
  }); // prettier-ignore
  const { tensors, outputs } = shareTied(planned, options.format, open.checkpoint.config, notes);
  return {
    checkpoint: open.checkpoint,
    tensors,
    outputs,
    computed: new Map(),
    config: outputConfig(open.checkpoint.config, dtype, true),
    notes,
    source: open,
    close: () => open.close(),
  };
}

/**
 * Tensors that are one storage in a PyTorch file. PyTorch output keeps them one; safetensors knows no sharing, and
 * there a tied head is left out (readers take the embedding), anything else becomes a copy of its own.
 */
function shareTied(
  planned: readonly PlannedConversion[],
  format: OutputFormat,
  config: Checkpoint['config'],
  notes: string[],
): { tensors: PlannedConversion[]; outputs: PlannedTensor[] } {
  const owners = new Map<string, string>();
  const tensors: PlannedConversion[] = [];
  const outputs: PlannedTensor[] = [];
  const copies: string[] = [];
  for (const tensor of planned) {
    const { span, strides } = tensor.entry;
    const place = JSON.stringify([span, strides ?? null, tensor.shape, tensor.to]);
    const owner = span.bytes > 0 ? owners.get(place) : undefined;
    if (owner === undefined) {
      owners.set(place, tensor.name);
    } else if (format === 'torch') {
      outputs.push({ ...tensor.output, tiedTo: owner });
      continue;
    } else if (config.tie_word_embeddings === true && /lm_head\.weight$|embed_tokens\.weight$/.test(tensor.name)) {
      notes.push(`${tensor.name} is the same tensor as ${owner} and is left out, as tied weights are in safetensors.`);
      continue;
    } else {
      copies.push(tensor.name);
    }
    tensors.push(tensor);
    outputs.push(tensor.output);
  }
  if (copies.length > 0) notes.push(`Tensors that shared memory become copies: ${copies.slice(0, 3).join(', ')}${copies.length > 3 ? ` and ${copies.length - 3} more` : ''}.`); // prettier-ignore
  return { tensors, outputs };
}

function outputConfig(config: Checkpoint['config'], dtype: FloatDType | undefined, plain: boolean) {
  const out: Record<string, unknown> = { ...config };
  if (dtype !== undefined) {
    const key = 'torch_dtype' in out && !('dtype' in out) ? 'torch_dtype' : 'dtype';
    delete out.torch_dtype;
    out[key] = configName[dtype];
  }
  if (plain) {
    delete out.quantization_config;
    delete out.compression_config;
    delete out.expert_dtype;
  }
  return out;
}
