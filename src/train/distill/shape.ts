import { badInput, badUsage } from '../../base/errors.js';
import { elementCount } from '../../base/dtype.js';
import { short } from '../../base/text.js';
import type { OpenModel } from '../../arch/open.js';
import { buildModel } from '../../arch/registry.js';
import type { Model } from '../../arch/types.js';

/** Sizes in which a student may differ from its teacher; the heads' width stays. */
export interface Shape {
  readonly layers: number;
  readonly hidden: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly intermediate: number;
}

/** What the user asks for: sizes, and how many parameters where sizes are left open (below 1: a share of the teacher's). */
export interface ShapeRequest extends Partial<Shape> {
  readonly targetParams?: number;
}

/** Architectures whose blocks are one grouped attention and one gated feed-forward part, with these names. */
const supported = ['llama', 'mistral', 'qwen2', 'qwen3'];

/** Error: a student of this teacher cannot be cut. */
export function requirePrunable({ checkpoint, model }: OpenModel): void {
  if (supported.includes(model.modelType)) return;
  const mixture = model.blocks.some(({ moe }) => moe);
  const latent = model.blocks.some(({ attention }) => attention.latent);
  const reason = mixture
    ? 'its layers have experts: which of them a student keeps is not decided here'
    : latent
      ? 'its attention goes through latent vectors, whose widths cannot be cut head by head'
      : 'its layers have parts that have no rule for being cut';
  throw badInput('No student can be cut from this architecture', {
    where: checkpoint.path,
    got: `model_type ${model.modelType}: ${reason}`,
    expected: `a dense model: ${supported.join(', ')}`,
  });
}

export const shapeOf = ({ blocks, hidden, heads, kvHeads }: Model): Shape => ({
  ...{ layers: blocks.length, hidden, heads, kvHeads },
  intermediate: blocks[0]!.ffn!.gate.outFeatures,
});

/** Parameters of a model; a tied head counts once. */
export const parametersOf = ({ outer, blocks }: Model): number =>
  [...outer, ...blocks.flatMap(({ tensors }) => tensors)].reduce(
    (sum, { shape, optional }) => sum + (optional ? 0 : elementCount(shape)),
    0,
  );

/** config.json of a student of `shape` whose layers are the teacher's layers `kept`. */
export function studentConfig(teacher: Model, shape: Shape, kept: readonly number[]): Record<string, unknown> {
  const { quantization_config: _, ...config } = teacher.config;
  const windows = kept.map((i) => teacher.blocks[i]!.window);
  // Which layers slide may go by their index: those of the student have other ones.
  const byLayer = config.layer_types !== undefined || new Set(teacher.blocks.map(({ window }) => window)).size > 1;
  return {
    ...config,
    num_hidden_layers: shape.layers,
    hidden_size: shape.hidden,
    num_attention_heads: shape.heads,
    num_key_value_heads: shape.kvHeads,
    ...((shape.hidden !== shape.heads * teacher.headDim || config.head_dim !== undefined) && {
      head_dim: teacher.headDim,
    }),
    intermediate_size: shape.intermediate,
    ...(byLayer && { layer_types: windows.map((window) => (window ? 'sliding_attention' : 'full_attention')) }),
  };
}

export const studentModel = (teacher: Model, shape: Shape, kept: readonly number[]): Model =>
  buildModel(studentConfig(teacher, shape, kept), "the student's configuration");

/**
 * The student's sizes: as asked, the teacher's where nothing is asked, or with a number of parameters those that come
 * within 1% of it (5% where there are none) and lose least by a weighted sum of squared log ratios. Widths are cheap,
 * heads dearer, layers dearest: cutting width costs less than cutting depth (Muralidharan et al. 2024, section 4).
 * Errors: sizes beyond the teacher's, heads that do not divide, a number of parameters that cannot be reached.
 */
export function chooseShape(teacher: Model, request: ShapeRequest): Shape {
  const full = shapeOf(teacher);
  const asked = completed(full, request);
  if (request.targetParams === undefined) return { ...full, ...asked };
  const all = parametersOf(teacher);
  const target = request.targetParams < 1 ? Math.round(request.targetParams * all) : request.targetParams;
  if (target > all) {
    throw badUsage('The student is to have more parameters than its teacher', {
      got: `--target-params ${short(target)}`,
      expected: `at most ${short(all)}`,
    });
  }
  let best: { shape: Shape; off: number; loss: number } | undefined;
  let nearest = Infinity;
  for (const { shape, parameters } of candidates(teacher, full, asked, target)) {
    const off = Math.abs(parameters / target - 1);
    if (Math.abs(parameters - target) < Math.abs(nearest - target)) nearest = parameters;
    if (off > 0.05) continue;
    const loss = lossOf(full, shape);
    const [close, wasClose] = [off <= 0.01, best !== undefined && best.off <= 0.01];
    if (!best || (close === wasClose ? loss < best.loss : close)) best = { shape, off, loss };
  }
  if (best) return best.shape;
  throw badUsage('No student has this number of parameters', {
    got: `--target-params ${short(target)}`,
    expected: `about ${short(nearest)}, which is nearest`,
    hint: 'Embedding and head keep the whole vocabulary. Name other sizes, or fewer of them.',
  });
}

