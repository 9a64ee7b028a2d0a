import { dtypeSize, elementCount, type DType, type FloatDType } from '../base/dtype.js';
import { stopReading, type JobEnv } from '../backend/env.js';
import type { TensorEntry } from '../formats/types.js';
import { binary, copyInto, reduce } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { TensorLoader } from './load.js';
import type { OpenModel } from './open.js';
import type { StoredWeight } from './stored.js';

/** Numbers of one tensor's weights as they are computed with (decoded). */
export interface TensorStatistics {
  readonly name: string;
  readonly shape: readonly number[];
  readonly values: number;
  readonly zeros: number;
  readonly nonFinite: number;
  /** Of the finite values; null where there are none. `std` divides by their number. */
  readonly mean: number | null;
  readonly std: number | null;
  readonly absmax: number | null;
  /** Largest magnitudes along outputs (rows) and, of matrices, inputs (columns). */
  readonly channels: readonly ChannelStatistics[];
}

export interface ChannelStatistics {
  readonly of: 'input' | 'output';
  readonly count: number;
  /** Channels without a value that is finite and not 0. */
  readonly dead: number;
  /** Median of the channels' absmax. */
  readonly median: number;
  /** Channels of at least `standsOut` medians. */
  readonly outliers: number;
  /** The largest of these, by ratio. */
  readonly worst: readonly { readonly index: number; readonly absmax: number; readonly ratio: number }[];
}

/**
 * So many times the median channel's absmax is an outlier. Of Gaussian weights the largest channel of 10,000 has less
 * than 2 medians, so that 4 are no accident.
 */
export const standsOut = 4;
const keptOutliers = 8;
/** Values of one tensor on the device at once, and tensors at a time: what bounds the memory. */
const defaultAtOnce = 1 << 23;
const inFlight = 3;

export interface Statistics {
  readonly tensors: readonly TensorStatistics[];
  /** What has no weights to look at: tables of integers, opaque bytes. */
  readonly skipped: readonly { readonly name: string; readonly reason: string }[];
}

/**
 * Reads every weight once and looks at it on the device, some rows at a time: memory does not grow with the model, but
 * for tensors that only come as one (packed codes, views, assembled ones).
 * Errors: what reading refuses; interrupted between two pieces.
 */
export async function weightStatistics(
  open: Pick<OpenModel, 'tensors' | 'file'>,
  env: JobEnv,
  atOnce = defaultAtOnce,
): Promise<Statistics> {
  const skipped: { name: string; reason: string }[] = [];
  const gathered: Gathered[] = [];
  const pieces: Piece[] = [];
  for (const stored of open.tensors.values()) {
    const reason = unsuited(stored);
    if (reason !== undefined) {
      skipped.push({ name: stored.name, reason });
      continue;
    }
    const into = new Gathered(stored);
    gathered.push(into);
    pieces.push(...cut(stored, into, atOnce));
  }
  const loader = new TensorLoader({ tensors: new Map(pieces.map((p) => [p.key, p.stored])), file: open.file }, env.device); // prettier-ignore
  let [next, done] = [0, 0];
  let failure: { error: unknown } | undefined;
  const worker = async (): Promise<void> => {
    while (next < pieces.length && !failure && !env.signal.aborted) {
      await look(pieces[next++]!, loader, env).catch((error: unknown) => (failure ??= { error }));
      env.log.progress({ stage: 'stats', done: ++done, total: pieces.length });
    }
  };
  // All workers end before an error is thrown: transfers under way hold memory.
  await Promise.all(Array.from({ length: inFlight }, worker));
  if (failure) throw failure.error;
  stopReading(env);
  return { tensors: gathered.map((one) => one.finish()), skipped };
}

/** Some rows of a tensor, as a tensor of its own. */
interface Piece {
  readonly key: string;
  readonly stored: StoredWeight;
  readonly dtype: FloatDType;
  /** First row, of rows of the matrix that the tensor is seen as. */
  readonly row: number;
  readonly into: Gathered;
}

