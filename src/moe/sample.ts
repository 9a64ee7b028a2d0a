import type { JobEnv } from '../backend/env.js';
import type { LinearSpec } from '../nn/calls.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { Site } from '../arch/stream.js';
import { copyInto, gather, matmulT, swiglu } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';

/** Tokens of a layer's feed-forward input that everything is decided on; the last `held` rows are for judging only. */
export interface Sample {
  /** f32 [fit + held, C]: the normalised hidden states that the router will see. */
  readonly x: Tensor;
  /** f32 [fit + held, I]: act(gate x) (up x). */
  readonly h: Tensor;
  readonly fit: number;
  readonly held: number;
}

/** Tokens are held out by stretches of this length: neighbours are too alike to be on both sides. */
const stretch = 64;
/** Whether a calibration token is kept for judging: one stretch in eight is. */
export const heldOut = (token: number): boolean => Math.floor(token / stretch) % 8 === 7;

/** The rows for judging only. */
export function heldPart({ x, h, fit, held }: Sample): { readonly x: Tensor; readonly h: Tensor } {
  return { x: x.slice(0, fit, fit + held), h: h.slice(0, fit, fit + held) };
}

/** Bytes of device memory that `captureSample` and what is computed from it take for each token. */
export const sampleBytes = (hidden: number, ffn: number, experts: number): number =>
  4 * (2 * hidden + 3 * ffn + 8 * experts);

/** How many tokens of `bytes` each a third of the memory holds, at least some thousands. */
export function tokensThatFit(bytes: number, { device }: Pick<JobEnv, 'device'>, budget: number | undefined): number {
  const { memory } = device.info() as { memory?: { free?: number } };
  const { limit } = device.memory();
  const free = budget ?? Math.min(memory?.free ?? 8e9, limit > 0 ? limit : Infinity);
  return Math.max(4096, Math.min(262_144, Math.floor(free / 3 / bytes)));
}

/** Bytes of device memory that are not in use just now, at most `budget`. */
export function freeBytes({ device }: Pick<JobEnv, 'device'>, budget = Infinity): number {
  const { memory } = device.info() as { memory?: { free?: number } };
  const { limit, used, reserved } = device.memory();
  const free = memory?.free === undefined ? 8e9 : memory.free + reserved - used;
  return Math.min(free, limit > 0 ? limit - used : Infinity, budget);
}

export interface FfnWeights {
  /** [I, C], [I, C], [C, I] */
  readonly gate: Tensor;
  readonly up: Tensor;
  readonly down: Tensor;
}

/** act(gate x) (up x) in fp32. */
export function neurons(s: Scope, x: Tensor, w: Pick<FfnWeights, 'gate' | 'up'>, ffn: FfnSpec): Tensor {
  const gate = matmulT(s, x, w.gate, { dtype: 'f32' });
  const up = matmulT(s, x, w.up, { dtype: 'f32' });
  const h = swiglu(s, gate, up, ffn.activation);
  s.free(gate, up);
  return h;
}

/** Evenly spread tokens, at most `limit`, of all batches at a layer's gate/up call. */
export async function captureSample(
  site: Site,
  w: FfnWeights,
  ffn: FfnSpec,
  limit: number,
  scope: Scope,
): Promise<Sample> {
  const picked = pick(site.tokens, limit);
  const h = scope.empty('f32', [picked.tokens.length, ffn.gate.outFeatures]);
  const x = await captureInputs(site, picked, scope, (part, at) => {
    using work = new Scope(scope.device);
    copyInto(h.slice(0, at, at + part.dim(0)), neurons(work, part, w, ffn));
  });
  return { x, h, fit: picked.fit, held: picked.held };
}

/** Tokens of a calibration set, in order; `held` of them are for judging only. */
interface Picked {
  readonly tokens: readonly number[];
  readonly fit: number;
  readonly held: number;
}

/** At most `most` rows of x f32 [T, N], evenly spread. */
export function evenRows(s: Scope, x: Tensor, most: number): Tensor {
  const rows = Math.min(x.dim(0), most);
  using work = new Scope(s.device);
  const picked = Int32Array.from({ length: rows }, (_, i) => Math.floor((i * x.dim(0)) / rows));
  return gather(s, x, work.from('i32', [rows], picked));
}

/** Evenly spread tokens, at most `limit`. */
export function pick(tokens: number, limit: number): Picked {
  const chosen = choose(tokens, limit);
  const held = chosen.reduce((n, token) => n + (heldOut(token) ? 1 : 0), 0);
  return { tokens: chosen, fit: chosen.length - held, held };
}

/**
 * Inputs f32 [T, C] of a held linear call for the picked tokens, held-out ones last. `seen` gets them as they come by,
 * and the row that they begin at.
 */
export async function captureInputs(
  site: Site,
  { tokens, fit }: Picked,
  scope: Scope,
  seen?: (part: Tensor, at: number) => void,
): Promise<Tensor> {
  const [linear] = site.linears as readonly LinearSpec[];
  const x = scope.empty('f32', [tokens.length, linear!.inFeatures]);
  let [from, next, fitAt, heldAt] = [0, 0, 0, fit];
  await site.each((call) => {
    const rows = call.x.dim(0);
    const [fitRows, heldRows]: [number[], number[]] = [[], []];
    for (; next < tokens.length && tokens[next]! < from + rows; next++) {
      (heldOut(tokens[next]!) ? heldRows : fitRows).push(tokens[next]! - from);
    }
    for (const [picked, at] of [
      [fitRows, fitAt],
      [heldRows, heldAt],
    ] as const) {
      if (picked.length === 0) continue;
      using work = new Scope(scope.device);
      const idx = work.from('i32', [picked.length], Int32Array.from(picked));
      const part = gather(work, call.x, idx, 0, call.x.dtype);
      copyInto(x.slice(0, at, at + picked.length), part);
      seen?.(part, at);
    }
    fitAt += fitRows.length;
    heldAt += heldRows.length;
    from += rows;
  });
  return x;
}

function choose(tokens: number, limit: number): number[] {
  if (tokens <= limit) return Array.from({ length: tokens }, (_, i) => i);
  // Whole stretches, evenly spread: the same share of them is held out as of all.
  const stretches = Math.floor(tokens / stretch);
  const taken = Math.max(8, Math.floor(limit / stretch / 8) * 8);
  const chosen: number[] = [];
  for (let i = 0; i < taken; i++) {
    // Every group of eight keeps its place within the eight.
    const group = Math.floor((Math.floor(i / 8) * Math.floor(stretches / 8)) / (taken / 8));
    const start = (group * 8 + (i % 8)) * stretch;
    for (let t = 0; t < stretch; t++) chosen.push(start + t);
  }
  return chosen;
}
