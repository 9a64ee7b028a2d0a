import type { DType } from '../base/dtype.js';
import { badInput } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';

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
