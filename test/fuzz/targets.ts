import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { isDeepStrictEqual } from 'node:util';
import { must, type Target } from './engine.js';
import { loadNative } from '../../src/backend/native.js';
import type { Random } from '../../src/base/rng.js';
import { provideScanner } from '../../src/base/scanner.js';
import { parseConfig } from '../../src/checkpoint/config.js';
import { fromNative } from '../../src/checkpoint/deepseek-native.js';
import { detectFormat } from '../../src/checkpoint/detect.js';
import { fromGguf } from '../../src/checkpoint/gguf-model.js';
import { sentencePieceToGguf } from '../../src/checkpoint/gguf-sentencepiece.js';
import { namesOf, parseIndex, type ShardIndex } from '../../src/checkpoint/shard-index.js';
import { fromOnnx } from '../../src/checkpoint/onnx-model.js';
import { joinScales } from '../../src/checkpoint/scales.js';
import { ggmlBlocks } from '../../src/formats/ggml.js';
import { buildGgufHeader, readGguf, type GgufValue } from '../../src/formats/gguf.js';
import { parseJson } from '../../src/formats/json.js';
import { readOnnx } from '../../src/formats/onnx.js';
import { readSafetensors } from '../../src/formats/safetensors.js';
import { parseSentencePiece } from '../../src/formats/sentencepiece.js';
import { inMemory } from '../../src/formats/source.js';
import { readTorch, torchRefusals } from '../../src/formats/torch.js';
import type { Encoding, TensorEntry } from '../../src/formats/types.js';
import { detectLayout } from '../../src/layout/detect.js';
import { parseImatrix } from '../../src/targets/imatrix.js';
import { edge, pick, u64 } from './bytes.js';
import { reshapeGguf } from './gguf.js';
import { job, text, type Job } from './jobs.js';
import { reshapeJson } from './json.js';
import { readLinears } from './linears.js';
import { reshapeProtobuf } from './protobuf.js';
import { reshapeStream, reshapeTar, reshapeZip } from './torch-files.js';

const formats = new URL('../../fixtures/formats/', import.meta.url).pathname;
const seed = (name: string): Buffer => readFileSync(join(formats, name));
const byName = (tensors: readonly TensorEntry[]): Map<string, TensorEntry> => new Map(tensors.map((tensor) => [tensor.name, tensor])); // prettier-ignore

/** What must hold of every tensor that a parser lets through: its bytes lie in the file and are as many as its shape says. */
function sound(tensors: Iterable<TensorEntry>, path: string, size: number): object[] {
  const found: object[] = [];
  for (const entry of tensors) {
    const { name, shape, encoding, span, strides } = entry;
    const count = shape.reduce((n, d) => n * d, 1);
    must(shape.every((d) => Number.isSafeInteger(d) && d >= 0) && Number.isSafeInteger(count), name, 'shape');
    if (span.path === path) {
      must(span.offset >= 0 && span.bytes >= 0 && span.offset + span.bytes <= size, name, 'place in the file');
    }
    const bytes = storedBytes(encoding, count);
    if (bytes !== undefined && strides === undefined) must(span.bytes === bytes, name, 'size');
    if (strides !== undefined && count > 0) {
      const last = shape.reduce((at, d, i) => at + (d - 1) * strides[i]!, 0);
      must(
        strides.every((stride) => stride >= 0),
        name,
        'strides',
      );
      must(span.bytes === storedBytes(encoding, last + 1), name, 'last element of the view');
    }
    if (found.length < 4) found.push([encoding.kind, shape.length, count]);
  }
  return found;
}

function storedBytes(encoding: Encoding, count: number): number | undefined {
  const widths: Record<string, number> = { f64: 8, i64: 8, u64: 8, f32: 4, i32: 4, u32: 4, bf16: 2, f16: 2, i16: 2, u16: 2 };
  if (encoding.kind === 'plain') return count * (widths[encoding.dtype] ?? 1);
  if (encoding.kind === 'opaque') return Math.ceil((count * encoding.bits) / 8);
  if (encoding.kind === 'ggml') return (count / ggmlBlocks[encoding.type].values) * ggmlBlocks[encoding.type].bytes;
  return undefined;
} // prettier-ignore

// --- safetensors ---
function reshapeSafetensors(random: Random, file: Buffer): Buffer {
  if (random.below(4) === 0) return otherSafetensors(random);
  const length = file.length >= 8 ? Number(file.readBigUInt64LE(0)) : 0;
  if (length > file.length - 8 || length > 65_536) return file;
  const header = Buffer.from(reshapeJson(random, file.toString('latin1', 8, 8 + length)), 'latin1');
  const size = random.below(30) === 0 ? edge(random) : BigInt(header.length);
  return Buffer.concat([u64(size), header, file.subarray(8 + length)]);
}

