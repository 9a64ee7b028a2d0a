import { badInput } from '../base/errors.js';
import { elementCount } from '../base/dtype.js';
import type { TensorEntry } from '../formats/types.js';
import type { LayoutReader, StoredLinear } from '../layout/types.js';

/** A tensor as an architecture sees it, wherever and however it is stored. */
export interface StoredWeight {
  readonly name: string;
  /** For quantized linears K may be rounded up to whole words. */
  readonly shape: readonly number[];
  /** The tensor itself; for quantized linears its packed codes. */
  readonly entry: TensorEntry;
  /** Present where a quantized layout holds it. */
  readonly linear?: StoredLinear;
  /** Names of the tensors in the checkpoint that it comes from. */
  readonly sources: readonly string[];
  readonly files: readonly string[];
}

/** What the checkpoint holds, under the names that architectures use: one per weight, quantized or not. */
export function storedWeights(
  tensors: ReadonlyMap<string, TensorEntry>,
  layout: LayoutReader | undefined,
): Map<string, StoredWeight> {
  const weights = new Map<string, StoredWeight>();
  const consumed = new Set<string>();
  for (const linear of layout?.linears(tensors).values() ?? []) {
    const parts = [...linear.parts.values()];
    for (const part of parts) consumed.add(part.name);
    if (tensors.has(linear.name)) {
      throw badInput('A linear is there twice, quantized and not', {
        where: parts[0]!.span.path,
        got: `${parts[0]!.name} and ${linear.name}`,
      });
    }
    weights.set(linear.name, {
      name: linear.name,
      shape: linear.shape,
      entry: parts[0]!,
      linear,
      sources: parts.map((part) => part.name),
      files: [...new Set(parts.map((part) => part.span.path))],
    });
  }
  let files: readonly string[] = [];
  for (const entry of tensors.values()) {
    if (consumed.has(entry.name)) continue;
    const { name, span } = entry;
    if (files[0] !== span.path) files = [span.path]; // shared by a file's tensors: there may be 100,000
    for (const piece of unfused(entry)) {
      weights.set(piece.name, { name: piece.name, shape: piece.shape, entry: piece, sources: [name], files });
    }
  }
  return weights;
}

/** Whether each tensor is the weight of its name as it stands: then they need no `storedWeights` to be looked up. */
export function isPlain(tensors: ReadonlyMap<string, TensorEntry>, layout: LayoutReader | undefined): boolean {
  if (layout !== undefined) return false;
  for (const { shape, name } of tensors.values()) if (shape.length === 3 && fusedExperts.test(name)) return false;
  return true;
}

const fusedExperts = /^(.*\.experts)\.(gate_up_proj|down_proj)$/;

/**
 * Experts that are stored as one tensor (`experts.gate_up_proj` [E, 2 I, C], `experts.down_proj` [E, C, I]) as one
 * entry an expert and projection; any other tensor as it is.
 */
function unfused(entry: TensorEntry): TensorEntry[] {
  if (entry.shape.length !== 3) return [entry];
  const match = fusedExperts.exec(entry.name);
  const { shape, span } = entry;
  if (!match || entry.strides || !['plain', 'ggml'].includes(entry.encoding.kind)) return [entry];
  const [, prefix, kind] = match;
  const [experts, rows] = shape as [number, number, number];
  const names = kind === 'down_proj' ? ['down_proj'] : ['gate_proj', 'up_proj'];
  const pieces = experts * names.length;
  if (elementCount(shape) === 0 || rows % names.length !== 0 || span.bytes % pieces !== 0) return [entry];
  return Array.from({ length: pieces }, (_, i) => ({
    ...entry,
    name: `${prefix}.${Math.floor(i / names.length)}.${names[i % names.length]}.weight`,
    shape: [rows / names.length, shape[2]!],
    span: { path: span.path, offset: span.offset + (span.bytes / pieces) * i, bytes: span.bytes / pieces },
  }));
}
