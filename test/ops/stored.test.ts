import { readFileSync } from 'node:fs';
import { open } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';
import { expect, it } from 'vitest';
import { TensorLoader } from '../../src/arch/load.js';
import { storedWeights } from '../../src/arch/stored.js';
import type { Device } from '../../src/backend/device.js';
import { piecesOf } from '../../src/export/pieces.js';
import { asStored, assembled } from '../../src/formats/assembly.js';
import { openCheckpoint } from '../../src/checkpoint/open.js';
import type { Encoding, GgmlType, TensorEntry } from '../../src/checkpoint/types.js';
import { detectLayout } from '../../src/layout/detect.js';
import { Scope } from '../../src/tensor/tensor.js';
import { onDevices } from './support.js';

const fixture = (name: string): string => fileURLToPath(new URL(`../../fixtures/formats/${name}`, import.meta.url));
const open1 = (name: string) => openCheckpoint(fixture(name), { configOptional: true });

/** The values of stored tensors in f32, as every command loads them. */
async function load(device: Device, entries: readonly TensorEntry[], config: object = {}): Promise<Float32Array[]> {
  const tensors = new Map(entries.map((entry) => [entry.name, entry]));
  const weights = storedWeights(tensors, detectLayout(config as Record<string, unknown>, 'test'));
  const handles = new Map<string, ReturnType<typeof open>>();
  const file = (path: string) => handles.get(path) ?? handles.set(path, open(path)).get(path)!;
  const loader = new TensorLoader({ tensors: weights, file }, device);
  const out: Float32Array[] = [];
  try {
    for (const { name, shape } of weights.values()) {
      using scope = new Scope(device);
      const into = scope.empty('f32', shape);
      await loader.load([{ name, into }]);
      out.push(await into.float32());
    }
  } finally {
    for (const handle of handles.values()) await (await handle).close();
  }
  return out;
}
const bits = (values: Float32Array): string =>
  Buffer.from(values.buffer, values.byteOffset, values.byteLength).toString('hex');
const ggml: GgmlType[] = ['q4_0', 'q4_1', 'q5_0', 'q5_1', 'q8_0', 'q2_k', 'q3_k', 'q4_k', 'q5_k', 'q6_k', 'iq4_nl', 'mxfp4']; // prettier-ignore

