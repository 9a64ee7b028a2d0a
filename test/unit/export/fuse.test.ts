import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, describe, expect, test } from 'vitest';
import { openModel } from '../../../src/arch/open.js';
import { fromOnnx } from '../../../src/checkpoint/onnx-model.js';
import { planConversion, type ConvertOptions, type ConvertPlan } from '../../../src/export/convert-plan.js';
import { checkFuse } from '../../../src/export/fuse.js';
import type { Fuse } from '../../../src/export/fusion.js';
import { readOnnx } from '../../../src/formats/onnx.js';
import { OpenFile } from '../../../src/formats/source.js';
import type { TensorEntry } from '../../../src/formats/types.js';
import { archCase, fixture, relativeError, testEnv, type RawTensor } from '../../arch/support.js';
import { convert as convertTo, ourLogits } from '../../support/models.js';

const env = testEnv();
const work = mkdtempSync(join(tmpdir(), 'fuse-'));
afterAll(() => rmSync(work, { recursive: true }));

const convert = (
  options: Omit<ConvertOptions, 'fuse'>,
  out: string,
  fuse: readonly Fuse[] = [],
  change?: (plan: ConvertPlan) => ConvertPlan,
) => convertTo({ ...options, fuse: new Set(fuse) }, out, env, change);

const tokens = Int32Array.from({ length: 12 }, (_, i) => (i * 7 + 3) % 60);
const logits = (path: string) => ourLogits(path, env, tokens);

const json = (...path: string[]) => JSON.parse(readFileSync(join(...path), 'utf8')) as Record<string, unknown>;
const safetensors = { format: 'safetensors' } as const;

describe('in Phi-3’s container', () => {
  test.each(['llama', 'mistral'])('%s: fused, and split again into the same weights', async (name) => {
    const path = archCase(name);
    const [fused, split] = [join(work, `${name}-fused`), join(work, `${name}-split`)];
    const { report } = await convert({ input: path, ...safetensors }, fused, ['qkv', 'gate-up']);
    expect(json(fused, 'config.json')).toMatchObject({ model_type: 'phi3', architectures: ['Phi3ForCausalLM'] });
    expect(report.fused.map(({ kind, into }) => [kind, into[0]])).toEqual(
      [0, 1].flatMap((i) => [
        ['gate-up', `model.layers.${i}.mlp.gate_up_proj`],
        ['qkv', `model.layers.${i}.self_attn.qkv_proj`],
      ]),
    );
    expect(Math.max(...report.fused.map(({ error }) => error))).toBeLessThan(1e-6);
    expect(json(fused, 'deepseek-convert.json').validation).toMatchObject({ fused: report.fused });
    await expect(openModel(fused)).rejects.toThrow(/--fuse split/);
    const back = await convert({ input: fused, ...safetensors }, split, ['split']);
    expect(back.report.fused.map(({ into }) => into.length)).toEqual([2, 3, 2, 3]);
    expect(json(split, 'config.json').model_type).toBe(name);
    expect(await logits(split)).toEqual(await logits(path));
    // llama.cpp runs no windows with these architectures.
    if (name === 'mistral') return;
    const gguf = join(work, `${name}.gguf`);
    await convert({ input: fused, format: 'gguf', dtype: 'f32' }, gguf, ['split']);
    expect(relativeError(await logits(gguf), await logits(path))).toBeLessThan(1e-5);
  });

  test('what it has no place for is refused by name', async () => {
    const refused = (input: string, fuse: Fuse[]) => convert({ input, ...safetensors }, join(work, 'no'), fuse);
    await expect(refused(archCase('qwen2'), ['qkv', 'gate-up'])).rejects.toThrow(/no place for this model.*qwen2/s);
    await expect(refused(archCase('llama-tied-bias'), ['qkv', 'gate-up'])).rejects.toThrow(
      /attention_bias.*no biases/s,
    );
    await expect(refused(archCase('llama-yarn'), ['qkv', 'gate-up'])).rejects.toThrow(/rope_type.*yarn/s);
    await expect(refused(archCase('llama'), ['split'])).rejects.toThrow(/no fused matrices to split/);
    const check =
      (...given: Fuse[]) =>
      () =>
        checkFuse(new Set(given), 'safetensors', false, false);
    expect(check('qkv')).toThrow(/has both kinds/);
    expect(check('split', 'qkv', 'gate-up')).toThrow(/opposite/);
    expect(() => checkFuse(new Set<Fuse>(['qkv']), 'gguf', false, false)).toThrow(/llama.cpp reads/);
    expect(() => checkFuse(new Set<Fuse>(['fold']), 'gguf', false, true)).toThrow(/block types/);
    expect(() => checkFuse(new Set<Fuse>(['split']), 'safetensors', true, false)).toThrow(/merge-lora/);
  });
});

