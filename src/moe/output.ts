import { badInput } from '../base/errors.js';
import { elementCount, type FloatDType } from '../base/dtype.js';
import { bytesSource, fileSource } from '../base/io.js';
import type { CheckpointWriter, PlannedTensor, TensorEntry } from '../checkpoint/types.js';
import type { OpenModel } from '../arch/open.js';
import type { Model } from '../arch/types.js';
import type { WeightReader } from '../arch/weights.js';
import { Scope } from '../tensor/tensor.js';
import type { Container, NetworkNames, Source } from './containers/types.js';
import type { MoeShape } from './shape.js';

/** Where the bytes of one output tensor come from. */
export type Origin =
  /** As they lie in the source. */
  | { readonly kind: 'copy'; readonly entry: TensorEntry }
  /** Read as values and written in the planned precision. */
  | { readonly kind: 'values'; readonly name: string }
  | { readonly kind: 'constant'; readonly value: number }
  /** Made when the block is converted. */
  | { readonly kind: 'made' }
  /** Shares the storage of another tensor. */
  | { readonly kind: 'tied' };

export interface OutputTensor {
  readonly planned: PlannedTensor;
  readonly origin: Origin;
  /** Index of the block; -1: outside the blocks. */
  readonly block: number;
}

export interface OutputOptions {
  readonly container: Container;
  readonly source: Source;
  readonly shape: MoeShape;
  /** What the output is to be read as. */
  readonly mixture: Model;
  readonly dtype: FloatDType;
  readonly torch: boolean;
}

/** All tensors of the output: the dense model's, with each feed-forward part replaced where it stands. */
export function planOutput(open: OpenModel, options: OutputOptions): OutputTensor[] {
  const { model } = open;
  const { source } = options;
  const tensors: OutputTensor[] = [];
  const through = (name: string, block: number) => {
    if (open.tensors.has(name)) tensors.push(throughTensor(open, name, block));
  };
  for (const { name } of model.outer) {
    if (name === 'lm_head.weight' && model.tied) {
      tensors.push(...tiedHead(open, `${model.head.name}.weight`, options));
      continue;
    }
    through(name, -1);
  }
  for (const block of model.blocks) {
    const ffn = source.dense.includes(block.index) ? undefined : block.ffn;
    const replaced = new Set(ffn ? [ffn.gate, ffn.up, ffn.down].map(({ name }) => `${name}.weight`) : []);
    for (const { name } of block.tensors) {
      if (!replaced.has(name)) through(name, block.index);
      else if (name === `${ffn!.gate.name}.weight`) tensors.push(...mixtureTensors(block.name, block.index, options));
    }
    tensors.push(...constants(block.name, block.index, ffn !== undefined, options));
  }
  for (const [name, { sources }] of open.tensors) {
    if (model.carried.some((prefix) => name.startsWith(prefix)) && sources[0] === name) through(name, -1);
  }
  requireComplete(tensors, options.mixture);
  return tensors;
}

/** The head of a tied model, where the output is to have one: in a torch file under a second name of one storage. */
function tiedHead(open: OpenModel, embedding: string, { mixture, torch }: OutputOptions): OutputTensor[] {
  const name = 'lm_head.weight';
  const stored = open.tensors.has(name);
  if (mixture.tied && !(torch && stored)) return [];
  const { planned, origin, block } = throughTensor(open, embedding, -1);
  if (torch) return [{ planned: { ...planned, name, tiedTo: embedding }, origin: { kind: 'tied' }, block }];
  return [{ planned: { ...planned, name }, origin, block }];
}

/** Tensors that replace the feed-forward part of `layer`. */
function mixtureTensors(layer: string, block: number, options: OutputOptions): OutputTensor[] {
  const { container, source, shape, dtype } = options;
  const { hidden } = source.model;
  const made = (name: string, dims: readonly number[], type: FloatDType): OutputTensor => ({
    planned: { name, shape: dims, dtype: type },
    origin: { kind: 'made' },
    block,
  });
  const networks = [
    ...Array.from({ length: shape.routed }, (_, e) => networkTensors(container.expert(layer, e), shape.width, hidden)),
    ...(shape.shared > 0 && container.sharedExpert
      ? [networkTensors(container.sharedExpert(layer), shape.shared * shape.width, hidden)]
      : []),
  ];
  return [
    made(`${container.router(layer)}.weight`, [shape.routed, hidden], 'f32'),
    ...(container.bias ? [made(container.bias(layer), [shape.routed], 'f32')] : []),
    ...networks.flat().map(({ name, shape: dims }) => made(name, dims, dtype)),
  ];
}

