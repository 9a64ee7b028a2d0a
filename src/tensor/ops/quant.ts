import { noResource } from '../../base/errors.js';
import type { FloatDType } from '../../base/dtype.js';
import type { Scope, Tensor } from '../tensor.js';
import { cast } from './math.js';
import { ensure, ensureContiguous, ensureDType, ensureFloat, ensureRows, ensureShape } from './check.js';

/** H f32 [K,K] (or [E,K,K] with offsets i32 [E+1]) += alpha X'X, lower triangle; X float [T,K]. */
export function hessianAdd(
  h: Tensor,
  x: Tensor,
  { alpha = 1, offsets, rowWeight }: { alpha?: number; offsets?: Tensor; rowWeight?: Tensor } = {},
): void {
  const k = x.dim(1);
  ensureShape('hessian_add', 'H', h, ...(offsets ? [offsets.dim(0) - 1, k, k] : [k, k]));
  ensureFloat('hessian_add', x);
  h.device.run('hessian_add', [h, x, offsets, rowWeight], [], [alpha]);
}

/** In place: the upper triangle becomes the lower one's mirror. */
export const symmetrize = (h: Tensor): void => h.device.run('symmetrize', [h], [], []);

/**
 * A = H + damp mean(diag H) I = F F'; F lower, or upper (`reversed`, as LDLQ wants it). H f32 [K,K] or [E,K,K], lower
 * triangle read. info i32 [E]: 0, or 1 + the first non-positive pivot.
 */
export function cholesky(s: Scope, h: Tensor, damp: number, reversed = false): { factor: Tensor; info: Tensor } {
  ensureDType('cholesky', 'f32', h);
  const factor = s.empty('f32', h.shape);
  const info = s.empty('i32', [h.shape.length === 3 ? h.dim(0) : 1]);
  h.device.run('cholesky', [factor, info, h], [reversed ? 1 : 0], [damp]);
  return { factor, info };
}

/** Damped factor of one H, retried with ten times the damping while a pivot is not positive. */
export async function choleskyRetry(s: Scope, h: Tensor, damp: number, reversed = false) {
  for (let d = damp; d <= 100; d = Math.max(d, 1e-4) * 10) {
    const { factor, info } = cholesky(s, h, d, reversed);
    const bad = (await info.int32()).some((i) => i !== 0);
    s.free(info);
    if (!bad) return { factor, damp: d };
    s.free(factor);
  }
  throw noResource('A Hessian could not be factored even with heavy damping', {
    hint: 'Its calibration inputs are not finite: validate the source checkpoint.',
  });
}

/** X of A X = B with F from `cholesky`; B f32 [K,M]. */
export function choleskySolve(s: Scope, factor: Tensor, b: Tensor, reversed = false): Tensor {
  const x = s.empty('f32', b.shape);
  x.device.run('cholesky_solve', [x, factor, b], [reversed ? 1 : 0], []);
  return x;
}

/** Integer codes low..high on a grid per row and group: w ~ (code - zero) scale. */
export interface Grid {
  /** f32 [N,G] (or [E,N,G]). */
  scale: Tensor;
  /** f32 [N,G]; absent: symmetric. */
  zero?: Tensor | undefined;
  low: number;
  high: number;
  group: number;
  /** i32 [K] (or [E,K]): the group of each column; absent: j / group. */
  columnGroup?: Tensor | undefined;
}
const gridTensors = (g: Grid) => [g.scale, g.zero, g.columnGroup] as const;
const gridInts = (g: Grid) => [g.low, g.high, g.group];

/** LDLQ sweep: codes i8, Q f32 (dequantized), error f32 [N]; W f32 [N,K], R upper from `cholesky(reversed)`. */
export function ldlq(s: Scope, w: Tensor, r: Tensor, grid: Grid): { codes: Tensor; q: Tensor; error: Tensor } {
  ensureDType('ldlq', 'f32', w, r, grid.scale, grid.zero);
  ensureShape('ldlq', 'R', r, ...w.shape.slice(0, -2), w.dim(-1), w.dim(-1));
  const codes = s.empty('i8', w.shape);
  const q = s.empty('f32', w.shape);
  const error = s.empty('f32', w.shape.slice(0, -1));
  w.device.run('ldlq', [codes, q, w, r, ...gridTensors(grid), error], gridInts(grid), []);
  return { codes, q, error };
}

