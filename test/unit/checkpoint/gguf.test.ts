import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { bytesSource } from '../../../src/base/io.js';
import { Job } from '../../../src/base/job.js';
import { llama3Factors, planGguf } from '../../../src/checkpoint/gguf-model.js';
import type { GgufPlan } from '../../../src/checkpoint/gguf-model.js';
import { configToGguf, shortest } from '../../../src/checkpoint/gguf-config.js';
import { tokenizerFromGguf } from '../../../src/checkpoint/gguf-tokenizer-files.js';
import { archOfModel } from '../../../src/checkpoint/gguf-arch.js';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import type { Checkpoint, PlannedTensor, TensorEntry } from '../../../src/checkpoint/types.js';
import { createWriter } from '../../../src/checkpoint/writer.js';
import { ggufTypes, type GgufValue } from '../../../src/formats/gguf.js';
import { badInputMessage } from '../../support/refusal.js';
import { numbers } from '../../support/values.js';

const fixture = fileURLToPath(new URL('../../../fixtures/formats/models/', import.meta.url));
interface Expected {
  metadata: Record<string, [type: string, value: unknown]>;
  tensors: Record<string, [shape: number[], digest: string]>;
}
const expected = JSON.parse(readFileSync(join(fixture, 'expected.json'), 'utf8')) as Record<string, Expected>;
const names = Object.keys(expected);
const typeNames = ['uint8', 'int8', 'uint16', 'int16', 'uint32', 'int32', 'float32', 'bool', 'string', 'array', 'uint64', 'int64', 'float64']; // prettier-ignore

let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'gguf-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const f32 = (entry: TensorEntry): Buffer => Buffer.from(Float32Array.from(numbers(entry)).buffer);
const digest = (bytes: Buffer): string => createHash('sha256').update(bytes).digest('hex').slice(0, 16);

/** Writes a plan in f32. */
async function write(plan: GgufPlan, out: string): Promise<void> {
  const job = await Job.open({ out, fingerprint: {} });
  const tensors: PlannedTensor[] = [
    ...plan.tensors.map(({ name, shape }) => ({ name, shape, dtype: 'f32' as const })),
    ...[...plan.computed].map(([name, values]) => ({ name, shape: [values.length], dtype: 'f32' as const })),
  ];
  const provenance = { tool: { name: 't', version: '1' }, recipe: null, inputs: [] };
  const writer = await createWriter({ job, format: 'gguf', tensors, gguf: plan.metadata, config: {}, provenance });
  for (const { name, entry } of plan.tensors) await writer.write(name, bytesSource(f32(entry)));
  for (const [name, values] of plan.computed) await writer.write(name, bytesSource(Buffer.from(values.buffer)));
  await writer.finish();
  await job.remove();
}

describe('planGguf', () => {
  it.each(names)('names and arranges the tensors of %s as its converter does', async (name) => {
    const plan = await planGguf(await openCheckpoint(join(fixture, name)), 'f32');
    const listing = plan.tensors.map((tensor) => [tensor.name, [tensor.shape, digest(f32(tensor.entry))]] as const);
    expect(Object.fromEntries(listing)).toEqual(expected[name]!.tensors);
  });

  it.each(names)('writes the metadata of %s under the keys and types of gguf-py', async (name) => {
    const { metadata } = await planGguf(await openCheckpoint(join(fixture, name)), 'f32');
    const got = [...metadata].map(
      ([key, { type, value }]) => [key, [typeNames[ggufTypes.indexOf(type)], value]] as const,
    );
    // Without a tokenizer llama.cpp wants to be told so.
    const want: Expected['metadata'] = { ...expected[name]!.metadata, 'tokenizer.ggml.model': ['string', 'no_vocab'] };
    expect(got.map(([key]) => key).sort()).toEqual(Object.keys(want).sort());
    for (const [key, [type, value]] of got) {
      const [wantType, wantValue] = want[key]!;
      expect(type, key).toBe(wantType);
      if (typeof value === 'number') expect(value, key).toBeCloseTo(wantValue as number, 12);
      else expect(value, key).toEqual(wantValue);
    }
  });

  it('keeps norms, biases and routers in f32', async () => {
    const plan = await planGguf(await openCheckpoint(join(fixture, 'glm4_moe')), 'bf16');
    const kept = plan.tensors.filter((tensor) => tensor.staysF32).map((tensor) => tensor.name);
    expect(kept).toEqual(expect.arrayContaining(['output_norm.weight', 'blk.1.ffn_gate_inp.weight', 'blk.1.exp_probs_b.bias', 'blk.0.attn_q.bias'])); // prettier-ignore
    expect(kept).not.toContain('blk.1.ffn_gate_exps.weight');
  });
});

