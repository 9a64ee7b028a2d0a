import { truncateSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../src/arch/open.js';
import { modelLinears } from '../../src/arch/types.js';
import { WeightReader } from '../../src/arch/weights.js';
import { matmulT } from '../../src/tensor/ops.js';
import { Scope } from '../../src/tensor/tensor.js';
import { badInputMessage, refusal } from '../support/refusal.js';
import { archCase, fixture, testEnv } from './support.js';

const env = testEnv();
const q0 = 'model.layers.0.self_attn.q_proj.weight';

/** The message with which a changed copy of the llama case is refused on opening. */
const refused = (edit: Parameters<typeof archCase>[1], name = 'llama') =>
  badInputMessage(openModel(archCase(name, edit)));

describe('what does not belong together is refused on opening, headers only', () => {
  test('a missing tensor', async () => {
    expect(await refused({ tensors: (t) => t.delete(q0) })).toMatch(new RegExp(`lacks a tensor.*expected ${q0}`, 's'));
  });
  test('several, and a name that is close', async () => {
    const message = await refused({
      tensors: (t) => {
        t.set(q0.replace('q_proj', 'q_projj'), t.get(q0)!);
        t.delete(q0);
        t.delete('model.norm.weight');
      },
    });
    expect(message).toMatch(/lacks 2 tensors/);
    expect(message).toMatch(/q_projj/);
  });
  test('a tensor that nobody knows', async () => {
    const message = await refused({ tensors: (t) => t.set('model.extra.weight', t.get(q0)!) });
    expect(message).toMatch(/tensors that its architecture does not have.*got model\.extra\.weight/s);
  });
  test('more layers than the config says', async () => {
    expect(await refused({ config: (c) => (c.num_hidden_layers = 1) })).toMatch(/got model\.layers\.1\..*and 3 more/s);
  });
  test('another width', async () => {
    const message = await refused({ config: (c) => (c.intermediate_size = 40) });
    expect(message).toMatch(/model\.safetensors, tensor model\.layers\.0\.mlp\.\w+\.weight/);
    expect(message).toMatch(/expected \[(40, 32\], got \[48, 32|32, 40\], got \[32, 48)\]/);
  });
  test('buffers of old checkpoints are carried through, MTP layers too', async () => {
    const inverse = 'model.layers.0.self_attn.rotary_emb.inv_freq';
    const open = await openModel(archCase('llama', { tensors: (t) => t.set(inverse, { dtype: 'F32', shape: [1], data: new Uint8Array(4) }) })); // prettier-ignore
    expect(open.coverage.carried).toEqual([inverse]);
    await open.close();
    const mtp = 'model.layers.2.eh_proj.weight';
    const deepseek = await openModel(
      archCase('deepseek_v3', {
        config: (c) => {
          delete c.num_mtp_layers;
          c.num_nextn_predict_layers = 1;
        },
        tensors: (t) => t.set(mtp, { dtype: 'BF16', shape: [1], data: new Uint8Array(2) }),
      }),
    );
    expect(deepseek.coverage.carried).toEqual([mtp]);
    await deepseek.close();
  });
  test('an unknown architecture', async () => {
    expect(await refused({ config: (c) => (c.model_type = 'lama') })).toMatch(/model_type "lama".*Did you mean llama/s);
    expect(await refused({ config: (c) => (c.model_type = 'constructor') })).toMatch(/not supported/);
    expect(await refused({ config: (c) => delete c.model_type })).toMatch(/does not say what model/);
  });
  test('an unknown quantization', async () => {
    const config = (c: Record<string, unknown>) => (c.quantization_config = { quant_method: 'hqq' });
    expect(await refused({ config })).toMatch(/quant_method.*hqq/s);
  });
});

describe('tied heads, as transformers ties them', () => {
  const tied = (tensors: NonNullable<Parameters<typeof archCase>[1]>['tensors']) =>
    openModel(archCase('llama', { config: (c) => (c.tie_word_embeddings = true), ...(tensors && { tensors }) }));
  test('both stored and different: not tied', async () => {
    const open = await tied(undefined);
    expect([open.model.tied, open.model.head.name]).toEqual([false, 'lm_head']);
    await open.close();
  });
  test('both stored and equal, or only the embedding: tied', async () => {
    for (const edit of [
      (t: Map<string, { dtype: string; shape: number[]; data: Uint8Array }>) =>
        void t.set('lm_head.weight', t.get('model.embed_tokens.weight')!),
      (t: Map<string, unknown>) => void t.delete('lm_head.weight'),
    ]) {
      const open = await tied(edit);
      expect([open.model.tied, open.model.head.name]).toEqual([true, 'model.embed_tokens']);
      await open.close();
    }
  });
});

describe('reading weights', () => {
  const poisoned = (data: Uint8Array, element: number, bits: number) => {
    const copy = data.slice();
    copy.set([bits & 255, bits >> 8], element * 2);
    return copy;
  };
  test.each([
    ['NaN', 0x7fc0],
    ['infinity', 0xff80],
  ])('%s is refused with the tensor and how many', async (_, bits) => {
    const folder = archCase('llama', {
      tensors: (t) => t.set(q0, { ...t.get(q0)!, data: poisoned(poisoned(t.get(q0)!.data, 5, bits), 1000, bits) }),
    });
    const open = await openModel(folder);
    const reader = new WeightReader(open, env.device, 'f32');
    using scope = new Scope(env.device);
    expect(await badInputMessage(reader.block(0, scope))).toMatch(
      new RegExp(`not finite: tensor ${q0}.*2 values`, 's'),
    );
    await reader.block(1, scope);
    await open.close();
  });

  test('a file that was cut after it was opened names tensor and bytes', async () => {
    const folder = archCase('llama', {});
    const open = await openModel(folder);
    truncateSync(join(folder, 'model.safetensors'), 5000);
    using scope = new Scope(env.device);
    const error = await refusal(new WeightReader(open, env.device, 'f32').block(1, scope));
    expect(error.kind).toBe('input');
    expect(error.message).toMatch(/tensor model\.layers\.1\.[\w.]+\): expected \d+ bytes from byte \d+ on/);
    await open.close();
  });

  test.each(['F32', 'F16', 'F64'])('%s is converted as it should be', async (dtype) => {
    const values = Float64Array.from({ length: 1024 }, (_, i) => ((i % 251) - 125) / 64); // exact in all of them
    const half = (v: number) => {
      const bits = new Uint32Array(Float32Array.of(v).buffer)[0]!;
      return v === 0 ? 0 : ((bits >>> 16) & 0x8000) | (((bits >>> 13) & 0x3fc00) - 0x1c000) | ((bits >>> 13) & 0x3ff);
    };
    const data = { F32: () => Float32Array.from(values), F16: () => Uint16Array.from(values, half), F64: () => values }[
      dtype
    ]!();
    const folder = archCase('llama', {
      tensors: (t) => t.set(q0, { dtype, shape: [32, 32], data: new Uint8Array(data.buffer) }),
    });
    const open = await openModel(folder);
    using scope = new Scope(env.device);
    for (const to of ['f32', 'bf16'] as const) {
      const weights = await new WeightReader(open, env.device, to).block(0, scope);
      const tensor = weights.get(q0);
      expect(tensor.dtype).toBe(to);
      const eye = scope.from(
        'f32',
        [32, 32],
        Float32Array.from({ length: 1024 }, (_, i) => +(i % 33 === 0)),
      );
      const got = await matmulT(scope, eye, tensor, { dtype: 'f32' }).float32();
      const exact = (i: number) => values[(i % 32) * 32 + Math.floor(i / 32)]!;
      expect([...got]).toEqual(Array.from({ length: 1024 }, (_, i) => exact(i)));
    }
    await open.close();
  });

  test('integers are no weights', async () => {
    const folder = archCase('llama', {
      tensors: (t) => t.set(q0, { dtype: 'I16', shape: [32, 32], data: t.get(q0)!.data }),
    });
    const open = await openModel(folder);
    using scope = new Scope(env.device);
    const reader = new WeightReader(open, env.device, 'f32');
    expect(await badInputMessage(reader.block(0, scope))).toMatch(new RegExp(`${q0}.*got i16`, 's'));
    await open.close();
  });

  test('experts lie in one tensor, and what replaces one of them is seen there', async () => {
    const open = await openModel(archCase('mixtral'));
    using scope = new Scope(env.device);
    const weights = await new WeightReader(open, env.device, 'f32').block(1, scope);
    const linears = open.model.blocks[1]!.moe!.expertLinears.map((e) => e.up);
    const before = await weights.stack(linears).float32();
    const one = await weights.get(`${linears[2]!.name}.weight`).float32();
    expect([...before.subarray(2 * one.length, 3 * one.length)]).toEqual([...one]);
    const shape = weights.get(`${linears[2]!.name}.weight`).shape;
    weights.set(
      `${linears[2]!.name}.weight`,
      scope.from(
        'f32',
        shape,
        one.map((v) => -v),
      ),
    );
    const after = await weights.stack(linears).float32();
    expect([...after]).toEqual([...before].map((v, i) => (Math.floor(i / one.length) === 2 ? -v : v)));
    await open.close();
  });

  test('experts that are stored as one tensor are read the same', async () => {
    const concat = (parts: Uint8Array[]) => Uint8Array.from(Buffer.concat(parts));
    const folder = archCase('glm4_moe', {
      tensors: (t) => {
        const experts = 'model.layers.1.mlp.experts';
        const take = (e: number, part: string) => {
          const tensor = t.get(`${experts}.${e}.${part}.weight`)!;
          t.delete(`${experts}.${e}.${part}.weight`);
          return tensor.data;
        };
        const all = [0, 1, 2, 3, 4, 5];
        const gateUp = all.flatMap((e) => [take(e, 'gate_proj'), take(e, 'up_proj')]);
        t.set(`${experts}.gate_up_proj`, { dtype: 'BF16', shape: [6, 32, 32], data: concat(gateUp) });
        t.set(`${experts}.down_proj`, {
          dtype: 'BF16',
          shape: [6, 32, 16],
          data: concat(all.map((e) => take(e, 'down_proj'))),
        });
      },
    });
    const [plain, fused] = [await openModel(archCase('glm4_moe')), await openModel(folder)];
    using scope = new Scope(env.device);
    const read = async (open: typeof plain) => {
      const weights = await new WeightReader(open, env.device, 'f32').block(1, scope);
      const { expertLinears } = open.model.blocks[1]!.moe!;
      return Promise.all(
        (['gate', 'up', 'down'] as const).map((part) => weights.stack(expertLinears.map((e) => e[part])).float32()),
      );
    };
    expect(await read(fused)).toEqual(await read(plain));
    await plain.close();
    await fused.close();
  });
});