/** Sizes that the user gave, checked; heads and key/value heads follow from each other. */
function completed(full: Shape, { targetParams: _, ...given }: ShapeRequest): Partial<Shape> {
  for (const [key, flag] of Object.entries(flags) as [keyof Shape, string][]) {
    const size = given[key];
    if (size === undefined || size <= full[key]) continue;
    throw badUsage(`${flag} is more than the teacher has`, { got: String(size), expected: `at most ${full[key]}` });
  }
  const group = full.heads / full.kvHeads;
  const { heads, kvHeads } = given;
  if (heads === undefined) return kvHeads === undefined ? given : { ...given, heads: kvHeads * group };
  const groups = kvHeads ?? heads / group;
  if (!Number.isInteger(groups) || heads % groups !== 0 || heads / groups > group) {
    throw badUsage('Heads and key/value heads do not go together', {
      got: `--heads ${heads}${kvHeads === undefined ? '' : ` --kv-heads ${kvHeads}`}`,
      expected:
        kvHeads === undefined
          ? `a multiple of ${group}: so many heads of the teacher share keys and values, and stay together`
          : `a multiple of --kv-heads, at most ${group} times as many`,
    });
  }
  return { ...given, kvHeads: groups };
}

const flags: Readonly<Record<keyof Shape, string>> = {
  layers: '--layers',
  hidden: '--hidden',
  heads: '--heads',
  kvHeads: '--kv-heads',
  intermediate: '--intermediate',
};

/** Multiples of a step that leaves whole groups for INT4 where the model is large; and the size itself. */
function steps(size: number): { step: number; sizes: number[] } {
  const step = Math.min(128, Math.max(1, 2 ** Math.floor(Math.log2(size / 16))));
  const sizes = Array.from({ length: Math.floor(size / step) }, (_, i) => (i + 1) * step);
  return { step, sizes: sizes.at(-1) === size ? sizes : [...sizes, size] };
}

/** Shapes around the target: all open sizes but the intermediate one, which is then what is missing. */
function* candidates(
  teacher: Model,
  full: Shape,
  asked: Partial<Shape>,
  target: number,
): Generator<{ shape: Shape; parameters: number }> {
  const upTo = (n: number) => Array.from({ length: n }, (_, i) => i + 1);
  const { step } = steps(full.intermediate);
  for (const hidden of asked.hidden === undefined ? steps(full.hidden).sizes : [asked.hidden]) {
    for (const kvHeads of asked.kvHeads === undefined ? upTo(full.kvHeads) : [asked.kvHeads]) {
      const heads = asked.heads ?? (kvHeads * full.heads) / full.kvHeads;
      // Parameters are linear in the layers, and a layer's in its intermediate size.
      const one = (layers: 1 | 2, intermediate: number) => {
        const kept = Array.from({ length: layers }, () => 0);
        return parametersOf(studentModel(teacher, { layers, hidden, heads, kvHeads, intermediate }, kept));
      };
      const [small, next, deep] = [one(1, 1), one(1, 2), one(2, 1)];
      const slope = next - small;
      for (const layers of asked.layers === undefined ? upTo(full.layers) : [asked.layers]) {
        const base = small + (layers - 1) * (deep - small) - layers * slope;
        const wanted = (target - base) / (layers * slope);
        const around = [Math.floor(wanted / step) * step, Math.ceil(wanted / step) * step, full.intermediate];
        for (const intermediate of asked.intermediate === undefined ? new Set(around) : [asked.intermediate]) {
          if (intermediate < 1 || intermediate > full.intermediate) continue;
          const shape = { layers, hidden, heads, kvHeads, intermediate };
          yield { shape, parameters: base + layers * slope * intermediate };
        }
      }
    }
  }
}

function lossOf(full: Shape, shape: Shape): number {
  const of = (key: keyof Shape) => Math.log(shape[key] / full[key]) ** 2;
  return of('hidden') + of('intermediate') + 4 * of('kvHeads') + 8 * of('layers');
}
