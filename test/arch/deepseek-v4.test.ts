import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { buildModel } from '../../src/arch/registry.js';
import { ResidentModel } from '../../src/arch/resident.js';
import { WeightReader } from '../../src/arch/weights.js';
import { leaveOut } from '../../src/quant/select.js';
import { cast } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { badInputMessage } from '../support/refusal.js';
import { archCase, expected, fixture, relativeError, testEnv, type RawTensor } from './support.js';

const env = testEnv();
type Edit = NonNullable<Parameters<typeof archCase>[1]>;
const tokens = expected(fixture('arch', 'deepseek_v4', 'expected.safetensors')).tokens!.i32.slice(0, 40);

async function logits(edit: Edit = {}): Promise<Float32Array> {
  const open = await openModel(archCase('deepseek_v4', edit));
  try {
    using resident = await ResidentModel.load(open, env, 'f32');
    using scope = new Scope(env.device);
    return await resident.logits(scope, resident.hidden(scope, tokens, 1)).float32();
  } finally {
    await open.close();
  }
}

/** As transformers 5.18 writes names -> as they were published, and as its modules are called. */
const published = (name: string): string =>
  name
    .replace(/^model\.embed_tokens/, 'embed')
    .replace(/^model\.hc_head\./, '')
    .replace(/^hc_(fn|base|scale)$/, 'hc_head_$1')
    .replace(/^model\./, '')
    .replace(/attn\.norm\./, 'attn.kv_norm.');
const moduleNames: Record<string, string> = {
  'attn_norm.weight': 'input_layernorm.weight',
  'ffn_norm.weight': 'post_attention_layernorm.weight',
  'attn.attn_sink': 'self_attn.sinks',
  'attn.norm.weight': 'self_attn.kv_norm.weight',
  'attn.q_norm.weight': 'self_attn.q_a_norm.weight',
  'attn.wkv.weight': 'self_attn.kv_proj.weight',
  'attn.wo_a.weight': 'self_attn.o_a_proj.weight',
  'attn.wo_b.weight': 'self_attn.o_b_proj.weight',
  'attn.wq_a.weight': 'self_attn.q_a_proj.weight',
  'attn.wq_b.weight': 'self_attn.q_b_proj.weight',
  'attn.compressor.ape': 'self_attn.compressor.position_bias',
  'attn.compressor.norm.weight': 'self_attn.compressor.kv_norm.weight',
  'attn.compressor.wgate.weight': 'self_attn.compressor.gate_proj.weight',
  'attn.compressor.wkv.weight': 'self_attn.compressor.kv_proj.weight',
  'attn.indexer.compressor.ape': 'self_attn.compressor.indexer.position_bias',
  'attn.indexer.compressor.norm.weight': 'self_attn.compressor.indexer.kv_norm.weight',
  'attn.indexer.compressor.wgate.weight': 'self_attn.compressor.indexer.gate_proj.weight',
  'attn.indexer.compressor.wkv.weight': 'self_attn.compressor.indexer.kv_proj.weight',
  'attn.indexer.weights_proj.weight': 'self_attn.compressor.indexer.scorer.weights_proj.weight',
  'attn.indexer.wq_b.weight': 'self_attn.compressor.indexer.q_b_proj.weight',
  hc_attn_base: 'attn_hc.base',
  hc_attn_fn: 'attn_hc.fn',
  hc_attn_scale: 'attn_hc.scale',
  hc_ffn_base: 'ffn_hc.base',
  hc_ffn_fn: 'ffn_hc.fn',
  hc_ffn_scale: 'ffn_hc.scale',
  'ffn.gate.weight': 'mlp.gate.weight',
  'ffn.gate.bias': 'mlp.gate.e_score_correction_bias',
  'ffn.gate.tid2eid': 'mlp.gate.tid2eid',
};
const parts: Record<string, string> = { w1: 'gate_proj', w2: 'down_proj', w3: 'up_proj' };
function asModule(name: string): string {
  const [, layer, rest] = /^(model\.layers\.\d+)\.(.*)$/.exec(name) ?? [];
  if (rest === undefined) return name.replace(/^head\./, 'lm_head.');
  const known = moduleNames[rest];
  if (known !== undefined) return `${layer}.${known}`;
  const ffn = /^ffn\.(.*)\.(w\d)\.weight$/.exec(rest);
  if (!ffn) throw new Error(`no module name for ${name}`);
  return `${layer}.mlp.${ffn[1]}.${parts[ffn[2]!]}.weight`;
}
const renamed =
  (rename: (name: string) => string) =>
  (tensors: Map<string, RawTensor>): void => {
    const all = [...tensors];
    tensors.clear();
    for (const [name, tensor] of all) tensors.set(rename(name), tensor);
  };

