import type { FloatDType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import { planNative } from '../checkpoint/deepseek-native.js';
import { planGgufModel } from '../arch/gguf.js';
import { recordWidened } from '../checkpoint/gguf-model.js';
import type { GgufMetadata, GgufFileType } from '../checkpoint/gguf-config.js';
import type { GgufTensor } from '../checkpoint/gguf-tensors.js';
import { planKey } from '../checkpoint/types.js';
import type { Checkpoint, PlannedTensor } from '../checkpoint/types.js';
import { encodedBytes, encodingName } from '../formats/ggml.js';
import { fittingType, kindOfGguf, mixtureType } from '../targets/gguf-mixture.js';
import { importanceOf, type Imatrix, type Importance } from '../targets/imatrix.js';
import type { BlockFormatName } from '../tensor/ops.js';
import { planTensor } from './convert-tensor.js';
import type { PlannedConversion } from './convert-tensor.js';

/** Block types that `convert` writes into GGUF files. */
export const blockTypes = ['q8_0', 'q6_k', 'q4_k', 'q4_0', 'q4_k_s', 'q4_k_m'] as const;
export type BlockType = (typeof blockTypes)[number];

export interface FormatPlan {
  readonly tensors: readonly PlannedConversion[];
  readonly outputs: readonly PlannedTensor[];
  readonly notes: readonly string[];
  readonly gguf?: GgufMetadata;
  /** Tensors whose values follow from the config. */
  readonly computed?: ReadonlyMap<string, Float32Array>;
}

/** A GGUF file in `dtype` (undefined: as it is) or in blocks; norms and routers are f32 as llama.cpp wants them. */
export async function planGgufOutput(
  checkpoint: Checkpoint,
  dtype: FloatDType | undefined,
  blocks: BlockType | undefined,
  imatrix?: Imatrix,
): Promise<FormatPlan> {
  requirePlain(checkpoint);
  const type = blocks === 'q4_k' ? 'q4_k_s' : (blocks ?? dtype ?? ownType(checkpoint));
  const { metadata, tensors, computed, notes } = await planGgufModel(checkpoint, type);
  if (dtype === undefined && blocks === undefined) recordWidened(metadata, tensors);
  const tied = checkpoint.config['tie_word_embeddings'] === true;
  const size = (key: string): number => Number(metadata.get(`${metadata.get('general.architecture')!.value as string}.${key}`)?.value ?? 0); // prettier-ignore
  const [layers, experts] = [size('block_count'), size('expert_count')];
  const isMixture = blocks === 'q4_k_s' || blocks === 'q4_k_m';
  const head = tied ? 'token_embd.weight' : 'output.weight';
  const typeOf = (name: string): BlockFormatName | undefined => {
    // The head decides the answers: llama.cpp, too, keeps it at 6 bits or more.
    if (!isMixture) return name === head && blocks !== undefined && blocks !== 'q8_0' ? 'q6_k' : blocks;
    const layer = Number(/^blk\.(\d+)\./.exec(name)?.[1] ?? 0);
    return mixtureType(blocks, kindOfGguf(name, tied), layer, layers, experts);
  };
  const planned = tensors.map((tensor) => {
    const plan = planGgufTensor(tensor, dtype, typeOf(tensor.name));
    if (plan.action !== 'encode' || imatrix === undefined) return plan;
    const stacked = tensor.shape.length === 3 ? tensor.shape[0]! : 1;
    const importance = importanceOf(imatrix, tensor.name, stacked, tensor.shape.at(-1)!);
    return importance === undefined ? plan : { ...plan, importance: tempered(importance) };
  });
  const more = standIns(planned, typeOf);
  if (!isMixture && typeOf(head) !== blocks) more.unshift(`${head} is stored as ${typeOf(head)}.`);
  const outputs = [
    ...planned.map(({ output }) => output),
    ...[...computed].map(([name, values]) => ({ name, shape: [values.length], dtype: 'f32' as const })),
  ];
  if (imatrix) {
    const known = planned.filter(({ importance }) => importance !== undefined).length;
    if (known === 0) throw badInput('The importance matrix knows none of the tensors', { where: checkpoint.path, hint: 'It belongs to another model.' }); // prettier-ignore
    more.push(`${known} tensors are rounded by the importance matrix.`);
  }
  return { tensors: planned, outputs, notes: [...notes, ...more], gguf: metadata, computed };
}

/** Which matrices are stored in other types than wanted, because the blocks do not divide their rows. */
function standIns(planned: readonly PlannedConversion[], wanted: (name: string) => string | undefined): string[] {
  const byType = new Map<string, string[]>();
  for (const { name, to } of planned) {
    if (to !== 'f32' && to !== (wanted(name) ?? to)) byType.set(to, [...(byType.get(to) ?? []), name]);
  }
  return [...byType].map(([type, [name, ...more]]) => {
    const others = more.length === 0 ? '' : ` and ${more.length} more tensors`;
    return `${name}${others}: stored as ${type}, because blocks of ${wanted(name!)} do not divide the rows.`;
  });
}

/**
 * Square roots of the importances: energies of channels differ by orders of magnitude between texts, and rounding that
 * follows those of the calibration text to the letter is worse on others. KL of Q4_K_M of dense-6m on held-out text:
 * 0.0246 without importance, 0.0236 with roots, 0.0237 with the energies themselves.
 */
const tempered = ({ experts, values }: Importance): Importance => ({ experts, values: values.map(Math.sqrt) });

/** INT4 layouts would have to be decoded first; FP8 is decoded on the way. */
function requirePlain({ config, path }: Checkpoint): void {
  const quantization = config['quantization_config'] as { quant_method?: unknown } | undefined;
  if (quantization === undefined || quantization === null || quantization.quant_method === 'fp8') return;
  throw badInput('A quantized checkpoint does not become GGUF in one step', {
    where: path,
    got: `quant_method ${JSON.stringify(quantization.quant_method)}`,
    hint: 'Decode it first: deepseek-convert convert IN -o FOLDER --dtype bf16',
  });
}

function ownType({ tensors }: Checkpoint): GgufFileType {
  const encoding = tensors.get('model.embed_tokens.weight')?.encoding;
  return encoding?.kind === 'plain' && (encoding.dtype === 'f16' || encoding.dtype === 'f32') ? encoding.dtype : 'bf16';
}

function planGgufTensor(
  { name, shape, entry, staysF32 }: GgufTensor,
  dtype: FloatDType | undefined,
  blocks: BlockFormatName | undefined,
): PlannedConversion {
  const stored = { ...entry, name, shape };
  if (staysF32) return planTensor(stored, 'f32');
  if (blocks === undefined) return planTensor(stored, dtype);
  const type = fittingType(shape.at(-1)!, blocks);
  if (type === undefined) return planTensor(stored, 'f16');
  const encoding = { kind: 'ggml', type } as const;
  return {
    ...{ name, shape, action: 'encode', from: encodingName(entry.encoding), to: type, entry: stored },
    reads: encodedBytes(entry.shape, entry.encoding),
    writes: encodedBytes(shape, encoding),
    output: { name, shape, dtype: 'u8', encoding },
  };
}

/** DeepSeek's own shards: every tensor keeps its element type. The checkpoint must be open with `keepScales`. */
export function planNativeOutput(checkpoint: Checkpoint, shards: number): FormatPlan {
  const { tensors, notes } = planNative(checkpoint.tensors, checkpoint.config, shards);
  const planned = tensors.map(({ planned: output, entry }): PlannedConversion => {
    const tensor = planTensor({ ...entry, name: planKey(output) }, undefined);
    return { ...tensor, output };
  });
  return { tensors: planned, outputs: planned.map(({ output }) => output), notes };
}