test('a linear that computes something else than before does not get its name', async () => {
  const out = join(work, 'wrong');
  const swapped = (plan: ConvertPlan): ConvertPlan => ({
    ...plan,
    fusions: plan.fusions!.map((fusion) => ({ ...fusion, parts: fusion.parts!.toReversed() })),
  });
  const done = convert({ input: archCase('llama'), ...safetensors }, out, ['qkv', 'gate-up'], swapped);
  await expect(done).rejects.toThrow(/computes something else than/);
  expect(() => readFileSync(join(out, 'config.json'))).toThrow();
});

describe('in ONNX graphs', () => {
  const count = (folder: string, op: string, test: (inputs: readonly string[]) => boolean = () => true): number => {
    using file = new OpenFile(join(folder, 'model.onnx'));
    return readOnnx(file).nodes.filter((node) => node.op === op && test(node.inputs)).length;
  };

  test.each(['llama', 'llama-tied-bias', 'qwen2', 'qwen3', 'mixtral', 'olmoe'])('%s', async (name) => {
    const [path, out] = [archCase(name), join(work, `onnx-${name}`)];
    const { report } = await convert({ input: path, format: 'onnx', dtype: 'f32' }, out, ['qkv', 'gate-up']);
    expect(report.fused.filter(({ kind }) => kind === 'qkv')).toHaveLength(2);
    expect(report.fused.length).toBeGreaterThanOrEqual(4);
    expect(await logits(out)).toEqual(await logits(path));
  });

  test('attention takes q, k and v packed where it turns them itself', async () => {
    const out = join(work, 'packed');
    const input = fixture('v1.0', 'v1.0_checkpoint.bin');
    await convert({ input, format: 'onnx', dtype: 'f16' }, out, ['qkv', 'gate-up']);
    expect(count(out, 'GroupQueryAttention', ([, k, v]) => k === '' && v === '')).toBe(4);
    // qkv, o, gate and up, down in each layer.
    expect(count(out, 'MatMul')).toBe(4 * 4);
  });
});

