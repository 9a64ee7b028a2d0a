import type { DType } from '../base/dtype.js';
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

/** The type of a tensor's elements as they are stored, of a computed tensor its first part's; undefined: none is plain. */
export function elementType({ encoding }: TensorEntry): DType | undefined {
  switch (encoding.kind) {
    case 'plain':
      return encoding.dtype;
    case 'assembled':
      return elementType(encoding.parts[0]!.entry);
    case 'product':
      return elementType(encoding.factors[0]!.weight);
    case 'rotated':
      return elementType(encoding.of);
    default:
      return undefined;
  }
}
