import { isCarried } from '../arch/coverage.js';
import type { StoredWeight } from '../arch/stored.js';
import type { Model, TensorSpec } from '../arch/types.js';
import type { TensorEntry } from '../checkpoint/types.js';
import { elementCount } from '../base/dtype.js';
import type { LinearSpec } from '../nn/calls.js';

/** Numbers of a model that follow from its headers. Sizes are bytes. */
export interface ModelSummary {
  readonly parameters: { readonly total: number; readonly active: number };
  readonly memory: {
    readonly bf16: number;
    /** Linears of the blocks at 4 bits with a bf16 scale per 128 inputs; the rest as in bf16. */
    readonly int4: number;
    /** The cache of one sequence of the model's context at bf16, and of one token on average. */
    readonly kvCache: number;
    readonly kvCachePerToken: number;
  };
  readonly experts: ExpertSummary | undefined;
  /** Tensors that no layer computes with and that every output keeps as they are: vision towers, drafting layers. */
  readonly carried: readonly string[];
  /** What does not fit between checkpoint and architecture, one sentence each. */
  readonly problems: readonly string[];
}

export interface ExpertSummary {
  readonly routed: number;
  readonly active: number;
  readonly shared: number;
  readonly width: number;
  /** Indices of the blocks with experts. */
  readonly layers: readonly number[];
}

const quantizable = ({ role }: LinearSpec): boolean => role !== 'router' && role !== 'head' && role !== 'other';

/** What a checkpoint holds, by the names that architectures use. */
export type Held = ReadonlyMap<string, Pick<StoredWeight, 'shape' | 'linear'>>;

export function summarize(model: Model, stored: Held): ModelSummary {
  const { total, others, problems } = compare(model, stored);
  const [carried, unknown] = [others.filter((name) => isCarried(model, name)), others.filter((name) => !isCarried(model, name))]; // prettier-ignore
  tell(problems, unknown, 'Tensors that the architecture does not know');
  const cached = 2 * sum(model.blocks.map(({ attention }) => attention.cached?.(model.context) ?? 0));
  let sleeping = 0;
  let int4 = 2 * total;
  for (const { moe, linears } of model.blocks) {
    const idle = moe ? 1 - moe.active / moe.experts : 0;
    for (const together of linears) {
      for (const linear of together) {
        const weights = linear.inFeatures * linear.outFeatures;
        if (linear.role === 'expert') sleeping += weights * idle;
        if (quantizable(linear)) int4 += linear.outFeatures * Math.ceil(linear.inFeatures / 128) * (64 + 2) - 2 * weights; // prettier-ignore
      }
    }
  }
  const first = model.blocks.find((block) => block.moe)?.moe;
  return {
    parameters: { total, active: Math.round(total - sleeping) },
    memory: { bf16: 2 * total, int4, kvCache: cached, kvCachePerToken: Math.round(cached / model.context) },
    experts: first && {
      routed: first.experts,
      active: first.active,
      shared: first.shared,
      width: first.width,
      layers: model.blocks.filter((block) => block.moe).map((block) => block.index),
    },
    carried,
    problems,
  };
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);

interface Comparison {
  /** Parameters that are there, or must be. */
  readonly total: number;
  /** Names of tensors that no layer computes with. */
  readonly others: readonly string[];
  readonly problems: string[];
}

function* specsOf({ outer, blocks }: Model): Generator<readonly TensorSpec[]> {
  yield outer;
  for (const { tensors } of blocks) yield tensors;
}

/** In one pass: there may be 100,000 tensors. */
function compare(model: Model, stored: Held): Comparison {
  const [missing, otherShape]: string[][] = [[], []];
  let [total, found] = [0, 0];
  for (const specs of specsOf(model)) {
    for (const { name, shape, optional, below } of specs) {
      const own = stored.get(name);
      if (own !== undefined || optional !== true) total += below === undefined ? elementCount(shape) : 0;
      if (own === undefined) {
        if (optional !== true) missing!.push(name);
        continue;
      }
      found++;
      // Quantized layouts round widths up.
      if (own.linear === undefined && !sameShape(own.shape, shape)) {
        otherShape!.push(`${name} [${own.shape.join(', ')}], expected [${shape.join(', ')}]`);
      }
    }
  }
  const known = new Set(
    found === stored.size ? [] : [...specsOf(model)].flatMap((specs) => specs.map(({ name }) => name)),
  );
  const others = found === stored.size ? [] : [...stored.keys()].filter((name) => !known.has(name));
  const problems: string[] = [];
  tell(problems, missing!, 'The architecture expects tensors that are not there');
  tell(problems, otherShape!, 'Shapes differ from the config');
  return { total, others, problems };
}

const sameShape = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((size, i) => size === b[i]);

function tell(problems: string[], names: readonly string[], what: string): void {
  if (names.length === 0) return;
  const more = names.length > 3 ? ` and ${names.length - 3} more` : '';
  problems.push(`${what}: ${names.slice(0, 3).join(', ')}${more}.`);
}

/** `bf16`, `q4_k`, `f8_e4m3 x 128x128 scales`: for tables. */
export function encodingName({ encoding }: TensorEntry): string {
  switch (encoding.kind) {
    case 'plain':
      return encoding.dtype;
    case 'ggml':
      return encoding.type;
    case 'scaled':
      return `${encoding.element}/${encoding.block[0]}x${encoding.block[1]}`;
    case 'assembled':
      return encodingName(encoding.parts[0]!.entry);
    case 'rotated':
      return encodingName(encoding.of);
    case 'product':
      return encodingName(encoding.factors[0]!.weight);
    case 'opaque':
      return encoding.name.toLowerCase();
  }
}