describe('linears in a row', () => {
  const at = 'model.layers.0.self_attn.q_proj';
  const low = 'model.layers.1.self_attn.k_proj';
  const f32 = (shape: number[], values: Float32Array): RawTensor => ({
    dtype: 'F32',
    shape,
    data: new Uint8Array(values.buffer),
  });
  const noise = (n: number, seed: number) =>
    Float32Array.from({ length: n }, (_, i) => Math.sin(i * 12.9898 + seed) / 8);
  const [wide, k, n] = [80, 32, 32];
  const [w1, b1, w2, b2] = [noise(wide * k, 1), noise(wide, 2), noise(n * wide, 3), noise(n, 4)];
  const product = Float32Array.from({ length: n * k }, (_, i) => {
    let sum = 0;
    for (let r = 0; r < wide; r++) sum += w2[Math.floor(i / k) * wide + r]! * w1[r * k + (i % k)]!;
    return sum;
  });
  const bias = b2.map((value, i) => b1.reduce((sum, b, r) => sum + w2[i * wide + r]! * b, value));

  const factored = (parts: readonly [string, string], config?: (config: Record<string, unknown>) => void) =>
    archCase('llama', {
      ...(config && { config }),
      tensors: (tensors) => {
        tensors.delete(`${at}.weight`);
        tensors.set(`${at}${parts[0]}.weight`, f32([wide, k], w1));
        tensors.set(`${at}${parts[1]}.weight`, f32([n, wide], w2));
      },
    });

  test('are one where that is smaller; others stay, with the reason', async () => {
    const path = factored(['.0', '.1']);
    const want = archCase('llama', { tensors: (tensors) => tensors.set(`${at}.weight`, f32([n, k], product)) });
    for (const format of ['safetensors', 'onnx', 'gguf'] as const) {
      const out = join(work, format === 'gguf' ? 'folded.gguf' : `folded-${format}`);
      const { report } = await convert(
        { input: path, format, ...(format !== 'safetensors' && { dtype: 'f32' }) },
        out,
        ['fold'],
      );
      expect(report.fused).toMatchObject([{ kind: 'fold', from: [`${at}.0`, `${at}.1`], into: [at], tolerance: 1e-5 }]);
      expect(report.fused[0]!.bytes).toEqual({ before: 4 * (wide * k + n * wide), after: 4 * n * k });
      expect(relativeError(await logits(out), await logits(want))).toBeLessThan(1e-5);
    }
    const half = join(work, 'folded-bf16');
    const { report } = await convert({ input: path, ...safetensors, dtype: 'bf16' }, half, ['fold']);
    expect(report.fused[0]!.tolerance).toBe(2 ** -8);
    expect(report.fused[0]!.error).toBeGreaterThan(1e-5);
  });

  test('biases are folded where the architecture has one', async () => {
    const config = (own: Record<string, unknown>) => (own.attention_bias = true);
    const biases = (tensors: Map<string, RawTensor>) => {
      for (const i of [0, 1]) for (const p of 'qkvo') tensors.set(`model.layers.${i}.self_attn.${p}_proj.bias`, f32([p === 'k' || p === 'v' ? 16 : n], noise(p === 'k' || p === 'v' ? 16 : n, i)));
    }; // prettier-ignore
    const path = archCase('llama', { config, tensors: (tensors) => {
      biases(tensors);
      for (const part of ['weight', 'bias']) tensors.delete(`${at}.${part}`);
      tensors.set(`${at}.0.weight`, f32([wide, k], w1)).set(`${at}.1.weight`, f32([n, wide], w2));
      tensors.set(`${at}.0.bias`, f32([wide], b1)).set(`${at}.1.bias`, f32([n], b2));
    } }); // prettier-ignore
    const want = archCase('llama', { config, tensors: (tensors) => {
      biases(tensors);
      tensors.set(`${at}.weight`, f32([n, k], product)).set(`${at}.bias`, f32([n], bias));
    } }); // prettier-ignore
    const out = join(work, 'folded-bias');
    await convert({ input: path, ...safetensors }, out, ['fold']);
    expect(relativeError(await logits(out), await logits(want))).toBeLessThan(1e-5);
  });

  test('that are smaller as they are, or do not fit, stay', async () => {
    const path = archCase('llama', {
      tensors: (tensors) => {
        tensors.delete(`${low}.weight`);
        tensors.set(`${low}.BLinear.weight`, f32([4, k], noise(4 * k, 5)));
        tensors.set(`${low}.ALinear.weight`, f32([16, 4], noise(64, 6)));
      },
    });
    const { report, notes } = await convert({ input: path, ...safetensors }, join(work, 'low'), ['fold']);
    expect(report.fused).toEqual([]);
    expect(notes.join()).toContain(
      `${low}.BLinear and ${low}.ALinear are not folded: one matrix takes 2048 bytes, they take 768.`,
    );
    const crossed = await planConversion({
      input: factored(['.1', '.0']),
      ...safetensors,
      fuse: new Set<Fuse>(['fold']),
    });
    expect(crossed.notes.join()).toContain('takes 80 columns, not 32');
    await crossed.close();
    const none = await planConversion({ input: archCase('llama'), ...safetensors, fuse: new Set<Fuse>(['fold']) });
    expect(none.notes).toContain('There are no consecutive linears to fold.');
    await none.close();
  });

  test('in an ONNX graph are told from such with a non-linearity between them', () => {
    const entry = (name: string, shape: number[]): [string, TensorEntry] => {
      const span = { path: 'model.onnx', offset: 0, bytes: 4 * shape.reduce((a, b) => a * b, 1) };
      return [name, { name, shape, span, encoding: { kind: 'plain', dtype: 'f32' } }];
    };
    const tensors = new Map([entry('w1', [k, wide]), entry('w2', [wide, n]), entry('b', [wide])]);
    const node = (op: string, name: string, inputs: string[], output: string) => ({ op, name, inputs, outputs: [output], domain: '', integers: new Map<string, number>() }); // prettier-ignore
    const path = `/${at.replace(/\.(?=\D)/g, '/')}`;
    const first = node('MatMul', `${path}/MatMul`, ['x', 'w1'], 'h');
    const found = (...between: ReturnType<typeof node>[]) => {
      const last = between.at(-1)?.outputs[0] ?? 'h';
      const nodes = [first, ...between, node('MatMul', `${path}/MatMul_1`, [last, 'w2'], 'y')];
      return [...fromOnnx(tensors, nodes, {}).tensors.keys()].filter((name) => name.startsWith(at));
    };
    expect(found()).toEqual([`${at}.0.weight`, `${at}.1.weight`]);
    expect(found(node('Add', `${path}/Add`, ['h', 'b'], 'hb'))).toEqual([`${at}.0.weight`, `${at}.1.weight`]);
    expect(() => found(node('Relu', `${path}/Relu`, ['h'], 'r'))).toThrow(/one name/);
  });
});