export interface ScaleSearchOptions {
  low: number;
  high: number;
  group: number;
  asymmetric?: boolean;
  /** f32 [K] ([E,K] for stacked experts): activation energy per column (the Hessian's diagonal). */
  weight?: Tensor;
  points?: number;
  from?: number;
  to?: number;
  freeSign?: boolean;
}

/** The grid that minimises the weighted squared error of rounding, per row and group of W f32 [N,K]. */
export function scaleSearch(s: Scope, w: Tensor, o: ScaleSearchOptions): Grid {
  ensureFloat('scale_search', w);
  ensureDType('scale_search', 'f32', o.weight);
  const { low, high, group } = o;
  const shape = [...w.shape.slice(0, -1), Math.ceil(w.dim(-1) / group)];
  const scale = s.empty('f32', shape);
  const zero = o.asymmetric ? s.empty('f32', shape) : undefined;
  const ints = [low, high, group, o.points ?? 1, +!!o.freeSign];
  w.device.run('scale_search', [scale, zero, w, o.weight], ints, [o.from ?? 1, o.to ?? 1]);
  return { scale, zero, low, high, group };
}

/** Codes i8 of W float [N,K] (or [E,N,K]), each value on its own. */
export function quantize(s: Scope, w: Tensor, grid: Grid): Tensor {
  ensureFloat('quantize', w);
  ensureDType('quantize', 'f32', grid.scale, grid.zero);
  const codes = s.empty('i8', w.shape);
  w.device.run('quantize', [codes, w, ...gridTensors(grid)], gridInts(grid), []);
  return codes;
}

/** (code - zero) scale. */
export function dequantize(s: Scope, codes: Tensor, grid: Grid, dtype: FloatDType = 'f32'): Tensor {
  const w = s.empty(dtype, codes.shape);
  w.device.run('dequantize', [w, codes, ...gridTensors(grid)], [grid.group], []);
  return w;
}

export interface RefitOptions {
  /** Of the mean diagonal of each row's system. */
  damp?: number;
  /** (W - Q) H f32 [N,K], where it is known already. */
  gradient?: Tensor | undefined;
}

/** Least-squares refit of the scales under H (symmetric, f32 [K,K]) with the codes fixed: the new scales. */
export function scaleRefit(
  s: Scope,
  codes: Tensor,
  w: Tensor,
  h: Tensor,
  grid: Grid,
  { damp = 1e-6, gradient }: RefitOptions = {},
): Tensor {
  ensureDType('scale_refit', 'f32', w, h, grid.scale, grid.zero, gradient);
  ensureShape('scale_refit', 'H', h, ...w.shape.slice(0, -2), w.dim(-1), w.dim(-1));
  ensureShape('scale_refit', 'codes', codes, ...w.shape);
  if (gradient) ensureShape('scale_refit', 'gradient', gradient, ...w.shape);
  const scale = cast(s, grid.scale, 'f32');
  w.device.run('scale_refit', [scale, codes, w, h, grid.zero, grid.columnGroup, gradient], [grid.group], [damp]);
  return scale;
}

export interface DescentOptions {
  /** At most so many times over all columns, fewer when nothing changes any more. */
  passes?: number;
  /** (W - Q) H f32 [N,K], where it is known already; used up. */
  gradient?: Tensor | undefined;
}

/**
 * Coordinate descent over the codes under H (symmetric, f32 [K,K]), in place. changed i32 [N]: how many codes of each
 * row differ from before; gain f32 [N]: by how much (W - Q) H (W - Q)' of each row has fallen.
 */
