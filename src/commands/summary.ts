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

/** `stored`: what the checkpoint holds, by the names that architectures use. */
export function summarize(model: Model, stored: ReadonlyMap<string, StoredWeight>): ModelSummary {
  const specs = [...model.outer, ...model.blocks.flatMap((block) => block.tensors)];
  const known = new Set(specs.map(({ name }) => name));
  const present = specs.filter((spec) => spec.optional !== true || stored.has(spec.name));
  const total = sum(present.filter(({ below }) => below === undefined).map(({ shape }) => elementCount(shape)));
  const cached = 2 * sum(model.blocks.map(({ attention }) => attention.cached?.(model.context) ?? 0));
  let sleeping = 0;
  let int4 = 2 * total;
  for (const block of model.blocks) {
    const linears = block.linears.flat();
    const inExperts = sum(linears.filter(({ role }) => role === 'expert').map(weights));
    if (block.moe) sleeping += inExperts * (1 - block.moe.active / block.moe.experts);
    for (const linear of linears.filter(quantizable)) {
      const groups = Math.ceil(linear.inFeatures / 128);
      int4 += linear.outFeatures * groups * (64 + 2) - 2 * weights(linear);
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
    carried: [...stored.keys()].filter((name) => !known.has(name) && isCarried(model, name)),
    problems: compare(specs, stored, model),
  };
}

const sum = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0);
const weights = ({ inFeatures, outFeatures }: LinearSpec): number => inFeatures * outFeatures;

function compare(specs: readonly TensorSpec[], stored: ReadonlyMap<string, StoredWeight>, model: Model): string[] {
  const problems: string[] = [];
  const tell = (names: readonly string[], what: string) => {
    if (names.length === 0) return;
    const more = names.length > 3 ? ` and ${names.length - 3} more` : '';
    problems.push(`${what}: ${names.slice(0, 3).join(', ')}${more}.`);
  };
  const missing = specs.filter((spec) => spec.optional !== true && !stored.has(spec.name));
  tell(missing.map(({ name }) => name), 'The architecture expects tensors that are not there'); // prettier-ignore
  const otherShape = specs.flatMap(({ name, shape }) => {
    const own = stored.get(name);
    // Quantized layouts round widths up.
    return own !== undefined && own.linear === undefined && own.shape.join() !== shape.join()
      ? [`${name} [${own.shape.join(', ')}], expected [${shape.join(', ')}]`]
      : [];
  });
  tell(otherShape, 'Shapes differ from the config');
  const known = new Set(specs.map(({ name }) => name));
  const unknown = [...stored.keys()].filter((name) => !known.has(name) && !isCarried(model, name));
  tell(unknown, 'Tensors that the architecture does not know');
  return problems;
}

/** `bf16`, `q4_k`, `f8_e4m3 x 128x128 scales`: for tables. */
export function encodingName({ encoding }: TensorEntry): string {
  switch (encoding.kind) {
    case 'plain':
      return encoding.dtype;
    case 'ggml':
      return encoding.type;
    case 'scaled':
      return `${encoding.element}/${encoding.block.join('x')}`;
    case 'assembled':
      return encodingName(encoding.parts[0]!.entry);
    case 'opaque':
      return encoding.name.toLowerCase();
  }
}
