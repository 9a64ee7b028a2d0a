import { readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { describe, expect, test } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { ResidentModel } from '../../../src/arch/resident.js';
import { WeightReader } from '../../../src/arch/weights.js';
import type { DType } from '../../../src/base/dtype.js';
import { readSafetensors } from '../../../src/formats/safetensors.js';
import { OpenFile } from '../../../src/formats/source.js';
import type { TensorEntry } from '../../../src/formats/types.js';
import { detectLayout, layoutWriters } from '../../../src/layout/detect.js';
import type { LayoutName, Load, Scheme } from '../../../src/layout/types.js';
import { dequantize } from '../../../src/tensor/ops.js';
import { Scope, type Tensor } from '../../../src/tensor/tensor.js';
import { badInputMessage } from '../../support/refusal.js';
import { expected, fixture, relativeError, shared, testEnv, trainedModel } from '../../arch/support.js';

interface Case {
  layout: LayoutName;
  n: number;
  k: number;
  bits: Scheme['bits'];
  group: number;
  symmetric: boolean;
  order: 'group' | null;
  dtype: 'bf16' | 'f16';
}
const cases = JSON.parse(readFileSync(fixture('layout', 'layouts.json'), 'utf8')) as Record<string, Case>;
const path = fixture('layout', 'layouts.safetensors');
const env = testEnv();

function entries(): Map<string, TensorEntry> {
  using file = new OpenFile(path);
  return new Map(readSafetensors(file).tensors.map((t) => [t.name, t]));
}
const all = entries();
const scheme = ({ bits, group, symmetric, order }: Case): Scheme => ({
  bits,
  group,
  symmetric,
  ...(order && { order }),
});
const bytes = async (t: Tensor) => Buffer.from(await t.bytesOut()).toString('hex');

async function withFile<T>(scope: Scope, use: (load: Load) => Promise<T>): Promise<T> {
  const file = await open(path);
  try {
    return await use(async ({ span, shape }, dtype: DType) => {
      const tensor = scope.empty(dtype, shape);
      await env.device.readFile(tensor.buffer, 0, file.fd, span.offset, span.bytes);
      return tensor;
    });
  } finally {
    await file.close();
  }
}
/** The quantization_config that our writer gives for a case. */
const configOf = (c: Case) =>
  layoutWriters[c.layout].config({ groups: [{ scheme: scheme(c), linears: ['linear'] }], ignore: ['lm_head'] });
const stored = (name: string) =>
  new Map([...all].filter(([key]) => key.startsWith(`${name}.linear.`)).map(([key, t]) => [key, t]));

describe.each(Object.entries(cases))('%s', (name, c) => {
  test('what numpy packed is read to the same weights', async () => {
    using scope = new Scope(env.device);
    const layout = detectLayout({ quantization_config: configOf(c) }, 'config.json')!;
    expect(layout.name).toBe(c.layout);
    const linears = layout.linears(stored(name));
    expect([...linears.keys()]).toEqual([`${name}.linear.weight`]);
    const linear = linears.get(`${name}.linear.weight`)!;
    expect([...linear.parts.values()].map((p) => p.name).sort()).toEqual([...stored(name).keys()].sort());
    const weights = await withFile(scope, async (load) => {
      const { codes, grid } = await linear.read(scope, load, c.n, c.k);
      return dequantize(scope, codes, grid).float32();
    });
    expect([...weights]).toEqual([...expected(path)[`${name}.weight`]!.f32]);
  });

  test('what we store are the bytes that numpy packed, as planned', async () => {
    using scope = new Scope(env.device);
    await withFile(scope, async (load) => {
      const get = async (key: string, dtype: DType) => {
        const entry = all.get(`${name}.${key}`);
        return entry && load(entry, dtype);
      };
      const codes = (await get('codes', 'i8'))!;
      const grid = {
        scale: (await get('scale', 'f32'))!,
        zero: await get('zero', 'f32'),
        columnGroup: await get('g_idx', 'i32'),
        low: -(2 ** (c.bits - 1)),
        high: 2 ** (c.bits - 1) - 1,
        group: c.group || c.k,
      };
      const writer = layoutWriters[c.layout];
      const linear = { name: `${name}.linear`, inFeatures: c.k, outFeatures: c.n };
      expect(writer.refuse(linear, scheme(c))).toBeUndefined();
      const plan = writer.plan(linear, scheme(c), c.dtype);
      const made = writer.store(scope, linear, scheme(c), { codes, grid }, c.dtype);
      expect(made.map((m) => m.name)).toEqual(plan.map((p) => p.name));
      expect(made.map((m) => m.name).sort()).toEqual([...stored(name).keys()].sort());
      for (const [i, { name: key, tensor }] of made.entries()) {
        expect([tensor.dtype, ...tensor.shape]).toEqual([plan[i]!.dtype, ...plan[i]!.shape]);
        expect(tensor.shape).toEqual(all.get(key)!.shape);
        expect(await bytes(tensor), key).toBe(await bytes(await load(all.get(key)!, plan[i]!.dtype)));
      }
    });
  });
});

test('a linear that a layout cannot hold is refused with the reason', () => {
  const refuse = (layout: LayoutName, k: number, n: number, more: Partial<Scheme> = {}) =>
    layoutWriters[layout].refuse(
      { name: 'x', inFeatures: k, outFeatures: n },
      { bits: 4, group: 128, symmetric: true, ...more },
    );
  expect(refuse('compressed-tensors', 172, 8)).toMatch(/172.*multiple of 128/);
  expect(refuse('gptq', 128, 12)).toMatch(/whole 32-bit words/);
  expect(refuse('awq', 128, 12)).toMatch(/multiple of 8/);
  expect(refuse('awq', 128, 16, { bits: 8 })).toMatch(/4 bits/);
});

describe('hostile or foreign settings', () => {
  const ct = () => configOf(cases.ct!) as { config_groups: { group_0: { weights: Record<string, unknown> } } };
  const read = (quantization_config: unknown) => () => detectLayout({ quantization_config }, 'config.json');
  test.each([
    ['unknown method', { quant_method: 'bitsandbytes' }, /quant_method.*bitsandbytes/s],
    ['transforms', { ...ct(), transform_config: { config_groups: { R1: {} } } }, /transform_config/],
    ['a format of floats', { ...ct(), format: 'nvfp4-pack-quantized' }, /format.*nvfp4/s],
    [
      'floats',
      {
        ...ct(),
        config_groups: {
          group_0: { targets: ['Linear'], weights: { ...ct().config_groups.group_0.weights, type: 'float' } },
        },
      },
      /type.*float/s,
    ],
    ['odd bits', { quant_method: 'gptq', bits: 5, group_size: 128 }, /bits.*5/s],
    [
      'modules with other bits',
      { quant_method: 'gptq', bits: 4, group_size: 128, dynamic: { '+:.*down': { bits: 8 } } },
      /dynamic/,
    ],
    ['gemv', { quant_method: 'awq', bits: 4, group_size: 128, version: 'gemv' }, /version.*gemv/s],
    ['no object', 'gptq', /quantization_config/],
  ])('%s', async (_, config, message) => {
    expect(await badInputMessage(read(config))).toMatch(message);
  });

  test('a column group beyond the scales never reaches native code', async () => {
    using scope = new Scope(env.device);
    const layout = detectLayout({ quantization_config: configOf(cases['ct-order']!) }, 'config.json')!;
    const linear = layout.linears(stored('ct-order')).get('ct-order.linear.weight')!;
    await withFile(scope, async (load) => {
      const bad: Load = async (entry, dtype) =>
        entry.name.endsWith('g_idx') ? scope.from('i32', entry.shape, new Int32Array(48).fill(3)) : load(entry, dtype);
      expect(await badInputMessage(linear.read(scope, bad, 8, 48))).toMatch(/groups from 0 to 2.*got 3/);
    });
  });

  test('targets pick the scheme of each module: a name or pattern goes before the class', async () => {
    const config = ct();
    const { group_0: rule } = config.config_groups;
    const other = (targets: string[]) => ({ ...rule, targets, weights: { ...rule.weights, num_bits: 8 } });
    const bits = (targets: string[]) => {
      const quantization_config = { ...config, config_groups: { group_0: rule, group_1: other(targets) } };
      const layout = detectLayout({ quantization_config }, 'config.json')!;
      return layout.linears(stored('ct')).get('ct.linear.weight')!.bits;
    };
    expect([bits(['ct.linear']), bits(['re:.*lin']), bits(['ct.line']), bits(['re:lin'])]).toEqual([8, 8, 4, 4]);
    expect(await badInputMessage(() => bits(['re:(']))).toMatch(/Not a regular expression.*\(/s);
  });

  test('a missing part is named', async () => {
    const parts = stored('ct');
    parts.delete('ct.linear.weight_scale');
    const layout = detectLayout({ quantization_config: configOf(cases.ct!) }, 'config.json')!;
    expect(await badInputMessage(() => layout.linears(parts))).toMatch(
      /weight_packed without ct\.linear\.weight_scale/,
    );
  });
});

describe('what llm-compressor wrote', () => {
  const folder = trainedModel('dense-6m-int4-llmcompressor');
  test.skipIf(!folder)('is read: weights, logits, and our config of it is its own', async () => {
    const want = expected(fixture('layout', 'int4-llmcompressor.expected.safetensors'));
    const model = await openModel(folder!);
    expect(model.layout!.description).toBe('compressed-tensors pack-quantized, 4 bits, groups of 128, symmetric');
    using scope = new Scope(env.device);
    const reader = new WeightReader(model, env.device, 'f32');
    const down = await (await reader.tensor('model.layers.2.mlp.down_proj.weight', scope)).float32();
    const rows = want.down_rows!;
    for (let i = 0; i < rows.shape[0]!; i++) {
      expect([...down.subarray(i * 64 * 1024, i * 64 * 1024 + 1024)]).toEqual([
        ...rows.f32.subarray(i * 1024, (i + 1) * 1024),
      ]);
    }
    using resident = await ResidentModel.load(model, env, 'f32');
    const logits = await resident.logits(scope, resident.hidden(scope, want.tokens!.i32, 1)).float32();
    expect(
      relativeError(
        logits.filter((_, i) => (i % 8192) % 64 === 0),
        want.logits!.f32,
      ),
    ).toBeLessThan(1e-4);

    const own = layoutWriters['compressed-tensors'].config({
      groups: [{ scheme: { bits: 4, group: 128, symmetric: true, order: 'static' }, linears: [] }],
      ignore: ['lm_head'],
    });
    const theirs = JSON.parse(readFileSync(shared('models', 'dense-6m-int4-llmcompressor', 'config.json'), 'utf8')) as {
      quantization_config: unknown;
    };
    expect(own).toEqual(theirs.quantization_config);
    await model.close();
  });
});
