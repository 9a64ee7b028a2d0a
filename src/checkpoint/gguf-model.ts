import { readFile } from 'node:fs/promises';
import type { FloatDType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import { readSpan } from '../base/io.js';
import { elementType } from '../formats/assembly.js';
import type { GgufValue } from '../formats/gguf.js';
import { decodeUtf8, isJsonObject, parseJson } from '../formats/json.js';
import type { JsonObject } from '../formats/json.js';
import { parseSentencePiece } from '../formats/sentencepiece.js';
import type { TensorEntry } from '../formats/types.js';
import { companionName } from './config.js';
import { archOfGguf, archOfModel } from './gguf-arch.js';
import { configFromGguf, configToGguf, ropeOf } from './gguf-config.js';
import type { GgufFileType, GgufMetadata } from './gguf-config.js';
import { tensorsFromGguf, tensorsToGguf } from './gguf-tensors.js';
import type { GgufTensor } from './gguf-tensors.js';
import { sentencePieceToGguf } from './gguf-sentencepiece.js';
import { tokenizerFromGguf } from './gguf-tokenizer-files.js';
import { tokenizerToGguf } from './gguf-tokenizer.js';
import type { Checkpoint } from './types.js';

export interface GgufModel {
  readonly config: Record<string, unknown>;
  readonly tensors: Map<string, TensorEntry>;
  readonly extraFiles: Map<string, string>;
  readonly widened: Map<string, FloatDType>;
  readonly notes: string[];
}

/**
 * A GGUF file as a Hugging Face checkpoint: names, shapes, config and tokenizer. `config` replaces the rebuilt one.
 * `computed`: values of tensors that are in no file yet.
 */
export async function fromGguf(
  metadata: ReadonlyMap<string, GgufValue>,
  tensors: ReadonlyMap<string, TensorEntry>,
  path: string,
  given?: JsonObject,
  computed: ReadonlyMap<string, Float32Array> = new Map(),
): Promise<GgufModel> {
  const arch = archOfGguf(metadata.get('general.architecture')?.value, path);
  const rebuilt = configFromGguf(metadata, tensors, arch, path);
  const stored = tensors.get('rope_freqs.weight');
  const factors = computed.get('rope_freqs.weight') ?? (stored && (await readFactors(stored)));
  if (factors !== undefined) rebuilt['rope_scaling'] = scalingOf(factors, rebuilt);
  const config = given ?? rebuilt;
  const { files, notes } = tokenizerFromGguf(metadata);
  const named = tensorsFromGguf(tensors, config, arch);
  return { config, tensors: named, extraFiles: files, widened: readWidened(metadata), notes };
}

/** Our own key: which tensors (by their names outside of GGUF) had another type before the file made them f32. */
const widenedKey = (dtype: FloatDType): string => `deepseek-convert.widened.${dtype}`;

function readWidened(metadata: ReadonlyMap<string, GgufValue>): Map<string, FloatDType> {
  const widened = new Map<string, FloatDType>();
  for (const dtype of ['bf16', 'f16'] as const) {
    const names = metadata.get(widenedKey(dtype));
    if (names?.type !== 'array' || names.of !== 'string') continue;
    for (const name of names.value) widened.set(name as string, dtype);
  }
  return widened;
}

/** Records tensors that become f32 only because GGUF wants them so: the way back then ends with the same bytes. */
export function recordWidened(metadata: GgufMetadata, tensors: readonly GgufTensor[]): void {
  for (const dtype of ['bf16', 'f16'] as const) {
    const names = tensors.filter(({ staysF32, entry }) => staysF32 && elementType(entry) === dtype);
    const value = names.map(({ entry }) => entry.name);
    if (value.length > 0) metadata.set(widenedKey(dtype), { type: 'array', of: 'string', value });
  }
}

/** Llama 3's scaling of rotary frequencies, as the factors that GGUF stores (its parameters are not in the file). */
export function llama3Factors(rope: Readonly<Record<string, unknown>>, dim: number): Float32Array {
  const number = (key: string, otherwise: number): number => (typeof rope[key] === 'number' ? rope[key] : otherwise);
  const [base, factor] = [number('rope_theta', 10000), number('factor', 8)];
  const [low, high] = [number('low_freq_factor', 1), number('high_freq_factor', 4)];
  const context = number('original_max_position_embeddings', 8192);
  return Float32Array.from({ length: dim / 2 }, (_, i) => {
    const length = 2 * Math.PI * base ** ((2 * i) / dim);
    if (length < context / high) return 1;
    if (length > context / low) return factor;
    const smooth = (context / length - low) / (high - low);
    return 1 / ((1 - smooth) / factor + smooth);
  });
}

async function readFactors(entry: TensorEntry): Promise<Float32Array> {
  const count = entry.shape[0] ?? 0;
  const where = `${entry.span.path}, tensor rope_freqs.weight`;
  const isPlain = entry.encoding.kind === 'plain' && entry.encoding.dtype === 'f32' && entry.shape.length === 1;
  if (!isPlain || count > 4096) throw badInput('Unexpected rope factors', { where, expected: 'a vector of f32' });
  const bytes = await readSpan(entry.span);
  return Float32Array.from({ length: count }, (_, i) => bytes.readFloatLE(4 * i));
}

/** Rotary factors as parameters: Llama 3's where they are those, else one factor a pair, which longrope can say. */
function scalingOf(factors: Float32Array, config: Readonly<Record<string, unknown>>): object {
  const llama3 = {
    rope_type: 'llama3',
    factor: Math.max(...factors),
    low_freq_factor: 1,
    high_freq_factor: 4,
    original_max_position_embeddings: 8192,
  };
  const expected = llama3Factors({ ...llama3, rope_theta: config['rope_theta'] }, 2 * factors.length);
  if (factors.every((value, i) => Math.abs(value - expected[i]!) <= 1e-4 * expected[i]!)) return llama3;
  return {
    rope_type: 'longrope',
    short_factor: [...factors],
    long_factor: [...factors],
    attention_factor: 1,
    original_max_position_embeddings: config['max_position_embeddings'],
  };
}

export interface GgufPlan {
  readonly metadata: GgufMetadata;
  readonly tensors: readonly GgufTensor[];
  /** Tensors whose values follow from the config: f32 by name. */
  readonly computed: ReadonlyMap<string, Float32Array>;
  readonly notes: readonly string[];
}

/**
 * Everything of a GGUF file but the element types of its tensors, which the caller chooses (`staysF32` tensors are f32).
 * Errors (kind 'input'): architectures, settings, tokenizers that llama.cpp has no place for.
 */
export async function planGguf(checkpoint: Checkpoint, fileType: GgufFileType): Promise<GgufPlan> {
  const { config } = checkpoint;
  const arch = archOfModel(config['model_type']);
  const metadata = configToGguf(config, arch, fileType);
  const { tensors, notes } = tensorsToGguf(checkpoint.tensors, config, arch);
  const computed = new Map<string, Float32Array>();
  const rope = ropeOf(config);
  if (rope['rope_type'] === 'llama3') {
    const head = Number(config['head_dim'] ?? Number(config['hidden_size']) / Number(config['num_attention_heads']));
    computed.set('rope_freqs.weight', llama3Factors(rope, head));
  }
  const tokenizer = await tokenizerMetadata(checkpoint);
  for (const [key, value] of tokenizer.metadata) metadata.set(key, value);
  return { metadata, tensors, computed, notes: [...notes, ...tokenizer.notes] };
}

/** From tokenizer.json, else from SentencePiece's tokenizer.model. */
async function tokenizerMetadata(checkpoint: Checkpoint): Promise<{ metadata: GgufMetadata; notes: string[] }> {
  const pathOf = (name: string) => checkpoint.companions.find((file) => companionName(file) === name);
  const read = async (name: string): Promise<string | undefined> => {
    const path = pathOf(name);
    const inside = checkpoint.extraFiles.get(name);
    if (inside !== undefined || path === undefined) return inside;
    const text = decodeUtf8(await readFile(path));
    if (text === undefined) throw badInput('A tokenizer file is not UTF-8', { where: path });
    return text;
  };
  const object = async (name: string): Promise<JsonObject> => {
    const value = parseJson((await read(name)) ?? '{}', { where: name, lenient: true });
    if (isJsonObject(value)) return value;
    throw badInput('A tokenizer file is no JSON object', { where: name });
  };
  const vocabSize = requireVocabSize(checkpoint);
  const text = await read('tokenizer.json');
  const config = await object('tokenizer_config.json');
  const chatTemplate = await read('chat_template.jinja');
  if (text !== undefined) {
    const tokenizer = await object('tokenizer.json');
    return { metadata: tokenizerToGguf({ text, tokenizer, config, chatTemplate }, vocabSize), notes: [] };
  }
  const path = pathOf('tokenizer.model') ?? pathOf('spiece.model');
  const bytes = path === undefined ? undefined : await readFile(path);
  if (path !== undefined && bytes !== undefined && !isTiktoken(bytes)) {
    const model = parseSentencePiece(bytes, path);
    return sentencePieceToGguf({ model, config, added: await object('added_tokens.json'), chatTemplate }, vocabSize);
  }
  // llama.cpp loads files without a tokenizer only where they say so.
  return {
    metadata: new Map([['tokenizer.ggml.model', { type: 'string', value: 'no_vocab' }]]),
    notes: [
      'The model has no tokenizer.json and no tokenizer.model of SentencePiece: the GGUF file gets no tokenizer.',
    ],
  };
}

/** Tokens that the config speaks of; no more than the embedding has rows, whose length is the file's. */
function requireVocabSize({ config, tensors, path }: Checkpoint): number {
  const rows = Math.max(0, ...[...tensors.values()].filter(({ name }) => /embed|lm_head/.test(name)).map(({ shape }) => shape[0] ?? 0)); // prettier-ignore
  const size = config['vocab_size'];
  if (Number.isSafeInteger(size) && (size as number) > 0 && (size as number) <= rows) return size as number;
  throw badInput('The vocabulary of the config does not fit the weights', { where: path, got: `vocab_size ${JSON.stringify(size)}`, expected: `at most the ${rows} rows of the embedding` }); // prettier-ignore
}

/** Llama 3 has its ranks of tokens in a file of the same name: lines of base64 and a number. */
const isTiktoken = (bytes: Buffer): boolean =>
  /^[A-Za-z0-9+/]+=* \d+\n/.test(bytes.subarray(0, 256).toString('latin1'));