const stems = [
  'a',
  'e',
  'layers.0.attn.wq',
  'layers.0.ffn.experts.1.w1',
  'layers.0.attn.wkv_b',
  '__proto__',
  'head',
  'x.gate',
];
const leaves = ['weight', 'weight', 'weight_scale_inv', 'scale', 'bias', 'weight_packed'];
const someTypes = ['F32', 'BF16', 'F8_E4M3', 'F8_E8M0', 'I8', 'U8'];
const someSizes = [0, 1, 1, 2, 3, 4, 8, 16, 32, 64, 128, 129, 2 ** 20, 2 ** 40];

/** A sound file of some tensors: what stumbles over it is behind the parser. */
function otherSafetensors(random: Random): Buffer {
  const names = Array.from({ length: 1 + random.below(5) }, () => `${pick(random, stems)}.${pick(random, leaves)}`);
  return zeros(
    Object.fromEntries(
      names.map((name) => {
        let shape = Array.from({ length: random.below(4) }, () => pick(random, someSizes));
        if (shape.reduce((n, d) => n * d, 1) > 4096) shape = [...shape, 0];
        return [name, [pick(random, someTypes), ...shape]];
      }),
    ),
  );
}

/** A file of these tensors, all zeros. */
function zeros(tensors: Record<string, [dtype: string, ...shape: number[]]>): Buffer {
  const widths: Record<string, number> = { F32: 4, BF16: 2 };
  let at = 0;
  const header: Record<string, object> = { __metadata__: { format: 'pt' } };
  for (const [name, [dtype, ...shape]] of Object.entries(tensors)) {
    const end = at + shape.reduce((n, d) => n * d, widths[dtype] ?? 1);
    header[name] = { dtype, shape, data_offsets: [at, end] };
    at = end;
  }
  const text = Buffer.from(JSON.stringify(header));
  return Buffer.concat([u64(text.length), text, Buffer.alloc(at)]);
}
const scaled = zeros({
  'a.weight': ['F8_E4M3', 4, 4],
  'a.weight_scale_inv': ['F32', 1, 1],
  'e.weight': ['I8', 2, 32],
  'e.scale': ['F8_E8M0', 2, 2],
});
const nativeShard = zeros({
  'embed.weight': ['BF16', 2, 4],
  'layers.0.attn.wq.weight': ['BF16', 2, 4],
  'layers.0.attn.wo.weight': ['BF16', 4, 2],
  'layers.0.attn_norm.weight': ['BF16', 4],
  'layers.0.attn.wkv_b.weight': ['F8_E4M3', 4, 4],
  'layers.0.attn.wkv_b.scale': ['F32', 1, 1],
  'layers.0.ffn.gate.bias': ['F32', 2],
});

/** Reads by the native scanner and without it: both must find the same, or both must refuse. */
function scannedAlike<T>(read: () => T): T {
  const without = outcome(read);
  provideScanner(() => loadNative().scanner);
  const scanned = outcome(read);
  provideScanner(() => undefined);
  must(isDeepStrictEqual(scanned.found, without.found), JSON.stringify([scanned.found, without.found]), 'scan');
  if (without.found === undefined) throw without.error;
  return without.value!;
}

function outcome<T>(read: () => T): { value?: T; found?: unknown; error?: unknown } {
  try {
    const value = read();
    return { value, found: value instanceof Map ? listed(value as ShardIndex) : { ...value, names: undefined } };
  } catch (error) {
    return { error };
  }
}

const listed = (index: ShardIndex): string[][] => [...index].map(([file, names]) => [file, ...namesOf(names)]);

const safetensors: Target = {
  name: 'safetensors',
  seeds: [seed('safetensors/all-dtypes.safetensors'), scaled],
  reshape: reshapeSafetensors,
  read: (input) => {
    const source = inMemory(input, 'x.safetensors');
    expectKnown(detectFormat(source));
    const { tensors } = scannedAlike(() => readSafetensors(source));
    const found = sound(tensors, 'x.safetensors', input.length);
    return [found, [...joinScales(tensors, { quantization_config: { quant_method: 'fp8' } }).keys()].length];
  },
};

const expectKnown = (format: string): void =>
  must(['safetensors', 'torch', 'gguf', 'onnx'].includes(format), format, 'format');

/** DeepSeek's own names: two shards that are the same. */
const native: Target = {
  name: 'DeepSeek native',
  seeds: [nativeShard],
  reshape: reshapeSafetensors,
  read: (input) => {
    const { tensors } = readSafetensors(inMemory(input, 'x'));
    const joined = [...fromNative([tensors, tensors], {}).values()];
    return joined.slice(0, 4).map(({ shape, encoding }) => [shape, encoding.kind]);
  },
};

