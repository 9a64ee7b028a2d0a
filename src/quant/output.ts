import { badInput, bug } from '../base/errors.js';
import { elementCount, dtypeSize, type FloatDType } from '../base/dtype.js';
import { fileSource } from '../base/io.js';
import { elementType } from '../formats/assembly.js';
import { encodedBytes } from '../formats/ggml.js';
import type { PlannedTensor, TensorEntry, TensorSink } from '../checkpoint/types.js';
import type { LinearShape } from '../layout/types.js';
import type { OpenModel } from '../arch/open.js';
import type { StoredWeight } from '../arch/stored.js';
import type { WeightReader } from '../arch/weights.js';
import { copyInto } from '../tensor/ops.js';
import type { Scope } from '../tensor/tensor.js';
import type { OutputTensor } from '../targets/types.js';
import type { QuantPlan } from './plan.js';
import type { Scheme } from './scheme.js';

export type { Origin, OutputTensor } from '../targets/types.js';

/** The output's tensors in the order of the source. */
export interface OutputPlan {
  readonly tensors: readonly OutputTensor[];
  /** Those of each block that are not made by quantizing, and of everything else (index -1). */
  readonly through: ReadonlyMap<number, readonly OutputTensor[]>;
  readonly bytes: number;
}

/**
 * Every tensor of the source in its place: quantized (as `layout` says), carried over as it is, or decoded where it
 * must be.
 */
export function planOutput(
  open: OpenModel,
  plan: QuantPlan,
  layout: (linear: LinearShape, scheme: Scheme, dtype: FloatDType) => PlannedTensor[],
): OutputPlan {
  const blockOf = new Map<string, number>();
  for (const block of open.model.blocks) for (const { name } of block.tensors) blockOf.set(name, block.index);
  const first = new Map<string, StoredWeight[]>();
  const later = new Set<string>();
  for (const weight of open.tensors.values()) {
    const [source, ...others] = weight.sources;
    first.set(source!, [...(first.get(source!) ?? []), weight]);
    for (const other of others) later.add(other);
  }
  const tensors: OutputTensor[] = [];
  const through = new Map<number, OutputTensor[]>();
  const add = (block: number, tensor: OutputTensor) => {
    tensors.push(tensor);
    if (tensor.origin.kind === 'linear') return;
    const list = through.get(block);
    if (list) list.push(tensor);
    else through.set(block, [tensor]);
  };
  for (const [source, entry] of open.checkpoint.tensors) {
    const weights = first.get(source) ?? [];
    if (weights.length === 0) {
      if (!later.has(source)) add(-1, { planned: asStored(entry), origin: { kind: 'copy', entry } });
      continue;
    }
    for (const weight of weights) {
      const block = blockOf.get(weight.name) ?? -1;
      const linear = plan.linears.get(weight.name.replace(/\.(weight|bias)$/, ''));
      if (linear?.scheme && weight.name.endsWith('.weight')) {
        const origin = { kind: 'linear', name: linear.linear.name } as const;
        for (const planned of layout(linear.stored, linear.scheme, linear.dtype)) add(block, { planned, origin });
        continue;
      }
      add(block, throughTensor(open, weight, linear?.stored));
    }
  }
  const bytes = tensors.reduce((sum, { planned }) => sum + plannedBytes(planned), 0);
  return { tensors, through, bytes };
}

function throughTensor(
  open: OpenModel,
  weight: StoredWeight,
  stored: { outFeatures: number; inFeatures: number } | undefined,
): OutputTensor {
  const { entry, name } = weight;
  const spec = open.spec(name);
  const shape = spec?.shape ?? entry.shape;
  const wanted = stored ? (name.endsWith('.bias') ? [stored.outFeatures] : [stored.outFeatures, stored.inFeatures]) : shape; // prettier-ignore
  const whole = entry.name === name && !weight.linear && !entry.strides && weight.sources[0] === name;
  const direct = entry.encoding.kind === 'plain' || entry.encoding.kind === 'opaque';
  if (whole && direct && elementCount(wanted) === elementCount(shape)) {
    return { planned: asStored(entry), origin: { kind: 'copy', entry } };
  }
  if (!spec) {
    throw badInput('A tensor that is carried along is stored in a way that cannot be carried along', {
      where: `${entry.span.path}, tensor ${name}`,
      got: entry.encoding.kind,
      hint: 'Bring the checkpoint to plain tensors first: deepseek-convert convert.',
    });
  }
  const plain = elementType(entry);
  const dtype: FloatDType = spec.f32 ? 'f32' : plain === 'f32' || plain === 'f16' ? plain : 'bf16';
  return { planned: { name, shape: wanted, dtype }, origin: { kind: 'values', name } };
}

function asStored({ name, shape, encoding }: TensorEntry): PlannedTensor {
  if (encoding.kind === 'plain') return { name, shape, dtype: encoding.dtype };
  return { name, shape, dtype: 'u8', encoding };
}

export function plannedBytes({ shape, dtype, encoding }: PlannedTensor): number {
  if (encoding?.kind === 'ggml') return encodedBytes(shape, encoding);
  const bits = encoding?.kind === 'opaque' ? encoding.bits : dtypeSize(dtype) * 8;
  return (elementCount(shape) * bits) / 8;
}

/** Writes tensors that are not quantized. */
export async function writeThrough(
  tensors: readonly OutputTensor[],
  writer: TensorSink,
  reader: WeightReader,
  scopeOf: () => Scope,
): Promise<void> {
  for (const { planned, origin } of tensors) {
    if (origin.kind === 'copy') {
      await writer.write(planned.name, fileSource(origin.entry.span));
      continue;
    }
    if (origin.kind !== 'values') throw bug(`${planned.name} is not written as it is`);
    using scope = scopeOf();
    const values = await reader.tensor(origin.name, scope, planned.dtype as FloatDType);
    const out = scope.zeros(planned.dtype, planned.shape);
    copyInto(
      values.shape.reduce((part, size, d) => part.slice(d, 0, size), out),
      values,
    );
    await writer.write(planned.name, out.source());
  }
}