const floats: ReadonlySet<DType> = new Set(['f32', 'bf16', 'f16', 'f64', 'f8_e4m3', 'f8_e5m2']);

function unsuited({ entry, linear, shape }: StoredWeight): string | undefined {
  if (elementCount(shape) === 0) return 'empty';
  if (linear) return undefined;
  const { encoding } = entry;
  if (encoding.kind === 'opaque') return `stored as ${encoding.name}`;
  return encoding.kind === 'plain' && !floats.has(encoding.dtype) ? `integers (${encoding.dtype})` : undefined;
}

/** Outputs x inputs: experts one below the other, the window of a convolution as inputs. */
function matrixOf(shape: readonly number[]): readonly [rows: number, columns: number] {
  const rows = shape.length === 3 ? shape[0]! * shape[1]! : (shape[0] ?? 1);
  return [rows, elementCount(shape) / rows];
}

function cut(stored: StoredWeight, into: Gathered, atOnce: number): Piece[] {
  const { entry, linear, name } = stored;
  const { encoding, span } = entry;
  const dtype = encoding.kind === 'plain' && !linear && ['f16', 'bf16'].includes(encoding.dtype) ? (encoding.dtype as FloatDType) : 'f32'; // prettier-ignore
  const whole: Piece = { key: name, stored, dtype, row: 0, into };
  const inRows = encoding.kind === 'plain' || encoding.kind === 'ggml' || encoding.kind === 'scaled';
  if (linear || entry.strides || !inRows) return [whole];
  const [rows, columns] = into.matrix;
  const tall = encoding.kind === 'scaled' ? encoding.block[0] : 1;
  const step = Math.max(tall, Math.floor(atOnce / columns / tall) * tall);
  if (span.bytes % rows !== 0) return [whole];
  const pieces: Piece[] = [];
  for (let row = 0; row < rows; row += step) {
    const part = rowsOf(entry, row, Math.min(step, rows - row), columns, span.bytes / rows);
    pieces.push({ ...whole, key: `${name}[${row}]`, stored: { ...stored, shape: part.shape, entry: part }, row });
  }
  return pieces;
}

function rowsOf(entry: TensorEntry, row: number, count: number, columns: number, rowBytes: number): TensorEntry {
  const { encoding, span } = entry;
  const part = { ...entry, shape: [count, columns], span: { path: span.path, offset: span.offset + row * rowBytes, bytes: count * rowBytes } }; // prettier-ignore
  if (encoding.kind !== 'scaled') return part;
  const [tall, wide] = encoding.block;
  const { scale } = encoding;
  const scaleRow = Math.ceil(columns / wide) * (encoding.scaleElement === 'f8_e8m0' ? 1 : dtypeSize(encoding.scaleElement)); // prettier-ignore
  const scaleRows = Math.ceil(count / tall);
  const scaleSpan = { path: scale.span.path, offset: scale.span.offset + (row / tall) * scaleRow, bytes: scaleRows * scaleRow }; // prettier-ignore
  return { ...part, encoding: { ...encoding, scale: { ...scale, shape: [scaleRows, scaleRow], span: scaleSpan } } };
}

async function look({ key, stored, dtype, row, into }: Piece, loader: TensorLoader, env: JobEnv): Promise<void> {
  using scope = new Scope(env.device);
  const loaded = scope.empty(dtype, stored.shape);
  await loader.load([{ name: key, into: loaded }]);
  const columns = into.matrix[1];
  const x = loaded.view(-1, columns);
  const zero = scope.zeros(dtype, [1]);
  const along = (kind: 'sum' | 'sumsq' | 'absmax', of: Tensor, axis: 0 | 1) => reduce(scope, kind, of, axis).float32();
  const [sums, squares, zeros, rowMax, columnMax] = await Promise.all([
    along('sum', x, 1),
    along('sumsq', x, 1),
    along('sum', binary(scope, 'equal', x, zero), 1),
    along('absmax', x, 1),
    along('absmax', x, 0),
  ]);
  // Vectors have means far from 0; values that are not finite, or squares beyond fp32, have no sums.
  if (columns === 1 || ![rowMax, sums, squares].every((list) => list.every(Number.isFinite))) {
    const plain = scope.empty('f32', x.shape);
    copyInto(plain, x);
    into.addValues(row, await plain.float32());
    return;
  }
  into.add(row, { sums, squares, zeros, rowMax, columnMax });
}

