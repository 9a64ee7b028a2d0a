import { badInput, didYouMean } from '../base/errors.js';
import { readAt } from '../base/files.js';
import type { Checkpoint } from '../checkpoint/types.js';
import type { TensorEntry } from '../formats/types.js';
import { OpenFiles } from './files.js';
import type { StoredWeight } from './stored.js';
import type { Model, TensorSpec } from './types.js';

/** How the checkpoint's tensors and the architecture's expectations meet. */
export interface Coverage {
  /** Names that the architecture computes with. */
  readonly claimed: readonly string[];
  /** Names carried through untouched: MTP layers, vision towers, buffers that old checkpoints hold. */
  readonly carried: readonly string[];
}

/** Buffers that old versions of transformers saved; they are computed from the config. */
const buffers = /\.(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias)$/;

/** Whether a tensor that the architecture does not compute with is carried through untouched. */
export const isCarried = (model: Pick<Model, 'carried'>, name: string): boolean =>
  model.carried.some((prefix) => name.startsWith(prefix)) || buffers.test(name);

const show = (names: readonly string[]): string =>
  names.slice(0, 6).join(', ') + (names.length > 6 ? ` and ${names.length - 6} more` : '');

/** Errors: a tensor that the architecture needs is missing or has another shape; a tensor that nobody claims. */
export function coverage(
  model: Model,
  specs: ReadonlyMap<string, TensorSpec>,
  tensors: ReadonlyMap<string, StoredWeight>,
  checkpoint: Checkpoint,
): Coverage {
  const missing = [...specs.values()].filter((spec) => !spec.optional && !tensors.has(spec.name)).map((s) => s.name);
  const claimed: string[] = [];
  const carried: string[] = [];
  const unknown: string[] = [];
  for (const name of tensors.keys()) {
    if (specs.has(name)) claimed.push(name);
    else if (isCarried(model, name)) carried.push(name);
    else unknown.push(name);
  }
  const where = checkpoint.path;
  if (missing.length > 0) {
    const near = didYouMean(missing[0]!, unknown);
    throw badInput(
      `The checkpoint lacks ${missing.length === 1 ? 'a tensor' : `${missing.length} tensors`} of its architecture`,
      {
        where,
        expected: show(missing),
        got: unknown.length > 0 ? `unknown tensors: ${show(unknown)}` : `${tensors.size} tensors without them`,
        hint:
          near !== undefined
            ? `${near} has a similar name: does config.json (model_type ${model.modelType}) belong to these weights?`
            : 'A shard may be missing, or config.json belongs to another model.',
      },
    );
  }
  for (const name of claimed) checkShape(specs.get(name)!, tensors.get(name)!);
  if (unknown.length > 0) {
    throw badInput('The checkpoint holds tensors that its architecture does not have', {
      where,
      got: show(unknown),
      expected: `tensors of ${model.modelType} with ${model.blocks.length} layers`,
      hint: 'config.json may belong to another model, or say fewer layers than there are.',
    });
  }
  return { claimed, carried };
}

function checkShape(spec: TensorSpec, { shape, linear, entry }: StoredWeight): void {
  const fits = linear
    ? spec.shape.length === 2 &&
      shape[0] === spec.shape[0] &&
      shape[1]! - spec.shape[1]! >= 0 &&
      shape[1]! - spec.shape[1]! < 32
    : shape.length === spec.shape.length && shape.every((d, i) => d === spec.shape[i]);
  if (fits) return;
  throw badInput('A tensor does not have the shape that the config asks for', {
    where: `${entry.span.path}, tensor ${spec.name}`,
    expected: `[${spec.shape.join(', ')}]`,
    got: `[${shape.join(', ')}]`,
    hint: 'config.json and weights do not belong together.',
  });
}

/** Whether two stored tensors have the same form and bytes. */
export async function sameBytes(a: TensorEntry, b: TensorEntry): Promise<boolean> {
  const form = (t: TensorEntry) => JSON.stringify([t.shape, t.strides ?? null, t.encoding.kind === 'plain' ? t.encoding : t.encoding.kind]); // prettier-ignore
  if (form(a) !== form(b) || a.span.bytes !== b.span.bytes) return false;
  if (a.span.path === b.span.path && a.span.offset === b.span.offset) return true;
  const files = new OpenFiles();
  try {
    const [left, right] = [await files.get(a.span.path), await files.get(b.span.path)];
    const step = 1 << 22;
    for (let at = 0; at < a.span.bytes; at += step) {
      const bytes = Math.min(step, a.span.bytes - at);
      const [x, y] = await Promise.all([
        readAt(left.fd, a.span.offset + at, bytes, a.span.path),
        readAt(right.fd, b.span.offset + at, bytes, b.span.path),
      ]);
      if (!x.equals(y)) return false;
    }
    return true;
  } finally {
    await files.close();
  }
}