onDevices('stored tensors', (device) => {
  it.each(ggml)('%s blocks have the values of gguf-py, bit for bit', async (type) => {
    const { tensors } = await open1('ggml/blocks.safetensors');
    const [blocks, values] = [tensors.get(`${type}.blocks`)!, tensors.get(`${type}.values`)!];
    const entry: TensorEntry = { ...blocks, shape: values.shape, encoding: { kind: 'ggml', type } };
    const [got, want] = await load(device(), [entry, values]);
    expect(bits(got!)).toBe(bits(want!));
  });

  it.each([
    ['fp8_f32', 'f8_e4m3', [128, 128], 'f32'],
    ['fp8_f32_tall', 'f8_e4m3', [128, 128], 'f32'],
    ['fp8_e8m0', 'f8_e4m3', [128, 128], 'f8_e8m0'],
    ['fp4_e8m0', 'f4_e2m1', [1, 32], 'f8_e8m0'],
  ] as const)('%s has the values of the numpy tables, bit for bit', async (name, element, block, scaleElement) => {
    const { tensors } = await open1('scaled/scaled.safetensors');
    const [codes, scale, values] = ['codes', 'scale', 'values'].map((part) => tensors.get(`${name}.${part}`)!);
    const encoding: Encoding = { kind: 'scaled', element, block, scale: scale!, scaleElement };
    const [got, want] = await load(device(), [{ ...codes!, shape: values!.shape, encoding }, values!]);
    expect(bits(got!)).toBe(bits(want!));
  });

  it.each(['onnx/model.onnx', 'onnx/external/model.onnx'])(
    'MatMulNBits of %s is what onnxruntime computes',
    async (name) => {
      const { tensors, config } = await openCheckpoint(fixture(name));
      const expected = JSON.parse(readFileSync(fixture('onnx/expected.json'), 'utf8')) as Record<
        string,
        [number[], string]
      >;
      const names = ['self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj', 'mlp.up_proj'].map((part) => `model.layers.0.${part}.weight`); // prettier-ignore
      const entries = [...tensors.values()].filter((entry) => /\.([qkv]|up)_proj\./.test(entry.name));
      const weights = storedWeights(new Map(entries.map((entry) => [entry.name, entry])), detectLayout(config, 'test'));
      expect([...weights.keys()].sort()).toEqual([...names].sort());
      const loaded = await load(device(), entries, config);
      // A product with an identity matrix has no negative zeros.
      [...weights.keys()].forEach((key, i) => expect(bits(loaded[i]!.map((x) => x + 0)), key).toBe(expected[key]![1]));
    },
  );

  it('assembles parts: views, cuts, transpositions, joins', async () => {
    const { tensors } = await open1('ggml/blocks.safetensors');
    const source = tensors.get('source')!; // f32 [3, 256]
    const [plain] = await load(device(), [source]);
    const parts = [
      { entry: source, view: [3, 4, 64], cut: { axis: 1, from: 1, to: 3 }, axes: [2, 0, 1] },
      { entry: source, view: [3, 4, 64], cut: { axis: 1, from: 0, to: 1 }, axes: [2, 0, 1] },
    ];
    const [got] = await load(device(), [assembled('joined', [64, 9], 2, parts)]);
    const want = Float32Array.from({ length: 64 * 9 }, (_, i) => {
      const [c, r, p] = [Math.floor(i / 9), Math.floor((i % 9) / 3), i % 3];
      return plain![r * 256 + (p < 2 ? p + 1 : 0) * 64 + c]!;
    });
    expect(bits(got!)).toBe(bits(want));
  });

  it('in pieces they are the same: block rows, rows with their scales, joined parts', async () => {
    const blocks = (await open1('ggml/blocks.safetensors')).tensors;
    const scaled = (await open1('scaled/scaled.safetensors')).tensors;
    const source = blocks.get('source')!; // f32 [3, 256]
    const values = blocks.get('q4_k.values')!;
    const q4k: TensorEntry = { ...blocks.get('q4_k.blocks')!, shape: values.shape, encoding: { kind: 'ggml', type: 'q4_k' } }; // prettier-ignore
    const ofScaled = (
      name: string,
      element: 'f8_e4m3' | 'f4_e2m1',
      block: [number, number],
      scaleElement: 'f32' | 'f8_e8m0',
    ) => {
      // prettier-ignore
      const [codes, scale, shape] = [`${name}.codes`, `${name}.scale`, `${name}.values`].map((key) => scaled.get(key)!);
      const encoding: Encoding = { kind: 'scaled', element, block, scale: scale!, scaleElement };
      return { ...codes!, shape: shape!.shape, encoding };
    };
    const joined = assembled('joined', [6, 256], 0, [asStored(source), asStored(source)]);
    const cases: [TensorEntry, limit: number, pieces: number][] = [
      [source, 256, 3],
      [q4k, values.shape.at(-1)!, values.shape[0]!],
      [ofScaled('fp8_f32_tall', 'f8_e4m3', [128, 128], 'f32'), 400, 3],
      [ofScaled('fp4_e8m0', 'f4_e2m1', [1, 32], 'f8_e8m0'), 192, 2],
      [joined, 256, 2],
    ];
    for (const [entry, limit, count] of cases) {
      const pieces = piecesOf(entry, limit);
      expect(pieces.length, entry.name).toBe(count);
      const named = pieces.map((piece, i) => ({ ...piece.entry, name: `${i}` }));
      const [whole] = await load(device(), [entry]);
      const parts = await load(device(), named);
      const together = new Float32Array(whole!.length);
      parts.forEach((part, i) => together.set(part, pieces[i]!.start));
      expect(bits(together), entry.name).toBe(bits(whole!));
    }
  });
});