describe('GGUF read as a checkpoint', () => {
  /** Config keys that must come back as they were. */
  const keys = [
    'model_type', 'hidden_size', 'intermediate_size', 'num_hidden_layers', 'num_attention_heads', 'num_key_value_heads',
    'max_position_embeddings', 'rms_norm_eps', 'vocab_size', 'tie_word_embeddings',
    'num_experts_per_tok', 'moe_intermediate_size', 'shared_expert_intermediate_size', 'n_routed_experts',
    'n_shared_experts', 'first_k_dense_replace', 'routed_scaling_factor', 'norm_topk_prob', 'n_group', 'topk_group',
    'q_lora_rank', 'kv_lora_rank', 'qk_nope_head_dim', 'qk_rope_head_dim', 'v_head_dim', 'use_qk_norm', 'architectures',
  ]; // prettier-ignore

  it.each(names)('gives the tensors and the config of %s back', async (name) => {
    const original = await openCheckpoint(join(fixture, name));
    const out = join(folder, 'model.gguf');
    await write(await planGguf(original, 'f32'), out);
    const back = await openCheckpoint(out);
    expect(back.format).toBe('gguf');
    const stored = [...original.tensors].filter(
      ([key]) => key !== 'lm_head.weight' || !original.config['tie_word_embeddings'],
    );
    expect([...back.tensors.keys()].sort()).toEqual(stored.map(([key]) => key).sort());
    for (const [key, entry] of stored) {
      expect(back.tensors.get(key)!.shape, key).toEqual(entry.shape);
      expect(f32(back.tensors.get(key)!).equals(f32(entry)), key).toBe(true);
    }
    requireConfig(original, back, name);
    await back.close();
  });

  function requireConfig(original: Checkpoint, back: Checkpoint, name: string): void {
    const rope = original.config['rope_parameters'] as Record<string, unknown>;
    // Mistral is a Llama to GGUF.
    const type = name === 'mistral' ? { model_type: 'llama', architectures: ['LlamaForCausalLM'] } : {};
    const want: Record<string, unknown> = { ...original.config, ...type };
    for (const key of keys) expect(back.config[key] ?? undefined, key).toEqual(want[key] ?? undefined);
    // transformers 5 writes either name.
    const experts = (config: Record<string, unknown>): unknown => config['num_experts'] ?? config['num_local_experts'];
    expect(experts(back.config)).toEqual(experts(want));
    if (typeof original.config['head_dim'] === 'number' && !name.startsWith('deepseek'))
      expect(back.config['head_dim']).toBe(original.config['head_dim']);
    expect(back.config['rope_theta']).toBe(rope['rope_theta']);
    if (rope['rope_type'] === 'default') expect(back.config['rope_scaling']).toBeUndefined();
    else {
      const { rope_theta: _, ...scaling } = rope;
      expect(back.config['rope_scaling']).toMatchObject(scaling);
    }
    if (name === 'glm4_moe') expect(back.config['partial_rotary_factor']).toBe(0.5);
  }

  it('takes a config given explicitly, and not one that lies beside the file', async () => {
    await write(await planGguf(await openCheckpoint(join(fixture, 'llama')), 'f32'), join(folder, 'model.gguf'));
    const { writeFileSync } = await import('node:fs');
    const original = JSON.parse(readFileSync(join(fixture, 'llama/config.json'), 'utf8')) as object;
    writeFileSync(join(folder, 'config.json'), JSON.stringify({ model_type: 'other' }));
    expect((await openCheckpoint(join(folder, 'model.gguf'))).config['model_type']).toBe('llama');
    writeFileSync(join(folder, 'given.json'), JSON.stringify({ ...original, marker: 1 }));
    const given = await openCheckpoint(join(folder, 'model.gguf'), { config: join(folder, 'given.json') });
    expect(given.config['marker']).toBe(1);
  });
});

