import { readFileSync, readdirSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { inMemory } from '../../../src/formats/source.js';
import { readTorch, torchRefusals } from '../../../src/formats/torch.js';
import type { TorchFile } from '../../../src/formats/torch.js';
import { layoutTorch } from '../../../src/formats/torch-writer.js';
import type { Piece, TorchTensorPlan } from '../../../src/formats/torch-writer.js';
import type { PyDict, PyValue } from '../../../src/formats/pickle-values.js';
import { elementBytes, stateEntries } from '../../../src/formats/torch-state.js';
import { dtypeElement, TorchStorage, TorchTensor } from '../../../src/formats/torch-values.js';
import type { TensorEntry } from '../../../src/formats/types.js';
import { crc32 } from 'node:zlib';
import { badInputMessage } from '../../support/refusal.js';

interface Expected {
  dtype: string;
  shape: number[];
  hex: string;
}
const folder = new URL('../../../fixtures/formats/torch/', import.meta.url);
const bytesOf = (name: string): Buffer => readFileSync(new URL(name, folder));
const expected = JSON.parse(bytesOf('expected.json').toString()) as Record<string, Record<string, Expected>>;
const read = (name: string): TorchFile => readTorch(inMemory(bytesOf(name), name));

/** A tensor's values in row-major order, gathered by its strides. */
function values(file: Buffer, { shape, strides, span, encoding }: TensorEntry): Buffer {
  if (strides === undefined) return file.subarray(span.offset, span.offset + span.bytes);
  const size = elementBytes(encoding);
  const parts: Buffer[] = [];
  const visit = (dim: number, at: number): void => {
    if (dim === shape.length) parts.push(file.subarray(at, at + size));
    else for (let i = 0; i < shape[dim]!; i++) visit(dim + 1, at + i * strides[dim]! * size);
  };
  visit(0, span.offset);
  return Buffer.concat(parts);
}

const hex = (text: string): string =>
  text.startsWith('zeros ') ? '00'.repeat(Number(text.slice('zeros '.length))) : text;

describe('readTorch', () => {
  const files = Object.keys(expected);
  it('has all fixtures', () => {
    expect(readdirSync(folder).filter((name) => name.endsWith('.bin'))).toEqual([...files, 'whole-model.bin'].sort());
  });

  it.each(files)('reads %s as torch does', (name) => {
    const file = bytesOf(name);
    const { tensors } = read(name);
    expect(tensors.map((tensor) => tensor.name).sort()).toEqual(Object.keys(expected[name]!).sort());
    for (const tensor of tensors) {
      const want = expected[name]![tensor.name]!;
      expect(tensor.encoding, tensor.name).toEqual(dtypeElement(want.dtype));
      expect(tensor.shape, tensor.name).toEqual(want.shape);
      expect(values(file, tensor).toString('hex'), tensor.name).toBe(hex(want.hex));
    }
  });

  it('knows the three containers', () => {
    expect(['plain.bin', 'legacy.bin', 'tar.bin'].map((name) => read(name).container)).toEqual([
      'zip',
      'stream',
      'tar',
    ]);
  });

  it('gives strides only where data is not contiguous, with a span that covers just the view', () => {
    const byName = new Map(read('views.bin').tensors.map((tensor) => [tensor.name, tensor]));
    expect(byName.get('offset')!.strides).toBeUndefined();
    expect(byName.get('offset')!.span.bytes).toBe(16);
    expect(byName.get('step')!.strides).toEqual([5]);
    expect(byName.get('step')!.span.bytes).toBe((4 * 5 + 1) * 4);
    expect(byName.get('expanded')!.strides).toEqual([1, 0].map(() => expect.any(Number) as number));
    expect(byName.get('expanded')!.span.bytes).toBe(4);
  });

  it('finds nested weights, drops wrapper prefixes, and says what it ignored', () => {
    for (const name of ['training.bin', 'training-legacy.bin']) {
      const notes = read(name).notes.join('\n');
      expect(notes).toContain('Ignored beside the weights: epoch, best, optimizer, rng, args.');
      expect(notes).toContain('under "state_dict"');
      expect(notes).toContain('"module._orig_mod."');
    }
  });

  it('finds weights nested twice beside a lone tensor, whose file would otherwise be a model of that', () => {
    const tensor = new TorchTensor(new TorchStorage('0', 'FloatStorage', 2), 0, [2], [1]);
    const weights: PyDict = new Map([['module.w', tensor], ['module.b', tensor]]); // prettier-ignore
    const model: PyDict = new Map([['state_dict', weights]]);
    model.set('model', model); // a dictionary may hold itself
    const root: PyDict = new Map<PyValue, PyValue>([['model', model], ['rng', tensor], ['epoch', 3n]]); // prettier-ignore
    const found = stateEntries(root, new Map([['0', { offset: 0, bytes: 8 }]]), 'x.bin');
    expect(found.tensors.map(({ name }) => name)).toEqual(['w', 'b']);
    expect(found.notes.join('\n')).toContain('Ignored beside the weights: rng, epoch.');
    expect(found.notes.join('\n')).toContain('under "model"."state_dict"');
  });

  it.each(['state_dict', 'model_state_dict', 'model', 'module', 'weights'])('finds weights under "%s"', (key) => {
    const tensor = new TorchTensor(new TorchStorage('0', 'FloatStorage', 2), 0, [2], [1]);
    const root: PyDict = new Map<PyValue, PyValue>([['epoch', 3n], [key, new Map([['w', tensor]])]]); // prettier-ignore
    const { tensors } = stateEntries(root, new Map([['0', { offset: 0, bytes: 8 }]]), 'x.bin');
    expect(tensors.map(({ name }) => name)).toEqual(['w']);
  });

  it('keeps tied tensors on one place', () => {
    const byName = new Map(read('plain.bin').tensors.map((tensor) => [tensor.name, tensor]));
    expect(byName.get('tied')!.span).toEqual(byName.get('bfloat16')!.span);
  });

  it('refuses a whole pickled model and names what it would run', async () => {
    const message = await badInputMessage(() => read('whole-model.bin'));
    expect(message).toContain('torch.nn.modules.container.Sequential');
    expect(message).toContain('state_dict()');
    const names = torchRefusals(inMemory(bytesOf('whole-model.bin'), 'x')).map((refused) => refused.name);
    expect(names).toContain('torch.nn.modules.linear.Linear');
    expect(torchRefusals(inMemory(bytesOf('training.bin'), 'x'))).toEqual([]);
  });
});

const ends = (layout: ReturnType<typeof layoutTorch>, crcs: number[]): Piece[] => [
  ...crcs.map((crc, i) => layout.afterStorage(i, crc)),
  ...layout.tail(crcs),
];

describe('layoutTorch', () => {
  /** Writes a file by its layout from the tensors of another. */
  function rewrite(
    source: Buffer,
    entries: readonly TensorEntry[],
    plan: readonly TorchTensorPlan[],
    stem: string,
  ): Buffer {
    const layout = layoutTorch(plan, stem);
    const made = Buffer.alloc(layout.size);
    for (const { position, bytes } of layout.pieces) bytes.copy(made, position);
    for (const entry of entries) values(source, entry).copy(made, layout.offsets.get(entry.name));
    const crcs = layout.storages.map(({ position, bytes }) => crc32(made.subarray(position, position + bytes)));
    for (const { position, bytes } of ends(layout, crcs)) bytes.copy(made, position);
    return made;
  }

  it('writes the very bytes of torch.save, but for the serialization id', () => {
    const original = bytesOf('plain.bin');
    const { tensors } = read('plain.bin');
    const plan = tensors.map(({ name, shape, encoding }) => ({
      name,
      shape,
      encoding,
      ...(name === 'tied' && { tiedTo: 'bfloat16' }),
    }));
    const made = rewrite(original, tensors, plan, 'plain');
    expect(made.length).toBe(original.length);
    // The id's 40 digits, their checksum after them, and that checksum in the central directory.
    const id = original.indexOf('.data/serialization_id');
    const data = Math.ceil((id + 22 + 4) / 64) * 64;
    const central = original.lastIndexOf('plain/.data/serialization_id') - 46 + 16;
    for (const [start, length] of [[data, 40], [data + 44, 4], [central, 4]] as const) {
      original.copy(made, start, start, start + length);
    } // prettier-ignore
    expect(made.equals(original)).toBe(true);
  });

  it('reads back what it writes', () => {
    const original = bytesOf('views.bin');
    const { tensors } = read('views.bin');
    const made = rewrite(original, tensors, tensors, 'x');
    for (const tensor of readTorch(inMemory(made, 'made')).tensors) {
      const want = expected['views.bin']![tensor.name]!;
      expect(tensor.strides).toBeUndefined();
      expect(values(made, tensor).toString('hex'), tensor.name).toBe(want.hex);
      expect(tensor.span.offset % 64).toBe(0);
    }
  });

  it('uses ZIP64 fields beyond 4 GiB, and reads them back', () => {
    const plan = [
      { name: 'small', shape: [2], encoding: dtypeElement('float32')! },
      { name: 'large', shape: [2 ** 31, 2], encoding: dtypeElement('float32')! },
      { name: 'after', shape: [4], encoding: dtypeElement('float32')! },
    ];
    const layout = layoutTorch(plan, 'x');
    const pieces = [...layout.pieces, ...ends(layout, [1, 2, 3])];
    const sparse = {
      path: 'sparse',
      size: layout.size,
      read(position: number, bytes: number): Buffer {
        const out = Buffer.alloc(bytes);
        for (const piece of pieces) {
          const from = Math.max(piece.position, position);
          const to = Math.min(piece.position + piece.bytes.length, position + bytes);
          if (from < to) piece.bytes.copy(out, from - position, from - piece.position, to - piece.position);
        }
        return out;
      },
    };
    const { tensors } = readTorch(sparse);
    expect(tensors.map(({ name, shape, span }) => [name, shape, span.offset, span.bytes])).toEqual(
      plan.map(({ name, shape }) => [name, shape, layout.offsets.get(name), shape.reduce((a, b) => a * b, 4)]),
    );
    expect(layout.offsets.get('after')!).toBeGreaterThan(2 ** 34);
  });
});
