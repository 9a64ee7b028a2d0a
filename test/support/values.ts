import { readFileSync } from 'node:fs';
import { arrangedShape, joinedShape } from '../../src/formats/assembly.js';
import { encodedBytes } from '../../src/formats/ggml.js';
import type { TensorEntry } from '../../src/formats/types.js';

const strides = (shape: readonly number[]): number[] =>
  shape.map((_, d) => shape.slice(d + 1).reduce((n, s) => n * s, 1));

/** Visits all indices of `shape` in row-major order. */
function* indices(shape: readonly number[]): Generator<number[]> {
  const count = shape.reduce((n, d) => n * d, 1);
  const steps = strides(shape);
  for (let i = 0; i < count; i++) yield shape.map((size, d) => Math.floor(i / steps[d]!) % size);
}
const offsetOf = (index: readonly number[], steps: readonly number[]): number =>
  index.reduce((sum, i, d) => sum + i * steps[d]!, 0);

/** A plain or opaque tensor's elements as bytes in row-major order, views and assembled tensors included. */
export function elementBytes(entry: TensorEntry): Buffer[] {
  const { shape, encoding, span } = entry;
  if (encoding.kind === 'assembled') return join(entry, elementBytes);
  const size = encodedBytes([8], encoding) / 8;
  const file = readFileSync(span.path).subarray(span.offset, span.offset + span.bytes);
  const steps = entry.strides ?? strides(shape);
  return [...indices(shape)].map((index) => {
    const at = offsetOf(index, steps) * size;
    return file.subarray(at, at + size);
  });
}

function join<T>({ shape, encoding }: TensorEntry, valuesOf: (entry: TensorEntry) => ArrayLike<T>): T[] {
  if (encoding.kind !== 'assembled') throw new Error('not assembled');
  const whole = joinedShape(encoding.parts, encoding.axis);
  const steps = strides(whole);
  const out = new Array<T>(shape.reduce((n, d) => n * d, 1));
  let start = 0;
  for (const part of encoding.parts) {
    const values = valuesOf(part.entry);
    const from = strides(part.view);
    const arranged = arrangedShape(part);
    for (const index of indices(arranged)) {
      const source = part.view.map(() => 0);
      part.axes.forEach((axis, d) => (source[axis] = index[d]! + (part.cut?.axis === axis ? part.cut.from : 0)));
      out[offsetOf(index.with(encoding.axis, index[encoding.axis]! + start), steps)] = values[offsetOf(source, from)]!;
    }
    start += arranged[encoding.axis]!;
  }
  return out;
}

/** Values of a plain f32/bf16 or block-scaled FP8 tensor, slowly. */
export function numbers(entry: TensorEntry): ArrayLike<number> {
  const { encoding, shape } = entry;
  if (encoding.kind === 'assembled') return join(entry, numbers);
  if (encoding.kind === 'scaled') {
    const scales = numbers(encoding.scale);
    const plain = numbers({ ...entry, encoding: { kind: 'plain', dtype: 'f8_e4m3' } });
    const width = Math.ceil(shape[1]! / encoding.block[1]);
    return [...indices(shape)].map(([r, c], i) => {
      const scale = scales[Math.floor(r! / encoding.block[0]) * width + Math.floor(c! / encoding.block[1])]!;
      return Math.fround(plain[i]! * scale);
    });
  }
  if (encoding.kind !== 'plain') throw new Error(encoding.kind);
  return elementBytes(entry).map((bytes) => {
    if (encoding.dtype === 'f32') return bytes.readFloatLE();
    if (encoding.dtype === 'bf16') return Buffer.concat([Buffer.alloc(2), bytes]).readFloatLE();
    if (encoding.dtype === 'f8_e4m3') return e4m3(bytes[0]!);
    throw new Error(encoding.dtype);
  });
}

function e4m3(code: number): number {
  const [exponent, mantissa] = [(code >> 3) & 15, code & 7];
  const value = exponent === 0 ? (mantissa / 8) * 2 ** -6 : (1 + mantissa / 8) * 2 ** (exponent - 7);
  return code & 128 ? -value : value;
}
