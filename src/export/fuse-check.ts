import { ConvertError } from '../base/errors.js';
import { Random } from '../base/rng.js';
import type { JobEnv } from '../backend/env.js';
import { OpenFiles } from '../arch/files.js';
import { TensorLoader } from '../arch/load.js';
import { storedWeights, type StoredWeight } from '../arch/stored.js';
import { openCheckpoint } from '../checkpoint/open.js';
import type { TensorEntry } from '../checkpoint/types.js';
import { detectLayout } from '../layout/detect.js';
import { gemm } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { ConvertPlan } from './convert-plan.js';
import type { Fuse, Fusion } from './fusion.js';

/** What was fused, split or folded, and how exactly the output computes it. */
export interface FusionReport {
  readonly kind: Fuse;
  readonly from: readonly string[];
  readonly into: readonly string[];
  readonly bytes: Fusion['bytes'];
  /** Largest difference of the outputs on random inputs, against the largest output. */
  readonly error: number;
  /** The largest that counts as exact: rounding once to the output's element type, and that of fp32 sums. */
  readonly tolerance: number;
}

/** Rows of random input. */
const rows = 8;
/** Relative rounding of one number, by element type; sums of fp32 products in another order stay below that of f32. */
const rounding: Readonly<Record<string, number>> = { f32: 1e-5, f16: 2 ** -11, bf16: 2 ** -8 };

/**
 * Reads what was written as any reader would, and compares each fused, split or folded linear with what it was made of:
 * native products of both with random inputs.
 * Error (`gate`): one computes something else than before.
 */
export async function checkFusions(plan: ConvertPlan, path: string, env: JobEnv): Promise<FusionReport[]> {
  const { fusions = [] } = plan;
  const written = await openCheckpoint(path);
  const files = new OpenFiles();
  const reports: FusionReport[] = [];
  try {
    const stored = storedWeights(written.tensors, detectLayout(written.config, path));
    const after = new Side(stored, (name) => files.get(name), env);
    const before = new Side(plan.source.tensors, plan.source.file, env);
    for (const fusion of fusions) {
      using scope = new Scope(env.device);
      const { kind, from, into, bytes } = fusion;
      const tolerance = Math.max(
        ...into.map((module) => rounding[precisionOf(stored.get(`${module}.weight`)!)] ?? rounding.f32!),
      );
      const want = await (fusion.parts ? before.chains(scope, fusion.parts) : before.together(scope, from));
      const error = largestDifference(await after.together(scope, into), want);
      if (!(error <= tolerance)) {
        throw new ConvertError('gate', `${into.join(', ')} computes something else than ${from.join(', ')}`, {
          where: path,
          expected: `a difference of at most ${tolerance.toExponential(1)} of the largest output`,
          got: error.toExponential(2),
          hint: `Leave ${kind} out of --fuse, or keep more digits with --dtype f32.`,
        });
      }
      reports.push({ kind, from, into, bytes, error, tolerance });
    }
  } finally {
    await files.close();
    await written.close();
  }
  return reports;
}

/** Linears of one checkpoint, applied to inputs that depend on nothing but their width. */
class Side {
  constructor(
    readonly tensors: ReadonlyMap<string, StoredWeight>,
    readonly file: ConvertPlan['source']['file'],
    readonly env: JobEnv,
  ) {}

  /** Outputs of several linears side by side: f32 [rows, sum N], on the host. */
  async together(scope: Scope, modules: readonly string[]): Promise<Float32Array> {
    const outputs: Tensor[] = [];
    for (const module of modules) {
      const weight = this.tensors.get(`${module}.weight`)!;
      const x = input(scope, weight.linear ? weight.linear.shape[1] : weight.shape[1]!);
      outputs.push(await this.#apply(scope, x, weight, this.tensors.get(`${module}.bias`)));
    }
    return await sideBySide(outputs);
  }

  /** The same of linears that are rows of factors. */
  async chains(scope: Scope, parts: NonNullable<Fusion['parts']>): Promise<Float32Array> {
    const as = (entry: TensorEntry): StoredWeight => {
      const { name, shape, span } = entry;
      return { name, shape, entry, sources: [name], files: [span.path] };
    };
    const outputs: Tensor[] = [];
    for (const factors of parts) {
      let x = input(scope, factors[0]!.weight.shape[1]!);
      for (const { weight, bias } of factors) x = await this.#apply(scope, x, as(weight), bias && as(bias));
      outputs.push(x);
    }
    return await sideBySide(outputs);
  }

  async #apply(scope: Scope, x: Tensor, weight: StoredWeight, bias: StoredWeight | undefined): Promise<Tensor> {
    const tensors = new Map([weight, ...(bias ? [bias] : [])].map((one) => [one.name, one]));
    const loader = new TensorLoader({ tensors, file: this.file }, this.env.device);
    const [n, k] = weight.shape as [number, number];
    const w = scope.empty('f32', [n, k]);
    const b = bias && scope.empty('f32', [n]);
    await loader.load([{ name: weight.name, into: w }, ...(bias && b ? [{ name: bias.name, into: b }] : [])]);
    return gemm(scope, x, w.transpose(), b ? { bias: b } : {});
  }
}

/** The element type in which a linear's numbers, or the scales of its codes, are stored. */
function precisionOf({ entry, linear }: StoredWeight): string {
  const of = ({ encoding }: TensorEntry): string => {
    if (encoding.kind === 'assembled') return of(encoding.parts[0]!.entry);
    return encoding.kind === 'plain' ? encoding.dtype : encoding.kind;
  };
  return of(linear?.parts.get('weight_scales') ?? entry);
}

function input(scope: Scope, width: number): Tensor {
  const random = new Random(width);
  return scope.from(
    'f32',
    [rows, width],
    Float32Array.from({ length: rows * width }, () => 2 * random.uniform() - 1),
  );
}

async function sideBySide(parts: readonly Tensor[]): Promise<Float32Array> {
  const width = parts.reduce((sum, part) => sum + part.dim(1), 0);
  const out = new Float32Array(rows * width);
  let at = 0;
  for (const part of parts) {
    const [values, n] = [await part.float32(), part.dim(1)];
    for (let r = 0; r < rows; r++) out.set(values.subarray(r * n, (r + 1) * n), r * width + at);
    at += n;
  }
  return out;
}

function largestDifference(got: Float32Array, want: Float32Array): number {
  if (got.length !== want.length) return Infinity;
  let [difference, largest] = [0, Number.MIN_VALUE];
  for (const [i, value] of want.entries()) {
    const d = Math.abs(got[i]! - value);
    if (!(d <= difference)) difference = d; // NaN counts
    largest = Math.max(largest, Math.abs(value));
  }
  return difference / largest;
}