/** Experts of each layer in two tensors, as transformers holds them. */
function fuse(tensors: Map<string, RawTensor>): void {
  for (let layer = 0; layer < 4; layer++) {
    const prefix = `model.layers.${layer}.mlp.experts`;
    const take = (e: number, part: string) => {
      const tensor = tensors.get(`${prefix}.${e}.${part}.weight`)!;
      tensors.delete(`${prefix}.${e}.${part}.weight`);
      return tensor;
    };
    const [gateUp, down]: [RawTensor[], RawTensor[]] = [[], []];
    for (let e = 0; e < 4; e++) {
      gateUp.push(take(e, 'gate_proj'), take(e, 'up_proj'));
      down.push(take(e, 'down_proj'));
    }
    const all = (list: RawTensor[], shape: number[]): RawTensor => {
      return { dtype: 'BF16', shape, data: new Uint8Array(Buffer.concat(list.map(({ data }) => data))) };
    };
    const [width, hidden] = gateUp[0]!.shape as [number, number];
    tensors.set(`${prefix}.gate_up_proj`, all(gateUp, [4, 2 * width, hidden]));
    tensors.set(`${prefix}.down_proj`, all(down, [4, hidden, width]));
  }
}

describe('names', () => {
  test.each<[string, (tensors: Map<string, RawTensor>) => void, string]>([
    ['as they were published', renamed(published), 'layers.3.attn.kv_norm.weight'],
    ['with every norm of a cache under one name', renamed((name) => name.replace('attn.norm.', 'attn.kv_norm.')), 'model.layers.3.attn.kv_norm.weight'],
    ['as the modules of transformers are called', renamed(asModule), 'model.layers.3.self_attn.kv_norm.weight'],
    ['of modules, experts together', (t) => { renamed(asModule)(t); fuse(t); }, 'model.layers.0.self_attn.sinks'],
  ])('%s: every tensor is claimed, the model is the same', async (_, tensors, one) => {
    const open = await openModel(archCase('deepseek_v4', { tensors }));
    expect(open.coverage.claimed).toContain(one);
    expect(open.coverage.carried).toEqual([]);
    expect(open.coverage.claimed).toHaveLength(open.tensors.size);
    await open.close();
    expect(await logits({ tensors })).toEqual(await logits());
  }); // prettier-ignore

  test('drafting layers are carried through, anything else is refused', async () => {
    const extra = { dtype: 'BF16', shape: [1], data: new Uint8Array(2) };
    const open = await openModel(archCase('deepseek_v4', { tensors: (t) => t.set('mtp.0.e_proj.weight', extra) }));
    expect(open.coverage.carried).toEqual(['mtp.0.e_proj.weight']);
    await open.close();
    const odd = openModel(archCase('deepseek_v4', { tensors: (t) => t.set('model.layers.0.attn.wk.weight', extra) }));
    expect(await badInputMessage(odd)).toMatch(/does not have.*layers\.0\.attn\.wk\.weight/s);
    const less = openModel(archCase('deepseek_v4', { tensors: (t) => { renamed(published)(t); t.delete('layers.2.attn.wq_a.weight'); } })); // prettier-ignore
    expect(await badInputMessage(less)).toMatch(/lacks a tensor.*expected layers\.2\.attn\.wq_a\.weight/s);
  });
});

