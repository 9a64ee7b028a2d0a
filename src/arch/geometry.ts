import { dtypeSize } from '../base/dtype.js';
import { formatBytes } from '../base/files.js';
import type { JobEnv } from '../backend/env.js';
import type { CalibrationSet } from './calibration.js';
import type { OpenModel } from './open.js';
import type { Model } from './types.js';

export interface GeometryOptions {
  readonly open: OpenModel;
  readonly env: JobEnv;
  readonly set: CalibrationSet;
  /** Of the hidden states. */
  readonly dtype: 'f32' | 'bf16';
  /** Sequences a batch; default: about 4,096 tokens on the CPU, 16,384 on a GPU. */
  readonly batchRows?: number;
  /** Bytes of device memory that states and suspended batches may take; default: 60% of what is free. */
  readonly budget?: number;
  /** A second stream of states goes along. */
  readonly twice?: boolean;
}

export interface Batch {
  /** First sequence and how many. */
  readonly from: number;
  readonly rows: number;
}

/** How the batches of a calibration pass through a block, and what of them stays in device memory. */
export interface Geometry {
  readonly batches: readonly Batch[];
  /** States stay on the device between blocks. */
  readonly resident: boolean;
  /** Batches stay suspended at a call; else the block is recomputed up to it. */
  readonly hold: boolean;
  readonly readAhead: boolean;
  readonly note: string;
}

/** Values that one token's suspended forward pass holds at the widest call, states included. */
function suspendedWidth(model: Model): number {
  let widest = model.stateWidth;
  for (const block of model.blocks) {
    for (const linears of block.linears) {
      const { inFeatures, role } = linears[0]!;
      const copies = role === 'expert' ? (block.moe?.active ?? 1) : 1;
      widest = Math.max(widest, inFeatures * copies + (role === 'expert' ? model.hidden * 2 : 0));
    }
  }
  return widest + 2 * model.stateWidth;
}

/** Batches by the device, what is held of them by its memory: the values are the same however much that is. */
export function planGeometry({ open, env, set, dtype, batchRows, budget, twice = false }: GeometryOptions): Geometry {
  const perBatch = env.device.kind === 'cpu' ? 4096 : 16384;
  const rows = batchRows ?? Math.max(1, Math.min(set.n, Math.floor(perBatch / set.seqLen)));
  const batches: Batch[] = [];
  for (let from = 0; from < set.n; from += rows) batches.push({ from, rows: Math.min(rows, set.n - from) });

  const free = env.device.available();
  const allowed = budget ?? (Number.isFinite(free) ? 0.6 * free : Infinity);
  const tokens = set.n * set.seqLen;
  const size = dtypeSize(dtype);
  const stateBytes = (twice ? 2 : 1) * tokens * open.model.stateWidth * size;
  const heldBytes = tokens * suspendedWidth(open.model) * size + (twice ? 2 * stateBytes : 0);
  const hold = heldBytes <= allowed;
  const resident = hold || 2 * stateBytes <= allowed;
  const readAhead = heldBytes <= allowed / 2;
  const how = hold ? 'held on the device' : resident ? 'recomputed from call to call' : 'read from the work folder';
  const note = `${tokens} tokens in ${batches.length} batches, ${how} (${formatBytes(hold ? heldBytes : stateBytes)} of ${formatBytes(allowed)})`;
  return { batches, resident, hold, readAhead, note };
}
