import type { DType } from '../../base/dtype.js';
import { bug } from '../../base/errors.js';
import type { Tensor } from '../tensor.js';

const floats: ReadonlySet<DType> = new Set<DType>(['f32', 'bf16', 'f16']);

const show = (t: Tensor): string => `${t.dtype} [${t.shape.join(', ')}]`;

export function ensure(condition: boolean, op: string, what: string, ...tensors: (Tensor | undefined)[]): void {
  if (!condition) throw bug(`${op}: ${what}`, { got: tensors.map((t) => (t ? show(t) : 'none')).join(', ') });
}

/** Shape check; -1 matches anything. */
export function ensureShape(op: string, name: string, t: Tensor, ...shape: number[]): void {
  const same = t.shape.length === shape.length && shape.every((d, i) => d === -1 || d === t.shape[i]);
  if (!same) throw bug(`${op}: ${name}`, { expected: `[${shape.join(', ')}]`, got: show(t) });
}

export function ensureFloat(op: string, ...tensors: (Tensor | undefined)[]): void {
  for (const t of tensors) if (t) ensure(floats.has(t.dtype), op, 'float tensor expected', t);
}

export function ensureDType(op: string, dtype: DType, ...tensors: (Tensor | undefined)[]): void {
  for (const t of tensors) if (t) ensure(t.dtype === dtype, op, `${dtype} tensor expected`, t);
}

/** Rows must be dense: the last dimension has stride 1. */
export function ensureRows(op: string, ...tensors: (Tensor | undefined)[]): void {
  for (const t of tensors) {
    if (t) ensure(t.dim(-1) <= 1 || t.strides.at(-1) === 1, op, 'last dimension must have stride 1', t);
  }
}

export function ensureContiguous(op: string, ...tensors: (Tensor | undefined)[]): void {
  for (const t of tensors) if (t) ensure(t.contiguous, op, 'contiguous tensor expected', t);
}
