import { badInput } from '../base/errors.js';
import { dtypeSize, elementCount, type DType, type FloatDType } from '../base/dtype.js';
import { OpenFiles } from '../arch/files.js';
import { openModel } from '../arch/open.js';
import type { StoredWeight } from '../arch/stored.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { Checkpoint, PlannedTensor, TensorEntry } from '../checkpoint/types.js';
import type { OutputFormat } from '../checkpoint/layout.js';
import { encodedBytes, encodingName } from '../formats/ggml.js';

export interface ConvertOptions {
  readonly input: string;
  readonly config?: string | undefined;
  /** What floating-point weights become; undefined: what they are. */
  readonly dtype?: FloatDType | undefined;
  readonly format: OutputFormat;
}

/** What happens to one tensor. */
export interface PlannedConversion {
  readonly name: string;
  readonly shape: readonly number[];
  /** `copy`: the bytes as they are; `cast`: element by element; `decode`: from blocks, codes or a view. */
  readonly action: 'copy' | 'cast' | 'decode';
  readonly from: string;
  readonly to: string;
  /** Bytes read and written. */
  readonly reads: number;
  readonly writes: number;
  readonly entry: TensorEntry;
  readonly output: PlannedTensor;
}

export interface ConvertPlan {
  readonly checkpoint: Checkpoint;
  readonly tensors: readonly PlannedConversion[];
  /** Everything that is planned, tied tensors too. */
  readonly outputs: readonly PlannedTensor[];
  readonly config: Readonly<Record<string, unknown>>;
  readonly notes: readonly string[];
  /** What `TensorLoader` needs. */
  readonly source: {
    readonly tensors: ReadonlyMap<string, StoredWeight>;
    readonly file: OpenFiles['get'];
  };
  close(): Promise<void>;
}

const floats: ReadonlySet<DType> = new Set(['f32', 'bf16', 'f16', 'f64', 'f8_e4m3', 'f8_e5m2']);

/** Small tensors whose fp32 decides something: rounding the router's selection biases changes which experts are used. */
const keepsPrecision = /\.e_score_correction_bias$/;

const configName: Record<FloatDType, string> = { f32: 'float32', bf16: 'bfloat16', f16: 'float16' };

/**
 * Decides for each tensor what is read, done and written; reads headers only.
 * Errors: what opening the checkpoint refuses; tensors that the output's format cannot hold.
 */
export async function planConversion(options: ConvertOptions): Promise<ConvertPlan> {
  const { input, dtype } = options;
  const checkpoint = await openCheckpoint(input, { config: options.config });
  const quantized = checkpoint.config.quantization_config !== undefined && dtype !== undefined;
  return quantized ? planDequantization(checkpoint, options) : planPlain(checkpoint, options);
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
    return planTensor(entry, dtype);
  });
  const { tensors, outputs } = shareTied(planned, format, checkpoint.config, notes);
  return {
    checkpoint,
    tensors,
    outputs,
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
    config: outputConfig(open.checkpoint.config, dtype, true),
    notes,
    source: open,
    close: () => open.close(),
  };
}

function planTensor(entry: TensorEntry, dtype: FloatDType | undefined): PlannedConversion {
  const { name, shape, encoding, span, strides } = entry;
  const from = encodingName(encoding);
  const fixed = dtype === undefined || keepsPrecision.test(name);
  const plan = (action: PlannedConversion['action'], to: DType): PlannedConversion => {
    const writes = elementCount(shape) * dtypeSize(to);
    return { name, shape, action, from, to, reads: span.bytes, writes, entry, output: { name, shape, dtype: to } };
  };
  switch (encoding.kind) {
    case 'plain': {
      const to = floats.has(encoding.dtype) && !fixed ? dtype : encoding.dtype;
      if (strides) return plan('decode', to);
      return plan(to === encoding.dtype ? 'copy' : 'cast', to);
    }
    case 'ggml':
    case 'scaled':
      return plan('decode', dtype ?? 'bf16');
    case 'assembled': {
      const { encoding: part } = encoding.parts[0]!.entry;
      const own = part.kind === 'plain' ? part.dtype : 'bf16';
      return plan('decode', floats.has(own) && !fixed ? dtype : own);
    }
    case 'opaque': {
      if (strides) {
        throw badInput('A tensor is a view of elements that cannot be computed with', {
          where: `${span.path}, tensor ${name}`,
          got: from,
        });
      }
      const output = { name, shape, dtype: 'u8' as const, encoding };
      const writes = encodedBytes(shape, encoding);
      return { name, shape, action: 'copy', from, to: from, reads: span.bytes, writes, entry, output };
    }
  }
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