/** The tensors of one network. */
const networkTensors = (
  { gate, up, down }: NetworkNames,
  width: number,
  hidden: number,
): { name: string; shape: number[] }[] => [
  { name: `${gate}.weight`, shape: [width, hidden] },
  { name: `${up}.weight`, shape: [width, hidden] },
  { name: `${down}.weight`, shape: [hidden, width] },
];

function constants(layer: string, block: number, converted: boolean, { container, source, dtype }: OutputOptions) {
  return container.constants(layer, source, converted).map(({ name, shape, value }): OutputTensor => ({
    planned: { name, shape, dtype },
    origin: { kind: 'constant', value },
    block,
  }));
}

export function throughTensor(open: OpenModel, name: string, block: number): OutputTensor {
  const { entry, linear, sources } = open.tensors.get(name)!;
  const spec = open.spec(name);
  const whole = entry.name === name && !linear && !entry.strides && sources[0] === name;
  const { encoding } = entry;
  if (whole && encoding.kind === 'plain') {
    return { planned: { name, shape: entry.shape, dtype: encoding.dtype }, origin: { kind: 'copy', entry }, block };
  }
  if (whole && encoding.kind === 'opaque') {
    return { planned: { name, shape: entry.shape, dtype: 'u8', encoding }, origin: { kind: 'copy', entry }, block };
  }
  if (!spec) {
    throw badInput('A tensor that is carried along is stored in a way that cannot be carried along', {
      where: `${entry.span.path}, tensor ${name}`,
      got: encoding.kind,
      hint: 'Bring the checkpoint to plain tensors first: deepseek-convert convert.',
    });
  }
  const plain = encoding.kind === 'plain' ? encoding.dtype : undefined;
  const dtype: FloatDType = spec.f32 ? 'f32' : plain === 'f32' || plain === 'f16' ? plain : 'bf16';
  return { planned: { name, shape: spec.shape, dtype }, origin: { kind: 'values', name }, block };
}

/** The mixture's own architecture must find every tensor in the form that it expects. */
export function requireComplete(tensors: readonly OutputTensor[], mixture: Model): void {
  const planned = new Map(tensors.map((tensor) => [tensor.planned.name, tensor.planned.shape]));
  for (const { name, shape, optional } of [...mixture.outer, ...mixture.blocks.flatMap((block) => block.tensors)]) {
    const got = planned.get(name);
    if (got === undefined && (optional || (mixture.tied && name === 'lm_head.weight'))) continue;
    if (got !== undefined && elementCount(got) === elementCount(shape) && got.every((d, i) => d === shape[i])) continue;
    throw badInput('The model does not fill its new form', {
      where: `tensor ${name}`,
      expected: `[${shape.join(', ')}]`,
      got: got === undefined ? 'none' : `[${got.join(', ')}]`,
    });
  }
}

/** Writes the tensors of a block (or those outside) that no conversion makes. */
export async function writeThrough(
  tensors: readonly OutputTensor[],
  block: number,
  writer: CheckpointWriter,
  reader: WeightReader,
  device: Scope['device'],
): Promise<void> {
  for (const { planned, origin, block: own } of tensors) {
    if (own !== block) continue;
    if (origin.kind === 'copy') await writer.write(planned.name, fileSource(origin.entry.span));
    else if (origin.kind === 'constant') await writer.write(planned.name, constantSource(planned, origin.value));
    else if (origin.kind === 'values') {
      using scope = new Scope(device);
      const values = await reader.tensor(origin.name, scope, planned.dtype as FloatDType);
      await writer.write(planned.name, values.source());
    }
  }
}

function constantSource({ name, shape, dtype }: PlannedTensor, value: number) {
  if (value !== 0) throw badInput(`tensor ${name}: only zeros are written as constants`);
  return bytesSource(new Uint8Array(elementCount(shape) * (dtype === 'f32' ? 4 : 2)));
}
