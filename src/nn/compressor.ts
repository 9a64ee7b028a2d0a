import { binary, copyInto, fill, reduce, rmsnorm, rope, unary } from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import type { ForwardContext, LinearSpec } from './calls.js';
import { drop, linearTensors, type TensorSpec } from './layer.js';
import { normTensor, type NormSpec } from './norm.js';
import type { RopeSpec } from './rope.js';

/**
 * DeepSeek-V4's compression of keys (2026, section 2.3): each `rate` tokens become one entry, a sum of their values
 * weighted channel by channel with a softmax over the window. With `overlap` every token has two values and two gates:
 * one for its own window's entry, one for the next window's.
 */
export interface CompressorSpec {
  /** Input -> values, and gates [width, or 2 width: for the next window, for its own]. */
  readonly values: LinearSpec;
  readonly gates: LinearSpec;
  /** Tensor name of what is added to gates by position in the window, f32 [rate, outFeatures]. */
  readonly bias: string;
  readonly norm: NormSpec;
  readonly rate: number;
  readonly width: number;
  readonly overlap: boolean;
  /** Entries turn to the position of their window's first token. */
  readonly rope: RopeSpec;
}

export const compressorTensors = (c: CompressorSpec): TensorSpec[] => [
  ...linearTensors([c.values, c.gates]),
  { name: c.bias, shape: [c.rate, c.values.outFeatures], f32: true },
  normTensor(c.norm),
];

/** Position of the first token of this pass; rows of a batch stand together. */
export const startOf = (ctx: ForwardContext): number => ctx.end - ctx.length;

/** How many entries the token at `position` sees: those of windows that are closed by it or before. */
export const closedWindows = ({ rate }: CompressorSpec, position: number): number => Math.floor((position + 1) / rate);

/**
 * All entries so far [B, E, 1, width], E > 0, from the answers of the two linears [B S, outFeatures], which are used
 * up; undefined before the first window is closed. With a cache, tokens of open windows wait in its part `${name}.open`.
 */
export function compress(
  c: CompressorSpec,
  name: string,
  values: Tensor,
  gates: Tensor,
  ctx: ForwardContext,
): Tensor | undefined {
  const { scope, batch, length, cache } = ctx;
  const start = startOf(ctx);
  const [first, end] = [Math.floor(start / c.rate), Math.floor((start + length) / c.rate)];
  const channels = c.values.outFeatures;
  // Rows hold values and gates; the first of them is token `from`.
  let [v, g, from] = [values.view(batch, length, channels), gates.view(batch, length, channels), start];
  if (cache) {
    const both = scope.empty(values.dtype, [batch, length, 1, 2 * channels]);
    const rows = squeeze(both);
    copyInto(rows.slice(2, 0, channels), v);
    copyInto(rows.slice(2, channels, 2 * channels), g);
    const held = cache.part(`${name}.open`).append(both, undefined, c.overlap ? 2 * c.rate : c.rate);
    const all = squeeze(held.k);
    [v, g, from] = [all.slice(2, 0, channels), all.slice(2, channels, 2 * channels), start - held.offset];
    drop(scope, [both]);
  }
  const made = entries(c, v, g, { from, first, end }, ctx);
  drop(scope, [values, gates]);
  if (!cache) return end > 0 ? made : undefined;
  const all = cache.part(`${name}.entries`).append(made);
  drop(scope, [made]);
  return end > 0 ? all.k : undefined;
}

/** Entries [B, n, 1, width] of the windows [first, end); row 0 of `v` and `g` [B, R, channels] is token `from`. */
function entries(
  c: CompressorSpec,
  v: Tensor,
  g: Tensor,
  { from, first, end }: { from: number; first: number; end: number },
  ctx: ForwardContext,
): Tensor {
  const { scope, batch, weights } = ctx;
  const [n, { rate, width, overlap }] = [end - first, c];
  if (n === 0) return scope.empty(v.dtype, [batch, 0, 1, width]);
  using work = new Scope(scope.device);
  const tokens = overlap ? 2 * rate : rate;
  const value = work.empty('f32', [batch, n, tokens, width]);
  const gate = work.empty('f32', [batch, n, tokens, width]);
  const bias = weights.get(c.bias);
  /** Puts channels [at, at + width) of windows [a, b) into places [to, to + rate) of the entries that they go into. */
  const put = (a: number, b: number, at: number, to: number, entry: number): void => {
    if (a >= b) return;
    const place = (x: Tensor) => x.slice(1, entry, entry + b - a).slice(2, to, to + rate);
    const windows = (x: Tensor) => split(x.slice(1, a * rate - from, b * rate - from).slice(2, at, at + width), rate);
    copyInto(place(value), windows(v));
    binary(work, 'add', windows(g), bias.slice(1, at, at + width), { out: place(gate) });
  };
  if (!overlap) put(first, end, 0, 0, 0);
  else {
    if (first === 0) {
      // Nothing stands before the first window.
      fill(value, 0);
      fill(gate, -1e30);
    }
    put(first, end, width, rate, 0);
    put(Math.max(first, 1) - 1, end - 1, 0, 0, first === 0 ? 1 : 0);
  }
  const sum = softSum(work, value.view(batch * n, tokens, width), gate.view(batch * n, tokens, width));
  const normed = rmsnorm(work, sum, weights.get(`${c.norm.name}.weight`), c.norm.eps, { dtype: v.dtype as 'f32' });
  const positions = Int32Array.from({ length: batch * n }, (_, i) => (first + (i % n)) * rate);
  const { cos, sin } = ctx.rope.get(c.rope, ctx.end);
  const { interleaved, fromEnd } = c.rope;
  const at = work.from('i32', [batch, n], positions);
  return rope(scope, normed.view(batch, n, 1, width), cos, sin, at, { interleaved, fromEnd });
}

/** Sum over the middle of values [M, tokens, width], weighted with the softmax of gates there; gates are used up. */
function softSum(work: Scope, value: Tensor, gate: Tensor): Tensor {
  const [m, width] = [gate.dim(0), gate.dim(2)];
  const largest = reduce(work, 'max', gate, 1);
  binary(work, 'sub', gate, largest.view(m, 1, width), { out: gate });
  unary(work, 'exp', gate, 0, 0, gate);
  const total = reduce(work, 'sum', gate, 1);
  binary(work, 'mul', gate, value, { out: gate });
  const sum = reduce(work, 'sum', gate, 1);
  return binary(work, 'div', sum, total, { out: sum });
}

/** [B, R, 1, D] -> [B, R, D], whatever the strides. */
const squeeze = (x: Tensor): Tensor => {
  const keep = [0, 1, 3];
  return new Tensor(x.storage, x.byteOffset, x.dtype, keep.map((d) => x.dim(d)), keep.map((d) => x.strides[d]!)); // prettier-ignore
};

/** [B, n rate, D] -> [B, n, rate, D], whatever the strides. */
function split(x: Tensor, rate: number): Tensor {
  const [b, r, d] = x.strides as [number, number, number];
  const shape = [x.dim(0), x.dim(1) / rate, rate, x.dim(2)];
  return new Tensor(x.storage, x.byteOffset, x.dtype, shape, [b, r * rate, r, d]);
}
