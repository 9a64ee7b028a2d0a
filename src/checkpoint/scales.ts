import { badInput } from '../base/errors.js';
import { encodingName } from '../formats/ggml.js';
import type { Encoding, TensorEntry } from '../formats/types.js';
import { isJsonObject } from '../formats/json.js';

/** Name of a weight's scale in DeepSeek's own files; in Hugging Face form it is the weight's with `_scale_inv`. */
const deepseekScale = (weight: string): string => `${weight.slice(0, -'.weight'.length)}.scale`;

const suffix = '.weight_scale_inv';

type Scaled = Extract<Encoding, { kind: 'scaled' }>;

/**
 * Joins block-scaled weights with their scales, wherever those lie: FP8 E4M3 with one scale per block (128 x 128 unless
 * the config says otherwise), and FP4 experts, two values a byte in I8, with an E8M0 scale per row and 32 columns.
 * The weight then has its logical shape; the scale is no tensor of its own any more. Changes `tensors`, and returns it.
 * Errors (kind 'input'): a scale of another shape than the blocks ask for, a scale or weight without its partner.
 */
export function joinScales(
  tensors: Map<string, TensorEntry>,
  config: Readonly<Record<string, unknown>>,
): Map<string, TensorEntry> {
  const block = configBlock(config);
  const listed = [...tensors.values()].filter(({ name }) => name.endsWith(suffix));
  let used = 0;
  for (const entry of tensors.values()) {
    const { name } = entry;
    if (entry.shape.length !== 2) continue;
    const isFp8 = entry.encoding.kind === 'plain' && entry.encoding.dtype === 'f8_e4m3';
    if ((!isFp8 && !mayBeFp4(entry)) || !name.endsWith('.weight')) continue;
    // Scales are mostly listed in the order of their weights: of 45,000 few need to be looked up.
    const next = listed[used];
    const inOrder = next?.name.length === name.length + '_scale_inv'.length && next.name.startsWith(name);
    const scale = inOrder ? next : (tensors.get(`${name}_scale_inv`) ?? tensors.get(deepseekScale(name)));
    if (scale === undefined) {
      if (isFp8 && block !== undefined) throw missing(entry, 'scale', `${name}_scale_inv or ${deepseekScale(name)}`);
      continue;
    }
    const encoding = isFp8 ? fp8(entry, scale, block ?? [128, 128]) : fp4(entry, scale);
    if (encoding === undefined) continue;
    tensors.set(name, { ...entry, encoding, shape: logicalShape(entry, encoding) });
    tensors.delete(scale.name);
    if (scale.name.endsWith(suffix)) used++;
  }
  if (used === listed.length) return tensors;
  const alone = listed.find(({ name }) => tensors.has(name))!;
  throw missing(alone, 'weight', alone.name.replace(/_scale_inv$/, ''));
}

function missing(entry: TensorEntry, what: string, expected: string): Error {
  return badInput(`A block-scaled weight has no ${what}`, {
    where: `${entry.span.path}, tensor ${JSON.stringify(entry.name)}`,
    expected,
    got: 'no such tensor in any shard',
    hint: 'A shard is missing or was left out of the index.',
  });
}

/** quantization_config.weight_block_size of an FP8 model. */
function configBlock(config: Readonly<Record<string, unknown>>): [number, number] | undefined {
  const quantization = config['quantization_config'];
  if (!isJsonObject(quantization) || quantization['quant_method'] !== 'fp8') return undefined;
  const size = quantization['weight_block_size'];
  if (size === undefined || size === null) return undefined;
  if (Array.isArray(size) && size.length === 2 && size.every((n) => Number.isSafeInteger(n) && Number(n) > 0)) {
    return size as [number, number];
  }
  throw badInput('Bad weight_block_size in the config', { expected: '[rows, columns]', got: JSON.stringify(size) });
}

function fp8(weight: TensorEntry, scale: TensorEntry, block: readonly [number, number]): Scaled {
  requireShape(weight, scale, weight.shape, block);
  const scaleElement = scaleElementOf(scale);
  if (scaleElement !== undefined) return { kind: 'scaled', element: 'f8_e4m3', block, scale, scaleElement };
  throw badInput('A scale has an unexpected element type', {
    where: `${scale.span.path}, tensor ${JSON.stringify(scale.name)}`,
    expected: 'f32, bf16 or F8_E8M0',
    got: encodingName(scale.encoding),
  });
}

const mayBeFp4 = ({ encoding }: TensorEntry): boolean =>
  encoding.kind === 'plain'
    ? encoding.dtype === 'i8' || encoding.dtype === 'u8'
    : encoding.kind === 'opaque' && encoding.name === 'F4';

/** I8 beside an E8M0 scale is FP4 in disguise: `expert_dtype: fp4` may stand beside a model-wide fp8 config. */
function fp4(weight: TensorEntry, scale: TensorEntry): Scaled | undefined {
  const packed = weight.encoding.kind === 'plain';
  if (scaleElementOf(scale) !== 'f8_e8m0') return undefined;
  const [rows, columns] = weight.shape as [number, number];
  const block = [1, 32] as const;
  requireShape(weight, scale, [rows, packed ? 2 * columns : columns], block);
  return { kind: 'scaled', element: 'f4_e2m1', block, scale, scaleElement: 'f8_e8m0' };
}

const logicalShape = ({ shape, encoding }: TensorEntry, { element }: Scaled): readonly number[] =>
  element === 'f4_e2m1' && encoding.kind === 'plain' ? [shape[0]!, 2 * shape[1]!] : shape;

function scaleElementOf({ encoding }: TensorEntry): Scaled['scaleElement'] | undefined {
  if (encoding.kind === 'plain')
    return encoding.dtype === 'f32' || encoding.dtype === 'bf16' ? encoding.dtype : undefined;
  return encoding.kind === 'opaque' && encoding.name === 'F8_E8M0' ? 'f8_e8m0' : undefined;
}

function requireShape(
  weight: TensorEntry,
  scale: TensorEntry,
  shape: readonly number[],
  block: readonly [number, number],
): void {
  const [rows, columns] = scale.shape;
  const [wantRows, wantColumns] = [Math.ceil(shape[0]! / block[0]), Math.ceil(shape[1]! / block[1])];
  if (scale.shape.length === 2 && rows === wantRows && columns === wantColumns) return;
  throw badInput('A scale does not fit its weight', {
    where: `${scale.span.path}, tensor ${JSON.stringify(scale.name)}`,
    expected: `[${wantRows}, ${wantColumns}] for ${weight.name} [${shape.join(', ')}] in blocks of ${block.join(' x ')}`,
    got: `[${scale.shape.join(', ')}]`,
  });
}