export function codeDescent(
  s: Scope,
  codes: Tensor,
  w: Tensor,
  h: Tensor,
  grid: Grid,
  { passes = 1, gradient }: DescentOptions = {},
): { changed: Tensor; gain: Tensor } {
  ensureDType('code_descent', 'f32', w, h, grid.scale, grid.zero, gradient);
  ensureShape('code_descent', 'H', h, ...w.shape.slice(0, -2), w.dim(-1), w.dim(-1));
  ensureShape('code_descent', 'codes', codes, ...w.shape);
  if (gradient) ensureShape('code_descent', 'gradient', gradient, ...w.shape);
  const changed = s.empty('i32', w.shape.slice(0, -1));
  const gain = s.empty('f32', w.shape.slice(0, -1));
  const tensors = [codes, w, h, ...gridTensors(grid), changed, gradient, gain];
  w.device.run('code_descent', tensors, [...gridInts(grid), passes], []);
  return { changed, gain };
}

export interface PackOptions {
  bits: 2 | 3 | 4 | 8;
  /** Added to each code before it is packed (8 for signed 4-bit codes). */
  bias: number;
  /** Which dimension runs along a word. */
  axis: 0 | 1;
  /** 'awq': interleaved 0 2 4 6 1 3 5 7; 'dense': one stream of bits, fields cross words (GPTQ's 3 bits). */
  order?: 'linear' | 'awq' | 'dense';
}
const packInts = (o: PackOptions) => [o.bits, o.bias, o.axis, { linear: 0, awq: 1, dense: 2 }[o.order ?? 'linear']];

/** codes i8 [R,C] -> i32 words, little end first; the last word is padded with zeros. */
export function pack(s: Scope, codes: Tensor, o: PackOptions): Tensor {
  ensureShape('pack', 'codes', codes, -1, -1);
  ensureDType('pack', 'i8', codes);
  const per = o.order === 'dense' ? 32 / o.bits : Math.floor(32 / o.bits);
  const [r, c] = [codes.dim(0), codes.dim(1)];
  const words = s.empty('i32', o.axis === 1 ? [r, Math.ceil(c / per)] : [Math.ceil(r / per), c]);
  words.device.run('pack', [words, codes], packInts(o), []);
  return words;
}

/** i32 words -> codes i8 [rows, columns]. */
export function unpack(s: Scope, words: Tensor, rows: number, columns: number, o: PackOptions): Tensor {
  ensureDType('unpack', 'i32', words);
  const codes = s.empty('i8', [rows, columns]);
  words.device.run('unpack', [codes, words], packInts(o), []);
  return codes;
}

/** A weight [N,K] as unsigned 4-bit codes: w = (u - zero) scale. */
export interface PackedInt4 {
  /** i32 [N,K/8], packed along K. */
  readonly words: Tensor;
  /** float [N,G] */
  readonly scale: Tensor;
  /** i32 [N/8,G], packed along N; absent: 8. */
  readonly zero?: Tensor | undefined;
  /** Columns a scale. */
  readonly group: number;
}

/** y [M,N] = x [M,K] W' + bias for packed 4-bit W. */
export function int4Matmul(
  s: Scope,
  x: Tensor,
  { words, scale, zero, group }: PackedInt4,
  { bias, out, dtype = x.dtype as FloatDType }: { bias?: Tensor; out?: Tensor; dtype?: FloatDType } = {},
): Tensor {
  ensureContiguous('int4_matmul', words, scale, zero);
  ensure(x.dim(1) <= words.dim(1) * 8, 'int4_matmul', 'inner dimensions', x, words);
  const y = out ?? s.empty(dtype, [x.dim(0), words.dim(0)]);
  ensureShape('int4_matmul', 'y', y, x.dim(0), words.dim(0));
  y.device.run('int4_matmul', [y, x, words, scale, zero, bias], [group], []);
  return y;
}

/** Numbers of dc_encoding in native/backend.h. */
export const encodings = {
  q4_0: 0,
  q4_1: 1,
  q5_0: 2,
  q5_1: 3,
  q8_0: 4,
  q2_k: 5,
  q3_k: 6,
  q4_k: 7,
  q5_k: 8,
  q6_k: 9,
  iq4_nl: 10,
  mxfp4: 11,
  f8_e4m3: 12,
  f4_e2m1: 13,
} as const;
export type EncodingName = keyof typeof encodings;

