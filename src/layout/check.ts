import { elementCount, type DType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';
import type { Tensor } from '../tensor/tensor.js';
import type { Load } from './types.js';

export function keyError(where: string, key: string, value: unknown, expected: string, hint?: string): Error {
  return badInput(`Quantization setting ${key} is not supported`, {
    where,
    got: value === undefined ? 'nothing' : (JSON.stringify(value) ?? typeof value).slice(0, 200),
    expected,
    ...(hint !== undefined && { hint }),
  });
}

export function record(value: unknown, where: string, key: string): Readonly<Record<string, unknown>> {
  if (typeof value !== 'object' || value === null || Array.isArray(value))
    throw keyError(where, key, value, 'an object');
  return value as Record<string, unknown>;
}

/** Element type of a plainly stored tensor. */
export const storedDType = ({ encoding }: TensorEntry): DType | undefined =>
  encoding.kind === 'plain' ? encoding.dtype : undefined;

/** Reads parts of one stored linear, after a look at their types and sizes. */
export class PartReader {
  constructor(
    readonly name: string,
    readonly parts: ReadonlyMap<string, TensorEntry>,
    readonly load: Load,
  ) {}

  has(suffix: string): boolean {
    return this.parts.has(suffix);
  }
  /** `dtype` undefined: any float. */
  async get(suffix: string, dtype: DType | undefined, shape: readonly number[]): Promise<Tensor> {
    const entry = this.parts.get(suffix)!;
    const stored = storedDType(entry);
    const typed = dtype === undefined ? ['f32', 'bf16', 'f16'].includes(stored ?? '') : stored === dtype;
    if (!typed || elementCount(entry.shape) !== elementCount(shape)) {
      const show = (type: string | undefined, dims: readonly number[]) => `${type ?? 'float'} [${dims.join(', ')}]`;
      throw this.wrong(suffix, show(dtype, shape), show(stored ?? entry.encoding.kind, entry.shape));
    }
    return (await this.load(entry, stored!)).view(...shape);
  }
  /** The group of each column, i32 [columns]: every index is looked at before it reaches native code. */
  async columnGroups(suffix: string, columns: number, groups: number): Promise<Tensor> {
    const tensor = await this.get(suffix, 'i32', [columns]);
    const odd = (await tensor.int32()).find((g) => g < 0 || g >= groups);
    if (odd !== undefined) throw this.wrong(suffix, `groups from 0 to ${groups - 1}`, String(odd));
    return tensor;
  }
  wrong(suffix: string, expected: string, got: string): Error {
    return badInput('A quantized linear does not fit the model', {
      where: `${this.parts.get(suffix)!.span.path}, tensor ${this.name}.${suffix}`,
      expected,
      got,
    });
  }
}

/** The stored parts of each linear that has a part `key`. Errors: one of `needed` is missing. */
export function findParts(
  tensors: ReadonlyMap<string, TensorEntry>,
  key: string,
  needed: (name: string) => readonly string[],
  optional: readonly string[],
): Map<string, Map<string, TensorEntry>> {
  const found = new Map<string, Map<string, TensorEntry>>();
  for (const [stored, main] of tensors) {
    if (!stored.endsWith(`.${key}`)) continue;
    const name = stored.slice(0, -key.length - 1);
    const required = needed(name);
    const parts = new Map<string, TensorEntry>();
    for (const suffix of [key, ...required, ...optional]) {
      const part = tensors.get(`${name}.${suffix}`);
      if (part) parts.set(suffix, part);
      else if (required.includes(suffix)) {
        throw badInput('A quantized linear is incomplete', {
          where: main.span.path,
          got: `${stored} without ${name}.${suffix}`,
          expected: [key, ...required].join(', '),
        });
      }
    }
    if (main.shape.length !== 2 || storedDType(main) !== 'i32') {
      throw badInput('Packed weights have the wrong form', {
        where: `${main.span.path}, tensor ${stored}`,
        got: `${storedDType(main) ?? main.encoding.kind} [${main.shape.join(', ')}]`,
        expected: 'i32 of two dimensions',
      });
    }
    found.set(name, parts);
  }
  return found;
}
