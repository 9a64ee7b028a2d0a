import { bug } from '../base/errors.js';
import type { Arrangement, AssembledPart, Encoding, TensorEntry } from './types.js';

/** Shape of one part after its cut and transposition. */
export function arrangedShape({ view, cut, axes }: Arrangement): number[] {
  const shape = view.map((size, d) => (cut?.axis === d ? cut.to - cut.from : size));
  return axes.map((d) => shape[d]!);
}

/** Shape of all parts joined along `axis`. */
export function joinedShape(parts: readonly Arrangement[], axis: number): number[] {
  const shapes = parts.map(arrangedShape);
  return shapes[0]!.with(axis, shapes.reduce((sum, shape) => sum + shape[axis]!, 0)); // prettier-ignore
}

/** An entry as it is stored, with nothing to rearrange. */
export const asStored = (entry: TensorEntry): AssembledPart => ({
  entry,
  view: entry.shape,
  axes: entry.shape.map((_, d) => d),
});

/** A tensor put together from parts. */
export function assembled(
  name: string,
  shape: readonly number[],
  axis: number,
  parts: readonly AssembledPart[],
): TensorEntry {
  const count = (dims: readonly number[]): number => dims.reduce((n, d) => n * d, 1);
  if (
    count(joinedShape(parts, axis)) !== count(shape) ||
    parts.some(({ view, entry }) => count(view) !== count(entry.shape))
  ) {
    throw bug('Parts of a tensor do not make up its shape', { where: `tensor ${name}`, got: `[${shape.join(', ')}]` });
  }
  const encoding: Encoding = { kind: 'assembled', axis, parts };
  return { name, shape, encoding, span: parts[0]!.entry.span };
}