// --- GGUF ---
/** A llama of one layer with a tokenizer of each kind. */
function tinyModel(kind: 'llama' | 'gpt2'): Buffer {
  const scalar = (type: 'u32' | 'f32' | 'string' | 'bool', value: string | number | boolean): GgufValue => ({
    type,
    value,
  });
  const tokens = ['<unk>', '<s>', 'a', 'b', 'ab', '<0x41>'];
  const metadata = new Map<string, GgufValue>([
    ['general.architecture', scalar('string', 'llama')],
    ['llama.block_count', scalar('u32', 1)],
    ['llama.context_length', scalar('u32', 64)],
    ['llama.embedding_length', scalar('u32', 8)],
    ['llama.feed_forward_length', scalar('u32', 8)],
    ['llama.attention.head_count', scalar('u32', 2)],
    ['llama.attention.head_count_kv', scalar('u32', 1)],
    ['llama.attention.layer_norm_rms_epsilon', scalar('f32', 1e-6)],
    ['llama.rope.freq_base', scalar('f32', 10_000)],
    ['llama.vocab_size', scalar('u32', 6)],
    ['llama.expert_count', scalar('u32', 2)],
    ['llama.expert_used_count', scalar('u32', 1)],
    ['tokenizer.ggml.model', scalar('string', kind)],
    ['tokenizer.ggml.pre', scalar('string', kind === 'llama' ? 'default' : 'llama-bpe')],
    ['tokenizer.ggml.tokens', { type: 'array', of: 'string', value: tokens }],
    ['tokenizer.ggml.token_type', { type: 'array', of: 'i32', value: [2, 3, 1, 1, 1, 6] }],
    ['tokenizer.ggml.scores', { type: 'array', of: 'f32', value: [0, 0, -1, -2, -3, 0] }],
    ['tokenizer.ggml.merges', { type: 'array', of: 'string', value: ['a b'] }],
    ['tokenizer.ggml.bos_token_id', scalar('u32', 1)],
    ['tokenizer.ggml.add_bos_token', scalar('bool', true)],
    ['deepseek-convert.widened.bf16', { type: 'array', of: 'string', value: ['model.norm.weight'] }],
  ]);
  const f32: Encoding = { kind: 'plain', dtype: 'f32' };
  const tensors = (
    [
      ['token_embd.weight', [6, 8]],
      ['blk.0.attn_norm.weight', [8]],
      ['blk.0.attn_q.weight', [8, 8]],
      ['blk.0.attn_k.weight', [4, 8]],
      ['blk.0.attn_v.weight', [4, 8]],
      ['blk.0.attn_output.weight', [8, 8]],
      ['blk.0.ffn_gate_inp.weight', [2, 8]],
      ['blk.0.ffn_gate_exps.weight', [2, 8, 8]],
      ['output_norm.weight', [8]],
    ] as [string, number[]][]
  ).map(([name, shape]) => ({ name, shape, encoding: f32 }));
  const { header, size } = buildGgufHeader(metadata, tensors);
  return Buffer.concat([header, Buffer.alloc(size - header.length)]);
}

const gguf: Target = {
  name: 'GGUF',
  seeds: [seed('gguf/all-types.gguf'), seed('gguf/aligned.gguf'), tinyModel('llama'), tinyModel('gpt2')],
  reshape: reshapeGguf,
  read: (input) => {
    const { tensors, metadata } = readGguf(inMemory(input, 'x.gguf'));
    return sound(tensors, 'x.gguf', input.length).concat([{ values: metadata.size }]);
  },
};

const ggufModel: Target = {
  name: 'GGUF models',
  seeds: [tinyModel('llama'), tinyModel('gpt2')],
  reshape: reshapeGguf,
  read: async (input) => {
    const { tensors, metadata } = readGguf(inMemory(input, 'x.gguf'));
    const model = await fromGguf(metadata, byName(tensors), 'x.gguf', undefined);
    const found = sound(model.tensors.values(), 'x.gguf', input.length);
    for (const text of model.extraFiles.values()) parseJson(text, { where: 'made', lenient: true });
    return [found, model.config['model_type'], model.notes.length, [...model.extraFiles.keys()]];
  },
};

// --- PyTorch ---
const torch = (name: string, files: readonly string[], reshape: Target['reshape']): Target => ({
  name: `PyTorch ${name}`,
  seeds: files.map((file) => seed(`torch/${file}.bin`)),
  reshape,
  read: (input) => {
    const source = inMemory(input, 'x.bin');
    if (input.length > 0) expectKnown(detectFormat(source));
    torchRefusals(source);
    const { tensors, container, notes } = readTorch(source);
    return [container, notes.length, sound(tensors, 'x.bin', input.length)];
  },
});
const versions = ['protocol-1', 'protocol-2', 'protocol-4', 'protocol-5'];