describe('what GGUF cannot say', () => {
  const config = (name: string, more: object): Record<string, unknown> => ({
    ...(JSON.parse(readFileSync(join(fixture, name, 'config.json'), 'utf8')) as object),
    ...more,
  });
  const message = (name: string, more: object): Promise<string> =>
    badInputMessage(() => {
      const changed = config(name, more);
      configToGguf(changed, archOfModel(changed['model_type']), 'f32');
    });

  it('is refused: it would change the answers of the model', async () => {
    expect(await message('llama', { model_type: 'gpt2' })).toContain('not written as GGUF');
    expect(await message('qwen2_moe', { norm_topk_prob: true })).toContain('fixed for the architecture');
    expect(await message('qwen3_moe', { norm_topk_prob: false })).toContain('expected true');
    expect(await message('mistral', { sliding_window: 32 })).toContain('sliding window');
    expect(await message('deepseek_v3', { rope_interleave: false })).toContain('interleaved');
    expect(await message('llama', { rope_parameters: { rope_type: 'longrope' } })).toContain('rope scaling');
    expect(await message('deepseek_v3', { scoring_func: 'tanh' })).toContain('softmax or sigmoid');
  });

  it('tensors without a name, missing experts, heads that do not divide', async () => {
    const { tensorsToGguf } = await import('../../../src/checkpoint/gguf-tensors.js');
    const open = await openCheckpoint(join(fixture, 'qwen3_moe'));
    const arch = archOfModel('qwen3_moe');
    const extra = new Map([...open.tensors, ['model.layers.0.extra.weight', open.tensors.get('model.norm.weight')!]]);
    expect(await badInputMessage(() => tensorsToGguf(extra, open.config, arch))).toContain('no name for a tensor');
    const fewer = new Map([...open.tensors].filter(([key]) => !key.includes('experts.1.up_proj')));
    expect(await badInputMessage(() => tensorsToGguf(fewer, open.config, arch))).toContain('expert 1');
    const llama = await openCheckpoint(join(fixture, 'llama'));
    const odd = { ...llama.config, num_attention_heads: 5 };
    expect(await badInputMessage(() => tensorsToGguf(llama.tensors, odd, archOfModel('llama')))).toContain('5 heads');
  });
});

describe('hostile GGUF models', () => {
  const entry = (name: string, shape: number[]): TensorEntry => ({ name, shape, encoding: { kind: 'plain', dtype: 'f32' }, span: { path: 'x.gguf', offset: 0, bytes: 0 } }); // prettier-ignore
  const named = (...entries: TensorEntry[]) => new Map(entries.map((one) => [one.name, one]));

  it('a stack of 2^40 experts without rows, expert number 4,000,000,000', async () => {
    const { tensorsFromGguf, tensorsToGguf } = await import('../../../src/checkpoint/gguf-tensors.js');
    const { config } = await openCheckpoint(join(fixture, 'qwen3_moe'));
    const arch = archOfModel('qwen3_moe');
    for (const shape of [[2 ** 40, 0, 8], [4], []]) {
      const stack = named(entry('blk.0.ffn_up_exps.weight', shape));
      expect(await badInputMessage(() => tensorsFromGguf(stack, config, arch))).toContain('Not the shape of experts');
    }
    const far = named(entry('model.layers.0.mlp.experts.4000000000.up_proj.weight', [8, 8]));
    expect(await badInputMessage(() => tensorsToGguf(far, config, arch))).toContain('no room for so many experts');
  });

  it('a token of a million characters', () => {
    const metadata = new Map<string, GgufValue>([
      ['tokenizer.ggml.model', { type: 'string', value: 'llama' }],
      ['tokenizer.ggml.tokens', { type: 'array', of: 'string', value: ['a', 'b', 'ab', 'ab'.repeat(500_000)] }],
    ]);
    const { files } = tokenizerFromGguf(metadata);
    const { model } = JSON.parse(files.get('tokenizer.json')!) as { model: { merges: string[][] } };
    expect(model.merges).toEqual([['a', 'b']]);
  });
});

describe('numbers', () => {
  it('f32 metadata comes back as the decimal that was meant', () => {
    for (const value of [1e-6, 1e-5, 2.5, 10000, 500000, 0.1, 1 / 3])
      expect(shortest(Math.fround(value))).toBeCloseTo(value, 7);
    expect(shortest(Math.fround(1e-6))).toBe(1e-6);
  });
  it("Llama 3's factors are 1 for fast and the factor for slow frequencies", () => {
    const factors = llama3Factors({ rope_theta: 500000, factor: 8 }, 128);
    expect([factors[0], factors[63]]).toEqual([1, 8]);
    expect([...factors]).toEqual([...factors].sort((a, b) => a - b));
  });
});
