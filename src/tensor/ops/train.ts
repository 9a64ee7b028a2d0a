import type { FloatDType } from '../../base/dtype.js';
import type { Scope, Tensor } from '../tensor.js';
import { ensureContiguous, ensureDType, ensureFloat, ensureRows, ensureShape } from './check.js';
import type { Grid } from './quant.js';

type TrainedGrid = Pick<Grid, 'scale' | 'zero' | 'low' | 'high' | 'group'>;

function checkGrid(op: string, w: Tensor, grid: TrainedGrid): void {
  ensureFloat(op, w);
  ensureRows(op, w);
  ensureDType(op, 'f32', grid.scale, grid.zero);
  ensureShape(op, 'w', w, -1, -1);
  ensureShape(op, 'scale', grid.scale, w.dim(0), Math.ceil(w.dim(1) / grid.group));
  if (grid.zero) ensureShape(op, 'zero', grid.zero, ...grid.scale.shape);
}

/** y = s (clamp(round(w / s + z)) - z): w float [N,K] on its grid, of w's dtype or `dtype`. */
export function fakeQuant(s: Scope, w: Tensor, grid: TrainedGrid, dtype: FloatDType = w.dtype as FloatDType): Tensor {
  checkGrid('fake_quant', w, grid);
  const y = s.empty(dtype, w.shape);
  y.device.run('fake_quant', [y, w, grid.scale, grid.zero], [grid.low, grid.high, grid.group], []);
  return y;
}

/**
 * Gradients of `fakeQuant`, straight through the rounding, with learned step sizes (Esser et al. 2020, without their
 * factor on the step's gradient): dw f32 [N,K], dscale and (where the grid has zeros) dzero f32 [N,G].
 */
export function fakeQuantBackward(
  s: Scope,
  dy: Tensor,
  w: Tensor,
  grid: TrainedGrid,
): { dw: Tensor; dscale: Tensor; dzero: Tensor | undefined } {
  checkGrid('fake_quant_backward', w, grid);
  ensureShape('fake_quant_backward', 'dy', dy, ...w.shape);
  const dw = s.empty('f32', w.shape);
  const dscale = s.empty('f32', grid.scale.shape);
  const dzero = grid.zero && s.empty('f32', grid.scale.shape);
  const { scale, zero, low, high, group } = grid;
  dw.device.run('fake_quant_backward', [dw, dscale, dzero, dy, w, scale, zero], [low, high, group], []);
  return { dw, dscale, dzero };
}

export interface AdamWOptions {
  /** Counts from 1. */
  step: number;
  lr: number;
  beta1?: number;
  beta2?: number;
  eps?: number;
  /** Decoupled weight decay: p shrinks by lr decay. */
  decay?: number;
  /** f32 [1]: multiplies the gradient. */
  clip?: Tensor;
}

/** One step of AdamW (Loshchilov & Hutter 2019): p, m, v f32 in place; g float. */
export function adamw(p: Tensor, m: Tensor, v: Tensor, g: Tensor, o: AdamWOptions): void {
  ensureDType('adamw', 'f32', p, m, v, o.clip);
  ensureFloat('adamw', g);
  for (const t of [m, v, g]) ensureShape('adamw', 'state and gradient', t, ...p.shape);
  ensureContiguous('adamw', p, m, v, g);
  const numbers = [o.lr, o.beta1 ?? 0.9, o.beta2 ?? 0.999, o.eps ?? 1e-8, o.decay ?? 0];
  p.device.run('adamw', [p, m, v, g, o.clip], [o.step], numbers);
}