describe('storage of the published checkpoints', () => {
  test('experts in FP4 with a scale a row and 32 columns, other linears in FP8 with E8M0 scales a block', async () => {
    const fp4 = 'model.layers.1.ffn.experts.2.w1';
    const fp8 = 'model.layers.1.attn.wq_a';
    const tensors = (t: Map<string, RawTensor>): void => {
      const [rows, columns] = t.get(`${fp4}.weight`)!.shape as [number, number];
      // Low half: the even column. 0x2 is 1, 0xd is -3; scales 2^(126 - 127), 2^(128 - 127) ...
      t.set(`${fp4}.weight`, { dtype: 'I8', shape: [rows, columns / 2], data: new Uint8Array((rows * columns) / 2).fill(0xd2) }); // prettier-ignore
      t.set(`${fp4}.scale`, { dtype: 'F8_E8M0', shape: [rows, 1], data: Uint8Array.from({ length: rows }, (_, r) => 126 + (r % 3)) }); // prettier-ignore
      const shape = t.get(`${fp8}.weight`)!.shape;
      t.set(`${fp8}.weight`, { dtype: 'F8_E4M3', shape, data: new Uint8Array(shape[0]! * shape[1]!).fill(0x38) });
      t.set(`${fp8}.scale`, { dtype: 'F8_E8M0', shape: [1, 1], data: Uint8Array.of(125) });
    };
    const config = (c: Record<string, unknown>): void => {
      c.expert_dtype = 'fp4';
      c.quantization_config = { quant_method: 'fp8', fmt: 'e4m3', scale_fmt: 'ue8m0' };
    };
    const open = await openModel(archCase('deepseek_v4', { tensors, config }));
    using scope = new Scope(env.device);
    const weights = await new WeightReader(open, env.device, 'f32').block(1, scope);
    const expert = weights.get(`${fp4}.weight`);
    const values = await cast(scope, expert, 'f32').float32();
    const columns = expert.dim(1);
    expect([...values.slice(0, 2), ...values.slice(columns, columns + 2), ...values.slice(2 * columns, 2 * columns + 2)]).toEqual([0.5, -1.5, 1, -3, 2, -6]); // prettier-ignore
    expect(new Set(await weights.get(`${fp8}.weight`).float32())).toEqual(new Set([0.25]));
    await open.close();
  });

  test('tables of experts are integers that point to experts', async () => {
    const name = 'model.layers.0.ffn.gate.tid2eid';
    const message = (edit: (tensor: RawTensor) => RawTensor) =>
      badInputMessage(logits({ tensors: (t) => t.set(name, edit(t.get(name)!)) }));
    const at = (value: number) => (tensor: RawTensor) => {
      const data = tensor.data.slice();
      new DataView(data.buffer).setBigInt64(8 * 100, BigInt(value), true);
      return { ...tensor, data };
    };
    expect(await message(at(4))).toMatch(/points nowhere.*tid2eid.*0 to 3.*got 4/s);
    expect(await message(at(-1))).toMatch(/got -1/);
    expect(await message((t) => ({ ...t, dtype: 'F64' }))).toMatch(/not an integer.*tid2eid.*got f64/s);
    // The same numbers in 32 bits, and one expert twice for all tokens.
    const narrow = (t: RawTensor): RawTensor => {
      const values = Int32Array.from(new BigInt64Array(t.data.buffer), Number);
      return { ...t, dtype: 'I32', data: new Uint8Array(values.buffer) };
    };
    expect(await logits({ tensors: (t) => t.set(name, narrow(t.get(name)!)) })).toEqual(await logits());
    const twice = await logits({ tensors: (t) => t.set(name, { ...t.get(name)!, data: new Uint8Array(1024) }) });
    expect(twice.every(Number.isFinite)).toBe(true);
  });
});