// --- ONNX ---
const onnx: Target = {
  name: 'ONNX',
  seeds: [seed('onnx/model.onnx'), seed('onnx/external/model.onnx')],
  reshape: reshapeProtobuf,
  read: async (input) => {
    const path = join(formats, 'onnx/external/model.onnx');
    const { tensors, nodes, externalFiles } = readOnnx(inMemory(input, path));
    const found = sound(tensors, path, input.length);
    for (const file of externalFiles) must(file.path.startsWith(join(formats, 'onnx/external')), file.path, 'folder');
    const model = fromOnnx(byName(tensors), nodes, { num_attention_heads: 2, hidden_size: 8 });
    sound([...model.tensors.values()].filter(({ strides }) => strides === undefined), path, input.length); // prettier-ignore
    const layout = detectLayout(model.config, 'x');
    const linears = layout ? await readLinears(layout, model.tensors) : [];
    return [found, nodes.length, model.tensors.size, linears];
  },
};

// --- tokenizers and importance ---
const sentencePiece: Target = {
  name: 'SentencePiece',
  seeds: [seed('tokenizers/unigram/unigram.model')],
  reshape: reshapeProtobuf,
  read: (input) => {
    const model = parseSentencePiece(input, 'tokenizer.model');
    const { pieces, kind, unknown, charsmap } = model;
    for (const { text, score } of pieces) must(Number.isFinite(score), text, 'score');
    must(unknown >= 0 && unknown < pieces.length && charsmap.length <= input.length, kind, 'id or map');
    const { metadata, notes } = sentencePieceToGguf({ model, config: {}, added: {} }, 1024);
    return [kind, pieces.length, notes.length, [...metadata.keys()]];
  },
};

/** Two tensors in the form that llama.cpp wrote until 2025. */
function oldImatrix(): Buffer {
  const i32 = (n: number): Buffer => Buffer.from(Int32Array.of(n).buffer);
  const entry = (name: string): Buffer[] => [i32(name.length), Buffer.from(name), i32(2), i32(3), Buffer.from(Float32Array.of(1, 0, 4).buffer)]; // prettier-ignore
  return Buffer.concat([i32(2), ...entry('blk.0.attn_q.weight'), ...entry('output.weight'), i32(1)]);
}
const imatrix: Target = {
  name: 'importance',
  seeds: [oldImatrix()],
  reshape: (random, input) => {
    const changed = Buffer.from(input);
    const at = 4 * random.below(changed.length >> 2);
    changed.writeInt32LE(
      Number(BigInt.asIntN(32, random.below(2) === 0 ? BigInt(random.below(40)) : edge(random))),
      at,
    );
    return changed;
  },
  read: (input) => {
    const found = parseImatrix(input, 'imatrix.dat');
    for (const [name, { values }] of found) must(4 * values.length <= input.length && values.every((v) => v >= 0), name, 'importance'); // prettier-ignore
    return [...found].map(([name, { values }]) => [name, values.length]);
  },
};

// --- texts ---
const compact = (path: string): string => JSON.stringify(JSON.parse(readFileSync(join(formats, '..', path), 'utf8')));

export const containers: readonly Job[] = [
  job(safetensors, 32_000, 500),
  job(native, 15_000, 100),
  job(gguf, 24_000, 150),
  job(ggufModel, 20_000, 150),
  job(onnx, 12_000, 40),
  job(sentencePiece, 5_000, 25),
  job(imatrix, 4_000, 20),
];

const zipFiles = [...versions, 'views', 'training'];
export const pickles: readonly Job[] = [
  job(torch('zip', zipFiles, reshapeZip), 27_000, 100),
  job(torch('legacy streams', [...versions.map((name) => `${name}-legacy`), 'legacy-views', 'training-legacy'], reshapeStream), 20_000, 150), // prettier-ignore
  job(torch('tar', ['tar'], reshapeTar), 10_000, 70),
];

const someJson = '{"a":[1,2.5,-3e2,{"b":null}],"c":"x\\u00e9\\n","d":true}';
const someIndex = { metadata: { total_size: 8 }, weight_map: { a: 'm-1.safetensors', b: 'm-2.safetensors' } };
export const texts: readonly Job[] = [
  job(text('JSON', [someJson], (bytes) => parseJson(bytes, { where: 'x.json' })), 10_000, 200), // prettier-ignore
  job(text('configs', [compact('moe-6m/config.json')], (bytes) => Object.keys(parseConfig(bytes, 'x').config).length), 5_000, 12), // prettier-ignore
  job(text('indexes', [JSON.stringify(someIndex)], (bytes) => listed(scannedAlike(() => parseIndex(bytes, 'x')))), 5_000, 100), // prettier-ignore
];
