import { badInput } from '../base/errors.js';
import type { TensorEntry } from '../formats/types.js';

/** All tensors of a checkpoint by name. Errors (kind 'input'): a name that stands for two. */
export function byName(entries: readonly TensorEntry[]): Map<string, TensorEntry> {
  const tensors = new Map<string, TensorEntry>();
  for (const entry of entries) addDistinct(tensors, entry, entries);
  return tensors;
}

/** Adds one of `entries` to those before it. */
export function addDistinct(
  tensors: Map<string, TensorEntry>,
  entry: TensorEntry,
  entries: readonly TensorEntry[],
): void {
  const before = tensors.size;
  if (tensors.set(entry.name, entry).size > before) return;
  const first = entries.find(({ name }) => name === entry.name)!;
  throw badInput('A tensor is in two files', {
    where: `tensor ${JSON.stringify(entry.name)}`,
    got: `${first.span.path} and ${entry.span.path}`,
  });
}