describe('config', () => {
  test('as it was published, and as transformers writes it, mean the same', async () => {
    const config = (c: Record<string, unknown>): void => {
      delete c.rope_parameters;
      delete c.partial_rotary_factor;
      delete c.layer_types;
      delete c.compress_rates;
      Object.assign(c, {
        qk_rope_head_dim: 4,
        rope_scaling: { type: 'yarn', factor: 4, original_max_position_embeddings: 16 },
        // More entries than layers: those of drafting layers.
        compress_ratios: [0, 4, 128, 4, 0, 0],
        compress_rate_hca: 8,
        dspark_block_size: 5,
        dspark_target_layer_ids: [1, 2],
      });
    };
    expect(relativeError(await logits({ config }), await logits())).toBe(0);
  });

  test.each<[string, Record<string, unknown>, RegExp]>([
    ['another rate', { layer_types: undefined, compress_ratios: [0, 4, 2, 4] }, /compress_ratios.*0, 4, 128/s],
    ['softmax scores', { scoring_func: 'softmax' }, /scoring_func.*sqrtsoftplus/s],
    ['several shared experts', { n_shared_experts: 2 }, /n_shared_experts/],
    ['keys for each head', { num_key_value_heads: 4 }, /num_key_value_heads/],
    ['groups that do not divide', { o_groups: 3 }, /o_groups.*divisor/s],
    ['keys of a later version', { engram_layer_ids: [1] }, /engram_layer_ids is not understood/],
    ['a rope that says two things', { rope_parameters: { rope_type: 'default', rope_theta: 7 } }, /rope_theta/],
    ['tied heads', { tie_word_embeddings: true }, /tie_word_embeddings/],
  ])('%s is refused', async (_, changes, message) => {
    const edit = (c: Record<string, unknown>): void => void Object.assign(c, changes);
    expect(await badInputMessage(openModel(archCase('deepseek_v4', { config: edit })))).toMatch(message);
  });

  test('DeepSeek-V4-Flash', () => {
    const model = buildModel(
      {
        ...{ model_type: 'deepseek_v4', vocab_size: 129280, hidden_size: 4096, moe_intermediate_size: 2048 },
        ...{ num_hidden_layers: 43, num_attention_heads: 64, num_key_value_heads: 1, head_dim: 512, q_lora_rank: 1024 },
        ...{ qk_rope_head_dim: 64, o_lora_rank: 1024, o_groups: 8, n_routed_experts: 256, n_shared_experts: 1 },
        ...{ num_experts_per_tok: 6, num_hash_layers: 3, scoring_func: 'sqrtsoftplus', topk_method: 'noaux_tc' },
        ...{ norm_topk_prob: true, routed_scaling_factor: 1.5, swiglu_limit: 10, sliding_window: 128, hidden_act: 'silu' },
        ...{ compress_ratios: [0, 0, ...Array.from({ length: 40 }, (_, i) => (i % 2 ? 128 : 4)), 4, 0] },
        ...{ index_n_heads: 64, index_head_dim: 128, index_topk: 512, hc_mult: 4, hc_sinkhorn_iters: 20, hc_eps: 1e-6 },
        ...{ rope_theta: 10000, compress_rope_theta: 160000, max_position_embeddings: 1048576, rms_norm_eps: 1e-6 },
        ...{ rope_scaling: { type: 'yarn', factor: 16, beta_fast: 32, beta_slow: 1, original_max_position_embeddings: 65536 } },
        ...{ expert_dtype: 'fp4', num_nextn_predict_layers: 1, quantization_config: { quant_method: 'fp8' } },
      },
      'config.json',
    );
    const weights = model.blocks.flatMap(({ linears }) => linears.flat());
    const count = (role: string) => weights.filter((l) => l.role === role).reduce((n, l) => n + l.inFeatures * l.outFeatures, 0); // prettier-ignore
    // 43 of the 44 layers (one drafts) that the published index gives 283,467,841,536 expert weights.
    expect(count('expert')).toBe((283_467_841_536 / 44) * 43);
    expect(model.blocks[0]!.tensors.map(({ name }) => name)).toContain('layers.0.ffn.gate.tid2eid');
    expect(model.blocks[3]!.tensors.map(({ name }) => name)).toContain('layers.3.ffn.gate.bias');
    expect(model.stateWidth).toBe(4 * 4096);
    expect(model.blocks[2]!.tensors.find(({ name }) => name === 'layers.2.attn.compressor.ape')!.shape).toEqual([4, 1024]); // prettier-ignore
    expect(model.blocks[3]!.tensors.find(({ name }) => name === 'layers.3.attn.compressor.ape')!.shape).toEqual([128, 512]); // prettier-ignore
  }); // prettier-ignore
});

test('a router beside other linears does not keep them from being quantized', async () => {
  for (const name of ['deepseek_v4', 'deepseek_v32']) {
    const open = await openModel(archCase(name));
    const left = leaveOut(open.model.blocks, { scope: 'all', keep: [] });
    const linears = open.model.blocks.flatMap((block) => block.linears.flat());
    const kept = linears.filter(({ name: linear }) => left.has(linear)).map(({ role }) => role);
    expect(new Set(kept)).toEqual(new Set(name === 'deepseek_v4' ? ['router', 'other'] : ['router']));
    expect(kept).toHaveLength(linears.filter(({ role }) => role === 'router' || role === 'other').length);
    // What engines have no place for cannot be asked for either.
    if (name === 'deepseek_v4') expect(leaveOut(open.model.blocks, { scope: 'wo_a', keep: [] }).size).toBe(linears.length); // prettier-ignore
    await open.close();
  }
});