/** Stored blocks (u8) -> values [N,K]; FP8/FP4 with one scale per block of rows x columns. */
export function decode(
  s: Scope,
  stored: Tensor,
  encoding: EncodingName,
  shape: readonly [number, number],
  dtype: FloatDType,
  scaled?: { scale: Tensor; block: readonly [number, number] },
): Tensor {
  const y = s.empty(dtype, shape);
  const [rows, columns] = scaled?.block ?? [1, 1];
  y.device.run('decode', [y, stored, scaled?.scale], [encodings[encoding], rows, columns], []);
  return y;
}

/** Encodings that are blocks of integer grids: sizes, and the codes of `blockGrid`. */
export const blockFormats = {
  q4_0: { values: 32, bytes: 18, group: 32, low: -8, high: 7, minima: false },
  q4_1: { values: 32, bytes: 20, group: 32, low: 0, high: 15, minima: true },
  q5_0: { values: 32, bytes: 22, group: 32, low: -16, high: 15, minima: false },
  q5_1: { values: 32, bytes: 24, group: 32, low: 0, high: 31, minima: true },
  q8_0: { values: 32, bytes: 34, group: 32, low: -127, high: 127, minima: false },
  q2_k: { values: 256, bytes: 84, group: 16, low: 0, high: 3, minima: true },
  q3_k: { values: 256, bytes: 110, group: 16, low: -4, high: 3, minima: false },
  q4_k: { values: 256, bytes: 144, group: 32, low: 0, high: 15, minima: true },
  q5_k: { values: 256, bytes: 176, group: 32, low: 0, high: 31, minima: true },
  q6_k: { values: 256, bytes: 210, group: 16, low: -32, high: 31, minima: false },
} as const;
export type BlockFormatName = keyof typeof blockFormats;
/** Encodings of blocks on a table of levels, without an integer grid. */
const tableFormats = { iq4_nl: { values: 32, bytes: 18 }, mxfp4: { values: 32, bytes: 17 } } as const;
export type EncodableName = BlockFormatName | keyof typeof tableFormats;

/** Values [N,K] -> stored GGML blocks u8 [N, bytes of a row]; `weight` f32 [K] steers the search of the scales. */
export function encode(s: Scope, w: Tensor, encoding: EncodableName, weight?: Tensor): Tensor {
  const { values, bytes } = { ...blockFormats, ...tableFormats }[encoding];
  ensureShape('encode', 'w', w, -1, -1);
  ensureFloat('encode', w);
  ensureRows('encode', w);
  ensure(w.dim(1) % values === 0, 'encode', `whole blocks of ${values}`, w);
  ensureDType('encode', 'f32', weight);
  if (weight) ensureShape('encode', 'weight', weight, w.dim(1));
  const blocks = s.empty('u8', [w.dim(0), (w.dim(1) / values) * bytes]);
  blocks.device.run('encode', [blocks, w, weight], [encodings[encoding]], []);
  return blocks;
}

/** The grid of stored blocks u8 [N, bytes of a row]: LDLQ and descent choose codes on it, `blockCodes` stores them. */
export function blockGrid(s: Scope, blocks: Tensor, encoding: BlockFormatName): Grid {
  const { values, bytes, group, low, high, minima } = blockFormats[encoding];
  ensureShape('block_grid', 'blocks', blocks, -1, -1);
  ensureDType('block_grid', 'u8', blocks);
  ensure(blocks.dim(1) % bytes === 0, 'block_grid', `whole blocks of ${bytes} bytes`, blocks);
  const shape = [blocks.dim(0), ((blocks.dim(1) / bytes) * values) / group];
  const scale = s.empty('f32', shape);
  const zero = minima ? s.empty('f32', shape) : undefined;
  scale.device.run('block_grid', [scale, zero, blocks], [encodings[encoding]], []);
  return { scale, zero, low, high, group };
}

/** Replaces the codes of stored blocks (in place) by codes i8 [N,K] on their grid. */
export function blockCodes(blocks: Tensor, codes: Tensor, encoding: BlockFormatName): void {
  const { values, bytes } = blockFormats[encoding];
  ensureDType('block_codes', 'u8', blocks);
  ensureDType('block_codes', 'i8', codes);
  ensureRows('block_codes', blocks, codes);
  ensureShape('block_codes', 'blocks', blocks, codes.dim(0), (codes.dim(1) / values) * bytes);
  blocks.device.run('block_codes', [blocks, codes], [encodings[encoding]], []);
}
