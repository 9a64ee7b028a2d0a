import { cpSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { openCheckpoint } from '../../../src/checkpoint/open.js';
import type { TensorEntry } from '../../../src/checkpoint/types.js';
import { readOnnx } from '../../../src/formats/onnx.js';
import type { OnnxFile } from '../../../src/formats/onnx.js';
import { inMemory } from '../../../src/formats/source.js';
import { badInputMessage } from '../../support/refusal.js';
import { elementBytes, numbers } from '../../support/values.js';

const fixture = fileURLToPath(new URL('../../../fixtures/formats/onnx/', import.meta.url));
const expected = JSON.parse(readFileSync(join(fixture, 'expected.json'), 'utf8')) as Record<string, [number[], string]>;
let folder: string;
beforeEach(() => (folder = mkdtempSync(join(tmpdir(), 'onnx-'))));
afterEach(() => rmSync(folder, { recursive: true }));

const nBits = new Map([
  ['model.layers.0.self_attn.q_proj', []],
  ['model.layers.0.self_attn.k_proj', ['weight_zero_points']],
  ['model.layers.0.self_attn.v_proj', ['weight_zero_points']],
  ['model.layers.0.mlp.up_proj', ['weight_g_idx']],
]);
const half = (bytes: Buffer): number => {
  const [bits, sign] = [bytes.readUInt16LE(), bytes[1]! & 128 ? -1 : 1];
  const [exponent, mantissa] = [(bits >> 10) & 31, bits & 1023];
  return sign * (exponent === 0 ? mantissa * 2 ** -24 : (1 + mantissa / 1024) * 2 ** (exponent - 15));
};
const values = (entry: TensorEntry): number[] =>
  entry.encoding.kind === 'plain' && entry.encoding.dtype === 'f16'
    ? elementBytes(entry).map(half)
    : Array.from(numbers(entry));

describe('ONNX models', () => {
  it.each(['model.onnx', 'external/model.onnx'])('have their weights read as onnx does: %s', async (file) => {
    const { tensors, notes, format } = await openCheckpoint(join(fixture, file));
    expect(format).toBe('onnx');
    expect(notes).toEqual(['1 constants that are not stored as raw data were left out.']);
    const plain = Object.entries(expected).filter(
      ([name]) => ![...nBits.keys()].some((module) => name.startsWith(module)),
    );
    for (const [name, [shape, hex]] of plain) {
      const entry = tensors.get(name);
      expect(entry?.shape, name).toEqual(shape);
      expect(Buffer.from(Float32Array.from(values(entry!)).buffer).toString('hex'), name).toBe(hex);
    }
    const parts = [...nBits].flatMap(([name, more]) =>
      ['weight_nbits', 'weight_scales', ...more].map((part) => `${name}.${part}`),
    );
    expect([...tensors.keys()].sort()).toEqual([...plain.map(([name]) => name), ...parts].sort());
  });

  it('describe their MatMulNBits linears in the config', async () => {
    const { config, tensors, files } = await openCheckpoint(join(fixture, 'external/model.onnx'));
    expect(config['quantization_config']).toMatchObject({
      quant_method: 'matmulnbits',
      linears: {
        'model.layers.0.self_attn.q_proj.weight': { bits: 4, blockSize: 16, inFeatures: 80, outFeatures: 6 },
        'model.layers.0.self_attn.v_proj.weight': { bits: 8, blockSize: 32, inFeatures: 80, outFeatures: 6 },
      },
    });
    expect(tensors.get('model.layers.0.self_attn.k_proj.weight_nbits')!.shape).toEqual([6, 3, 16]);
    expect(files.map((path) => path.split('/').at(-1))).toEqual(['model.onnx', 'model.onnx.data']);
  });

  it('split a fused q/k/v matrix by the heads of the config', async () => {
    const { fromOnnx } = await import('../../../src/checkpoint/onnx-model.js');
    const data = Buffer.from(Float32Array.from({ length: 3 * 8 }, (_, i) => i).buffer);
    writeFileSync(join(folder, 'w'), data);
    const name = 'model.layers.0.attn.qkv_proj.MatMul.weight';
    const entry: TensorEntry = { name, shape: [3, 8], encoding: { kind: 'plain', dtype: 'f32' }, span: { path: join(folder, 'w'), offset: 0, bytes: 96 } }; // prettier-ignore
    const node = {
      op: 'MatMul',
      domain: '',
      name: '',
      inputs: ['x', name],
      outputs: [],
      integers: new Map<string, number>(),
    };
    const config = { num_attention_heads: 2, num_key_value_heads: 1, head_dim: 2 };
    const { tensors } = fromOnnx(new Map([[name, entry]]), [node], config);
    const at = 'model.layers.0.self_attn';
    expect(Array.from(numbers(tensors.get(`${at}.q_proj.weight`)!))).toEqual([
      0, 8, 16, 1, 9, 17, 2, 10, 18, 3, 11, 19,
    ]);
    expect(Array.from(numbers(tensors.get(`${at}.v_proj.weight`)!))).toEqual([6, 14, 22, 7, 15, 23]);
    const wrong = (): unknown => fromOnnx(new Map([[name, entry]]), [node], { ...config, num_key_value_heads: 2 });
    expect(await badInputMessage(wrong)).toContain('expected 4 + 4 + 4 rows, got 8');
  });
});

// --- hostile files, field by field ---
function varint(value: number | bigint): Buffer {
  const bytes: number[] = [];
  let rest = BigInt.asUintN(64, BigInt(value));
  do {
    bytes.push(Number(rest & 127n) | (rest > 127n ? 128 : 0));
    rest >>= 7n;
  } while (rest > 0n);
  return Buffer.from(bytes);
}
const integer = (field: number, value: number | bigint): Buffer => Buffer.concat([varint(field << 3), varint(value)]);
const bytes = (field: number, content: Buffer | string): Buffer => {
  const data = Buffer.from(content as string);
  return Buffer.concat([varint((field << 3) | 2), varint(data.length), data]);
};
const model = (...initializers: Buffer[]): Buffer => Buffer.concat([integer(1, 10), bytes(7, Buffer.concat(initializers.map((one) => bytes(5, one))))]); // prettier-ignore
const tensor = (name: string, dims: (number | bigint)[], more: Buffer, type = 1): Buffer =>
  Buffer.concat([...dims.map((dim) => integer(1, dim)), integer(2, type), bytes(8, name), more]);
const external = (entries: Record<string, string>): Buffer =>
  Buffer.concat([
    ...Object.entries(entries).map(([key, value]) => bytes(13, Buffer.concat([bytes(1, key), bytes(2, value)]))),
    integer(14, 1),
  ]);
const read = (file: Buffer, path = 'x.onnx'): OnnxFile => readOnnx(inMemory(file, path));
const message = (file: Buffer, path?: string): Promise<string> => badInputMessage(() => read(file, path));

describe('hostile ONNX', () => {
  it('files without a graph, with two, with garbage', async () => {
    expect(await message(integer(1, 10))).toContain('no graph');
    expect(await message(Buffer.concat([model(), model()]))).toContain('several');
    expect(await message(Buffer.from([0x08, 0x0a, 0x0f]))).toContain('unknown wire type 7');
    expect(await message(Buffer.from([0x3a, 0x7f]))).toContain('runs over the end');
    expect(await message(Buffer.alloc(20, 0xff))).toContain('more than ten bytes');
    expect(await message(Buffer.from([0x00, 0x01]))).toContain('without a number');
  });

  it('a valid model made by this builder is accepted', () => {
    const made = read(model(tensor('w', [2], bytes(9, Buffer.alloc(8)))));
    expect(made.tensors.map(({ name, shape }) => [name, shape])).toEqual([['w', [2]]]);
  });

  it('sizes that disagree, shapes that overflow or are negative, duplicates, unknown types', async () => {
    expect(await message(model(tensor('w', [3], bytes(9, Buffer.alloc(8)))))).toContain(
      'expected 12 bytes for [3], got 8',
    );
    expect(await message(model(tensor('w', [2n ** 31n, 2n ** 31n], bytes(9, ''))))).toContain('overflows');
    expect(await message(model(tensor('w', [-1], bytes(9, ''))))).toContain('negative or impossible');
    expect(await message(model(tensor('w', [0, 2n ** 62n], bytes(9, ''))))).toContain('impossible');
    const w = tensor('w', [1], bytes(9, Buffer.alloc(4)));
    expect(await message(model(w, w))).toContain('two initializers named "w"');
    expect(await message(model(tensor('w', [1], bytes(9, Buffer.alloc(4)), 99)))).toContain('Unknown element type');
    expect(await message(model(tensor('w', [1], bytes(3, ''))))).toContain('segments');
    expect(await message(model(Buffer.concat([bytes(8, Buffer.from([0xff]))])))).toContain('UTF-8');
  });

  it('deep nesting costs no stack', () => {
    let nested = bytes(5, '');
    for (let i = 0; i < 5000; i++) nested = bytes(6, nested); // attribute graphs in attribute graphs
    const node = bytes(1, Buffer.concat([bytes(4, 'If'), bytes(5, nested)]));
    const file = Buffer.concat([integer(1, 10), bytes(7, node)]);
    expect(read(file).nodes[0]!.op).toBe('If');
  });

  it('external data outside of the folder: "..", absolute paths, links, drive letters', async () => {
    const path = join(folder, 'm.onnx');
    const at = (location: string, more: Record<string, string> = {}): Promise<string> =>
      message(model(tensor('w', [1], external({ location, ...more }))), path);
    for (const location of ['../w', '/etc/passwd', 'a/../../w', 'C:\\w', '..\\w', '']) {
      expect(await at(location), location).toContain('in the folder of the model');
    }
    symlinkSync('/etc/hostname', join(folder, 'link'));
    expect(await at('link')).toContain('link out of the folder');
    expect(await at('missing')).toContain('no such file');
    writeFileSync(join(folder, 'w'), Buffer.alloc(8));
    expect(await at('w', { offset: '6' })).toContain('expected 4 bytes within 8, got 4 bytes from byte 6');
    expect(await at('w', { length: '5' })).toContain('got 5 bytes');
    expect(await at('w', { offset: '-1' })).toContain('Bad offset');
    expect(await at('w', { offset: '1e3' })).toContain('Bad offset');
    expect(read(model(tensor('w', [1], external({ location: 'w', offset: '4' }))), path).tensors[0]!.span.offset).toBe(
      4,
    );
  });

  it('truncation anywhere', async () => {
    const whole = readFileSync(join(fixture, 'model.onnx'));
    for (const length of [1, 5, 50, 500, 3000, whole.length - 1]) {
      expect(await message(whole.subarray(0, length))).not.toBe('');
    }
  });

  it('MatMulNBits whose inputs do not fit its attributes', async () => {
    cpSync(fixture, folder, { recursive: true });
    const file = readFileSync(join(folder, 'model.onnx'));
    const at = file.indexOf(Buffer.concat([bytes(1, 'block_size')])) + 2 + 'block_size'.length;
    expect([...file.subarray(at, at + 2)]).toEqual([0x18, 16]); // field 3: the integer
    file[at + 1] = 32;
    writeFileSync(join(folder, 'model.onnx'), file);
    expect(await badInputMessage(openCheckpoint(join(folder, 'model.onnx')))).toContain('another size');
  });

  it('MatMulNBits with reordered columns and zero points, which onnxruntime leaves out', async () => {
    const { fromOnnx } = await import('../../../src/checkpoint/onnx-model.js');
    const { tensors } = read(readFileSync(join(fixture, 'model.onnx')));
    const module = 'model.layers.0.mlp.up_proj.MatMul.weight';
    const points = tensors.find(({ name }) => name.endsWith('k_proj.MatMul.weight_zp'))!;
    const inputs = ['x', `${module}_Q4`, `${module}_scales`, points.name, `${module}_g_idx`];
    const integers = new Map(Object.entries({ K: 80, N: 6, bits: 4, block_size: 16 }));
    const all = new Map(tensors.map((tensor) => [tensor.name, tensor]));
    all.set(points.name, { ...points, shape: [6, 3] });
    const node = { op: 'MatMulNBits', domain: 'com.microsoft', name: 'n', inputs, outputs: [], integers };
    expect(await badInputMessage(() => fromOnnx(all, [node], {}))).toContain('both g_idx and zero points');
  });
});