test('blocks say what algorithms need to know', async () => {
  const open = await openModel(archCase('qwen2_moe'));
  const [sparse, dense] = open.model.blocks;
  expect(dense!.ffn!.down).toMatchObject({ name: 'model.layers.1.mlp.down_proj', inFeatures: 48, outFeatures: 32 });
  expect(dense!.moe).toBeUndefined();
  expect(sparse!.ffn).toBeUndefined();
  expect(sparse!.moe).toMatchObject({ experts: 4, active: 2, shared: 1, width: 16 });
  const roles = sparse!.linears.map((group) =>
    group.map((l) => `${l.name.split('.mlp.')[1] ?? l.name.split('.').at(-1)}:${l.role}`).join(' '),
  );
  expect(roles).toEqual([
    'q_proj:attention k_proj:attention v_proj:attention',
    'o_proj:attention',
    'gate:router',
    'shared_expert.gate_proj:shared-expert shared_expert.up_proj:shared-expert',
    'shared_expert.down_proj:shared-expert',
    'shared_expert_gate:router',
    ...[0, 1, 2, 3].map((e) => `experts.${e}.gate_proj:expert experts.${e}.up_proj:expert`),
    ...[0, 1, 2, 3].map((e) => `experts.${e}.down_proj:expert`),
  ]);
  // Every linear is a tensor of its block, and every matrix of a block is a linear.
  for (const block of open.model.blocks) {
    const matrices = block.tensors
      .filter((t) => t.shape.length === 2)
      .map((t) => t.name)
      .sort();
    expect(
      block.linears
        .flat()
        .map((l) => `${l.name}.weight`)
        .sort(),
    ).toEqual(matrices);
  }
  // Attention 4; dense 3; sparse: router, shared 3 and its gate, 4 experts of 3.
  expect(modelLinears(open.model)).toHaveLength(3 * 4 + 3 + 2 * (1 + 4 + 12));
  await open.close();
});

test('views of shared storages, transposed or with gaps, are read as PyTorch means them', async () => {
  const open = await openModel(fixture('arch', 'views.bin'), { config: fixture('arch', 'llama', 'config.json') });
  const plain = await openModel(archCase('llama'));
  using scope = new Scope(env.device);
  const read = async (model: typeof open) => {
    const reader = new WeightReader(model, env.device, 'f32');
    const values: Record<string, number[]> = {};
    for (const name of model.tensors.keys()) values[name] = [...(await (await reader.tensor(name, scope)).float32())];
    return values;
  };
  expect(await read(open)).toEqual(await read(plain));
  await open.close();
  await plain.close();
});
