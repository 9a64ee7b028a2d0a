import { readdirSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { buildModel } from '../../src/arch/registry.js';
import { dtypeSize, type DType } from '../../src/base/dtype.js';
import { badInput } from '../../src/base/errors.js';
import { readConfig, parseConfig } from '../../src/checkpoint/config.js';
import { tokenizerFromGguf } from '../../src/checkpoint/gguf-tokenizer-files.js';
import { tokenizerToGguf } from '../../src/checkpoint/gguf-tokenizer.js';
import { adapterOf } from '../../src/export/merge-lora.js';
import { buildGgufHeader } from '../../src/formats/gguf.js';
import { isJsonObject, parseJson, type JsonObject } from '../../src/formats/json.js';
import type { TensorEntry } from '../../src/formats/types.js';
import { detectLayout, layoutWriters } from '../../src/layout/detect.js';
import { parseImatrix } from '../../src/targets/imatrix.js';
import { BpeModel } from '../../src/tokenizer/bpe.js';
import { makeTokenizer } from '../../src/tokenizer/tokenizer.js';
import { readVocabulary } from '../../src/tokenizer/vocabulary.js';
import { must, type Target } from './engine.js';
import { reshapeGguf } from './gguf.js';
import { job, text, type Job } from './jobs.js';
import { readLinears } from './linears.js';

const fixtures = new URL('../../fixtures/', import.meta.url).pathname;
const read = (...path: string[]): string => readFileSync(join(fixtures, ...path), 'utf8');
const compact = (...path: string[]): string => JSON.stringify(JSON.parse(read(...path)));

function object(bytes: Buffer | string, where: string): JsonObject {
  const value = parseJson(bytes, { where, lenient: true });
  if (!isJsonObject(value)) throw badInput('No object', { where });
  return value;
}

// --- tokenizers ---
const added = (id: number, content: string) => ({ id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: true }); // prettier-ignore
const split = { type: 'Split', pattern: { Regex: '\\p{N}{1,3}|\\s+(?!\\S)' }, behavior: 'Isolated', invert: false };
const byteLevel: object = { type: 'ByteLevel', add_prefix_space: false, trim_offsets: true, use_regex: true };
const template = {
  type: 'TemplateProcessing',
  single: [{ SpecialToken: { id: '<s>', type_id: 0 } }, { Sequence: { id: 'A', type_id: 0 } }],
  pair: [{ Sequence: { id: 'A', type_id: 0 } }, { Sequence: { id: 'B', type_id: 1 } }],
  special_tokens: { '<s>': { id: '<s>', ids: [0], tokens: ['<s>'] } },
};
/** Small tokenizers of each kind, with as many kinds of steps as there are. */
const tokenizers = [
  {
    normalizer: { type: 'Sequence', normalizers: [{ type: 'NFC' }, { type: 'Strip', strip_left: false, strip_right: true }] },
    pre_tokenizer: { type: 'Sequence', pretokenizers: [split, byteLevel] },
    post_processor: template,
    decoder: byteLevel,
    model: { type: 'BPE', dropout: null, unk_token: null, ignore_merges: true, byte_fallback: false, vocab: { '<s>': 0, a: 1, b: 2, ab: 3, 'Ġ': 4, 'Ġa': 5 }, merges: [['a', 'b'], ['Ġ', 'a']] },
  },
  {
    normalizer: { type: 'Sequence', normalizers: [{ type: 'Prepend', prepend: '▁' }, { type: 'Replace', pattern: { String: ' ' }, content: '▁' }] },
    decoder: { type: 'Sequence', decoders: [{ type: 'Replace', pattern: { String: '▁' }, content: ' ' }, { type: 'ByteFallback' }, { type: 'Fuse' }, { type: 'Strip', content: ' ', start: 1, stop: 0 }] },
    post_processor: template,
    model: { type: 'BPE', unk_token: '<unk>', fuse_unk: true, byte_fallback: true, vocab: { '<s>': 0, '<unk>': 1, '<0x41>': 2, '▁': 3, a: 4, b: 5, ab: 6 }, merges: ['a b'] },
  },
  {
    normalizer: { type: 'BertNormalizer', clean_text: true, handle_chinese_chars: true, strip_accents: null, lowercase: true },
    pre_tokenizer: { type: 'BertPreTokenizer' },
    post_processor: { type: 'BertProcessing', sep: ['b', 2], cls: ['a', 1] },
    decoder: { type: 'WordPiece', prefix: '##', cleanup: true },
    model: { type: 'WordPiece', unk_token: '<s>', continuing_subword_prefix: '##', max_input_chars_per_word: 100, vocab: { '<s>': 0, a: 1, b: 2, '##b': 3 } },
  },
  {
    pre_tokenizer: { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always', split: true },
    decoder: { type: 'Metaspace', replacement: '▁', prepend_scheme: 'always', split: true },
    model: { type: 'Unigram', unk_id: 0, vocab: [['<s>', 0], ['▁', -1], ['a', -2.5], ['ab', -3]], byte_fallback: false },
  },
].map((parts) => JSON.stringify({ version: '1.0', added_tokens: [added(0, '<s>'), added(9, '<x>')], ...parts })); // prettier-ignore

const someText = 'ab <x> aé1234  b\n\n';
/** What every use of a tokenizer.json does with it. */
const tokenizerJson: Target = text('tokenizer.json', tokenizers, async (bytes) => {
  const tokenizer = await makeTokenizer(bytes, 'tokenizer.json');
  let ids: Int32Array;
  try {
    ids = await tokenizer.encode(someText, { special: true });
    await tokenizer.encodeWords(someText);
    await tokenizer.decode([...ids, 0, 1, 9, 70_000], { special: true });
  } catch (error) {
    // The library's own refusal: this text has no tokens.
    if (error instanceof Error && error.constructor === Error) throw badInput('The text has no tokens', { got: error.message }); // prettier-ignore
    throw error;
  }
  const { size, ids: byMeaning } = await readVocabulary(tokenizer);
  must(size <= 2 ** 24 && byMeaning.size <= size, String(size), 'vocabulary');
  const { model } = JSON.parse(await tokenizer.source()) as { model: { type?: string } };
  if (model.type !== 'BPE') return [model.type, ids.length, size];
  const bpe = new BpeModel(await tokenizer.source(), 'tokenizer.json');
  return [model.type, ids.length, size, bpe.merge(bpe.symbols('ab') ?? []).length];
});

/** What goes into a GGUF file, and comes back. */
const tokenizerConfig: Target = text(
  'tokenizers into GGUF',
  [{ ...(JSON.parse(tokenizers[0]!.replace('"ignore_merges":true', '"ignore_merges":false')) as object), pre_tokenizer: byteLevel }, JSON.parse(tokenizers[1]!), JSON.parse(tokenizers[3]!)].map((tokenizer) =>
    JSON.stringify([tokenizer, { bos_token: '<s>', eos_token: { content: '<x>' }, add_bos_token: true, chat_template: 'x' }])), // prettier-ignore
  (bytes) => {
    const both = parseJson(bytes, { where: 'x', lenient: true });
    if (!Array.isArray(both) || both.length !== 2 || !both.every(isJsonObject)) throw badInput('Not two files');
    const [tokenizer, config] = both as [JsonObject, JsonObject];
    const metadata = tokenizerToGguf({ text: JSON.stringify(tokenizer), tokenizer, config }, 16);
    buildGgufHeader(metadata, []);
    metadata.delete('tokenizer.huggingface.json');
    const { files, notes } = tokenizerFromGguf(metadata);
    for (const made of files.values()) parseJson(made, { where: 'made', lenient: true });
    return [[...metadata.keys()].length, files.size, notes.length];
  },
);

// --- configs of models ---
const architectures = readdirSync(join(fixtures, 'arch'), { withFileTypes: true }).filter((entry) =>
  entry.isDirectory(),
);
const modelConfig: Target = text(
  'architectures',
  architectures.map(({ name }) => compact('arch', name, 'config.json')),
  (bytes) => {
    const { config } = parseConfig(bytes, 'config.json');
    const model = buildModel(config, 'config.json', (name) => name.length % 2 === 0);
    const [first, last] = [model.blocks[0]!, model.blocks.at(-1)!];
    for (const { name, shape } of [...model.outer, ...first.tensors, ...last.tensors]) {
      must(shape.every((d) => Number.isSafeInteger(d) && d > 0), name, 'shape'); // prettier-ignore
    }
    detectLayout(config, 'config.json');
    return [model.modelType, model.blocks.length, first.tensors.length, model.outer.length];
  },
);

// --- tensors beside settings ---
type Stored = Readonly<Record<string, readonly [dtype: string, ...shape: number[]]>>;
/** Tensors as a JSON text describes them; their bytes are zero. */
function entriesOf(value: unknown): Map<string, TensorEntry> {
  if (!isJsonObject(value)) throw badInput('No tensors');
  const entries = new Map<string, TensorEntry>();
  for (const [name, form] of Object.entries(value as Record<string, unknown>)) {
    const [dtype, ...shape] = Array.isArray(form) ? (form as unknown[]) : [];
    const known = ['i32', 'i64', 'u8', 'i8', 'f32', 'bf16', 'f16'].includes(dtype as string);
    const count = shape.reduce<number>((n, d) => (Number.isSafeInteger(d) && (d as number) >= 0 ? n * (d as number) : NaN), 1); // prettier-ignore
    if (!known || !(count <= 65_536)) throw badInput('Not a tensor', { where: name });
    const span = { path: 'x', offset: 0, bytes: count * dtypeSize(dtype as DType) };
    entries.set(name, { name, shape: shape as number[], encoding: { kind: 'plain', dtype: dtype as DType }, span });
  }
  return entries;
}

const pack = (bits: number, group: number, symmetric: boolean, order?: 'group') => ({ bits, group, symmetric, ...(order && { order }) }) as never; // prettier-ignore
/** What our writers store of a linear of 32 x 32, with the config that they write. */
function layoutSeed(name: keyof typeof layoutWriters, scheme: never): string {
  const writer = layoutWriters[name];
  const planned = writer.plan({ name: 'a.q_proj', inFeatures: 32, outFeatures: 32 }, scheme, 'bf16');
  const tensors: Stored = Object.fromEntries(planned.filter((t) => !t.name.endsWith('weight_shape')).map((t) => [t.name, [t.dtype, ...t.shape]])); // prettier-ignore
  const config = writer.config({ groups: [{ scheme, linears: ['a.q_proj'] }], ignore: ['lm_head'] });
  return JSON.stringify({ config: { quant_method: name, ...config }, tensors, columns: 32 });
}
const layouts: Target = text(
  'quantized layouts',
  [
    layoutSeed('compressed-tensors', pack(4, 16, true)),
    layoutSeed('compressed-tensors', pack(3, 16, false, 'group')).replace('"Linear"', '"re:.*proj","Linear"'),
    layoutSeed('gptq', pack(4, 16, true)),
    layoutSeed('gptq', pack(3, 32, false, 'group')),
    layoutSeed('awq', pack(4, 16, false)),
    JSON.stringify({
      config: { quant_method: 'matmulnbits', linears: { 'a.weight': { bits: 4, blockSize: 16, inFeatures: 32, outFeatures: 8 }, 'b.weight': { bits: 8, blockSize: 32, inFeatures: 40, outFeatures: 4, rows: { first: 1, step: 2 } } } },
      tensors: { 'a.weight_nbits': ['u8', 8, 2, 8], 'a.weight_scales': ['f32', 8, 2], 'a.weight_zero_points': ['u8', 8, 1], 'a.weight_g_idx': ['i32', 32], 'b.weight_nbits': ['u8', 8, 2, 32], 'b.weight_scales': ['f16', 8, 2], 'b.weight_zero_points': ['f16', 8, 2] },
    }),
  ],
  async (bytes) => {
    const { config, tensors, columns } = object(bytes, 'x');
    const layout = detectLayout({ quantization_config: config }, 'config.json');
    if (layout === undefined) return [];
    return [layout.name, ...(await readLinears(layout, entriesOf(tensors), columns))];
  },
); // prettier-ignore

// --- LoRA ---
const base = new Map([['model.layers.0.self_attn.q_proj.weight', [8, 4]], ['model.norm.weight', [8]], ['lm_head.weight', [6, 8]]]); // prettier-ignore
const adapters: Target = text(
  'LoRA adapters',
  ['plain', 'patterns'].map((name) => {
    const prefix = 'base_model.model.model.layers.0.self_attn.q_proj.lora_';
    const settings = { ...readConfig(join(fixtures, 'lora', name, 'adapter_config.json')).config, rank_pattern: { 'q_proj|x': 2 }, alpha_pattern: { '.*0\\.self_attn\\.q_proj': 4 } };
    const tensors: Stored = { [`${prefix}A.weight`]: ['f32', 2, 4], [`${prefix}B.weight`]: ['f32', 8, 2], 'base_model.model.model.norm.modules_to_save.weight': ['f32', 8] };
    return JSON.stringify({ settings, tensors });
  }),
  (bytes) => {
    const { settings, tensors } = object(bytes, 'x');
    if (!isJsonObject(settings)) throw badInput('No settings');
    const stored = { path: 'adapter_model.safetensors', tensors: entriesOf(tensors), fingerprint: '' };
    const adapter = adapterOf({ settings, where: 'adapter_config.json' }, stored, base);
    for (const [name, merge] of adapter.merges) {
      must(base.has(name), name, 'weight');
      if (merge.kind === 'add') must(Number.isFinite(merge.scale) && adapter.tensors.has(merge.a) && adapter.tensors.has(merge.b), name, 'scale');
      else must(adapter.tensors.get(merge.by)?.shape.join() === base.get(name)!.join(), name, 'shape');
    }
    return [adapter.merges.size, adapter.tensors.size];
  },
); // prettier-ignore

// --- importance in GGUF ---
function imatrixFile(): Buffer {
  const f32 = { kind: 'plain', dtype: 'f32' } as const;
  const tensors = [['blk.0.attn_q.weight', [1, 4], [1, 1]], ['blk.0.ffn_gate_exps.weight', [2, 4], [2, 1]]] as const;
  const entries = tensors.flatMap(([name, sums, counts]) => [{ name: `${name}.in_sum2`, shape: sums, encoding: f32 }, { name: `${name}.counts`, shape: counts, encoding: f32 }]);
  const { header, size } = buildGgufHeader(new Map([['general.type', { type: 'string', value: 'imatrix' }]]), entries);
  return Buffer.concat([header, Buffer.alloc(size - header.length)]);
} // prettier-ignore
const imatrixGguf: Target = {
  name: 'importance in GGUF',
  seeds: [imatrixFile()],
  reshape: reshapeGguf,
  read: (input) => {
    const found = parseImatrix(input, 'imatrix.gguf');
    for (const [name, { experts, values }] of found) {
      must(4 * values.length <= input.length && values.every((v) => v >= 0), name, 'importance');
      must(Number.isInteger(values.length / experts), name, 'number of experts');
    }
    return [...found].map(([name, { experts, values }]) => [name, experts, values.length]);
  },
};

export const models: readonly Job[] = [
  job(tokenizerJson, 4_000, 10),
  job(tokenizerConfig, 3_000, 10),
  job(modelConfig, 4_000, 10),
  job(layouts, 5_000, 10),
  job(adapters, 5_000, 10),
  job(imatrixGguf, 4_000, 10),
];
