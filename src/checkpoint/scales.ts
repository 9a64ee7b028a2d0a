import { badInput } from '../base/errors.js';
import { encodingName } from '../formats/ggml.js';
import type { Encoding, TensorEntry } from '../formats/types.js';
import { isJsonObject } from '../formats/json.js';
import { addDistinct, byName } from './by-name.js';

/** Name of a weight's scale in DeepSeek's own files; in Hugging Face form it is the weight's with `_scale_inv`. */
const deepseekScale = (weight: string): string => `${weight.slice(0, -'.weight'.length)}.scale`;

const suffix = '.weight_scale_inv';

type Scaled = Extract<Encoding, { kind: 'scaled' }>;

/**
 * All tensors by name, block-scaled weights joined with their scales, wherever those lie: FP8 E4M3 with one scale per
 * block (128 x 128 unless the config says otherwise), and FP4 experts, two values a byte in I8, with an E8M0 scale per
 * row and 32 columns. The weight then has its logical shape; the scale is no tensor of its own any more.
 * Errors (kind 'input'): a scale of another shape than the blocks ask for, a scale or weight without its partner, a name
 * that stands for two.
 */
export function joinScales(
  entries: readonly TensorEntry[],
  config: Readonly<Record<string, unknown>>,
): Map<string, TensorEntry> {
  const block = configBlock(config);
  const joined = new Map<string, TensorEntry>();
  const scales = entries.filter(({ name }) => name.endsWith(suffix));
  // Scales are mostly listed in the order of their weights: of 45,000 few need to be looked up, which is left for later.
  const rest = new Map<string, TensorEntry>();
  const late: TensorEntry[] = [];
  let [at, passed] = [0, 0];
  for (const entry of entries) {
    const { name } = entry;
    if (entry === scales[passed]) {
      passed++;
      continue;
    }
    if (!mayBeScaled(entry)) {
      addDistinct(joined, entry, entries);
      continue;
    }
    const scale = scales[at++];
    const inOrder = scale?.name.length === name.length + '_scale_inv'.length && scale.name.startsWith(name);
    if (scale && !inOrder) addDistinct(rest, scale, entries);
    if (!inOrder) late.push(entry);
    addDistinct(joined, inOrder ? withScale(entry, scale, block) : entry, entries);
  }
  for (const scale of scales.slice(at)) addDistinct(rest, scale, entries);
  for (const entry of late) {
    const { name } = entry;
    const scale = rest.get(`${name}_scale_inv`) ?? joined.get(deepseekScale(name));
    if (scale === undefined) {
      if (isFp8(entry) && block) throw missing(entry, 'scale', `${name}_scale_inv or ${deepseekScale(name)}`);
      continue;
    }
    const weight = withScale(entry, scale, block);
    if (weight === entry) continue;
    joined.set(name, weight);
    if (!rest.delete(scale.name)) joined.delete(scale.name);
  }
  const [alone] = rest.values();
  if (alone === undefined) return joined;
  byName(entries); // refuses a scale that is there twice
  throw missing(alone, 'weight', alone.name.replace(/_scale_inv$/, ''));
}

const isFp8 = ({ encoding }: TensorEntry): boolean => encoding.kind === 'plain' && encoding.dtype === 'f8_e4m3';
const mayBeScaled = (entry: TensorEntry): boolean =>
  entry.shape.length === 2 && (isFp8(entry) || mayBeFp4(entry)) && entry.name.endsWith('.weight');

const usualBlock: readonly [number, number] = [128, 128];
/** The weight with its scale; itself where that is no scale for it. */
function withScale(entry: TensorEntry, scale: TensorEntry, block = usualBlock): TensorEntry {
  const encoding = isFp8(entry) ? fp8(entry, scale, block) : fp4(entry, scale);
  if (encoding === undefined) return entry;
  const packed = encoding.element === 'f4_e2m1' && entry.encoding.kind === 'plain';
  const [rows, columns] = entry.shape as [number, number];
  return { name: entry.name, shape: packed ? [rows, 2 * columns] : entry.shape, encoding, span: entry.span };
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
