import { elementCount } from '../base/dtype.js';
import { buildModel } from '../arch/registry.js';
import type { Checkpoint, TensorEntry } from '../checkpoint/types.js';
import { encodedBytes } from '../formats/ggml.js';
import type { LinearFactor as Factor } from '../formats/types.js';
import type { Fusion, Reshaped } from './fusion.js';

/**
 * Names of the factors of a module, the first applied first: linears in a row as PyTorch numbers them (and our reader
 * those of ONNX graphs), ASVD's and SVD-LLM's.
 */
function candidates(module: string, has: (name: string) => boolean): string[][] {
  const numbered: string[] = [];
  while (has(`${module}.${numbered.length}.weight`)) numbered.push(`${module}.${numbered.length}`);
  const named = module.replace(/_proj$/, '');
  return [numbered, [`${module}.BLinear`, `${module}.ALinear`], [`${named}_v_proj`, `${named}_u_proj`]].filter(
    (names) => names.length > 1 && names.every((name) => has(`${name}.weight`)),
  );
}

const bytesOf = ({ shape, encoding }: TensorEntry): number => encodedBytes(shape, encoding);
const sizeOf = ({ weight, bias }: Factor): number => bytesOf(weight) + (bias ? bytesOf(bias) : 0);

/**
 * Consecutive linears without anything between them that stand where the architecture has one: they become that one
 * (W2 W1 x + W2 b1 + b2) where it is smaller than they are. Others stay, with the reason.
 * Errors: unknown architecture or settings.
 */
export function foldFactors(checkpoint: Checkpoint): Reshaped {
  const { tensors: stored, config } = checkpoint;
  const model = buildModel(config, checkpoint.configPath ?? checkpoint.path, (name) => stored.has(name));
  const tensors = new Map(stored);
  const fusions: Fusion[] = [];
  const notes: string[] = [];
  const specs = [...model.outer, ...model.blocks.flatMap((block) => block.tensors)];
  const names = new Set(specs.map(({ name }) => name));
  for (const { name, shape } of specs) {
    const module = name.replace(/\.weight$/, '');
    if (module === name || shape.length !== 2 || stored.has(name)) continue;
    const [modules] = candidates(module, (one) => stored.has(one) && !names.has(one));
    if (modules === undefined) continue;
    const factors = modules.map((part): Factor => ({
      weight: stored.get(`${part}.weight`)!,
      bias: stored.get(`${part}.bias`),
    }));
    const refusal = refuse(factors, shape as [number, number], names.has(`${module}.bias`));
    if (refusal !== undefined) {
      notes.push(`${modules.join(' and ')} are not folded: ${refusal}.`);
      continue;
    }
    for (const part of modules) for (const kind of ['weight', 'bias']) tensors.delete(`${part}.${kind}`);
    const product = (part: 'weight' | 'bias', dims: readonly number[]): TensorEntry => ({
      ...{ name: `${module}.${part}`, shape: dims, span: factors[0]!.weight.span },
      encoding: { kind: 'product', part, factors },
    });
    tensors.set(name, product('weight', shape));
    const biased = factors.some(({ bias }) => bias);
    if (biased) tensors.set(`${module}.bias`, product('bias', [shape[0]!]));
    fusions.push({
      ...{ kind: 'fold', from: modules, into: [module], parts: [factors] },
      bytes: {
        before: factors.reduce((sum, factor) => sum + sizeOf(factor), 0),
        after: folded(factors, shape, biased),
      },
    });
  }
  if (fusions.length + notes.length === 0) notes.push('There are no consecutive linears to fold.');
  return { checkpoint: { ...checkpoint, tensors }, fusions, notes };
}

/** Bytes of the one linear, in the precision of the first factor. */
const folded = ([first]: readonly Factor[], [n, k]: readonly number[], biased: boolean): number =>
  (bytesOf(first!.weight) / elementCount(first!.weight.shape)) * n! * (k! + (biased ? 1 : 0));

function refuse(factors: readonly Factor[], [n, k]: readonly [number, number], takesBias: boolean): string | undefined {
  let width = k;
  for (const { weight, bias } of factors) {
    const [rows, columns] = weight.shape;
    if (weight.shape.length !== 2 || columns !== width) return `${weight.name} takes ${columns} columns, not ${width}`;
    if (weight.encoding.kind === 'opaque') return `${weight.name} is stored in a way that cannot be computed with`;
    if (bias && (bias.shape.length !== 1 || bias.shape[0] !== rows)) return `${bias.name} does not fit its matrix`;
    width = rows!;
  }
  if (width !== n) return `they give ${width} rows, where ${n} are expected`;
  const biased = factors.some(({ bias }) => bias);
  if (biased && !takesBias) return 'they have a bias, which the architecture has not there';
  const before = factors.reduce((sum, factor) => sum + sizeOf(factor), 0);
  const after = folded(factors, [n, k], biased);
  return after < before ? undefined : `one matrix takes ${after} bytes, they take ${before}`;
}