interface RowNumbers {
  readonly sums: Float32Array;
  readonly squares: Float32Array;
  readonly zeros: Float32Array;
  readonly rowMax: Float32Array;
  readonly columnMax: Float32Array;
}

/** What is known of one tensor so far. */
class Gathered {
  readonly matrix: readonly [rows: number, columns: number];
  readonly #stored: StoredWeight;
  readonly #rowMax: Float32Array;
  readonly #columnMax: Float32Array;
  #sum = 0;
  #squares = 0;
  #zeros = 0;
  #nonFinite = 0;

  constructor(stored: StoredWeight) {
    this.#stored = stored;
    this.matrix = matrixOf(stored.shape);
    this.#rowMax = new Float32Array(this.matrix[0]);
    this.#columnMax = new Float32Array(this.matrix[1]);
  }

  add(row: number, { sums, squares, zeros, rowMax, columnMax }: RowNumbers): void {
    for (const value of sums) this.#sum += value;
    for (const value of squares) this.#squares += value;
    for (const value of zeros) this.#zeros += value;
    this.#rowMax.set(rowMax, row);
    for (const [c, value] of columnMax.entries()) this.#columnMax[c] = Math.max(this.#columnMax[c]!, value);
  }

  /** One by one, in double precision. */
  addValues(row: number, values: Float32Array): void {
    const columns = this.matrix[1];
    for (const [i, value] of values.entries()) {
      if (!Number.isFinite(value)) {
        this.#nonFinite += 1;
        continue;
      }
      const [r, c, size] = [row + Math.floor(i / columns), i % columns, Math.abs(value)];
      this.#sum += value;
      this.#squares += value * value;
      this.#zeros += value === 0 ? 1 : 0;
      this.#rowMax[r] = Math.max(this.#rowMax[r]!, size);
      this.#columnMax[c] = Math.max(this.#columnMax[c]!, size);
    }
  }

  finish(): TensorStatistics {
    const { name, shape } = this.#stored;
    const values = elementCount(shape);
    const finite = values - this.#nonFinite;
    const mean = this.#sum / finite;
    const std = Math.sqrt(Math.max(0, this.#squares / finite - mean * mean));
    const absmax = this.#rowMax.reduce((a, b) => Math.max(a, b), 0);
    const channels = [channelsOf('output', this.#rowMax)];
    if (shape.length === 2 || shape.length === 3) channels.push(channelsOf('input', this.#columnMax));
    const none = finite === 0;
    return {
      ...{ name, shape, values, zeros: this.#zeros, nonFinite: this.#nonFinite },
      ...(none ? { mean: null, std: null, absmax: null } : { mean, std, absmax }),
      channels,
    };
  }
}

function channelsOf(of: 'input' | 'output', largest: Float32Array): ChannelStatistics {
  const sorted = Float32Array.from(largest).sort();
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  const found = median > 0 ? [...largest.entries()].filter(([, absmax]) => absmax >= standsOut * median) : [];
  const worst = found.sort((a, b) => b[1] - a[1] || a[0] - b[0]).slice(0, keptOutliers);
  return {
    of,
    count: largest.length,
    dead: largest.reduce((n, absmax) => n + (absmax === 0 ? 1 : 0), 0),
    median,
    outliers: found.length,
    worst: worst.map(([index, absmax]) => ({ index, absmax, ratio: absmax / median })),
  };
}
