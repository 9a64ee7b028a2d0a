import type { ForwardContext, KvCache, Weights } from '../nn/calls.js';
import { RopeTables } from '../nn/rope.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import type { Model } from './types.js';

export interface ContextOptions {
  /** Position of the first token; default: what the cache holds. */
  start?: number;
  /** Position of each row's first token, where rows differ. */
  starts?: readonly number[];
  /** Real tokens of each row when rows are padded on the right; with a cache, including those that it holds. */
  lengths?: readonly number[] | Tensor;
  cache?: KvCache;
  /** The tokens themselves, row by row: blocks may look them up. */
  tokens?: Int32Array;
  /** Another context of the same tokens, whose positions and lengths are theirs: start, starts and lengths are ignored. */
  like?: ForwardContext;
}

/** Tables of positions live as long as the weights that they are used with. */
const tables = new WeakMap<Weights, RopeTables>();
export const keepRopeTables = (weights: Weights, scope: Scope): void => void tables.set(weights, new RopeTables(scope));

/** What a forward pass over tokens [batch, length] runs in. Intermediates live in `scope`. */
export function forwardContext(
  scope: Scope,
  _model: Model,
  weights: Weights,
  batch: number,
  length: number,
  options: ContextOptions = {},
): ForwardContext {
  const { cache, tokens } = options;
  const { positions, end, lengths } = options.like ?? places(scope, batch, length, options);
  return {
    ...{ scope, weights, batch, length, positions, end },
    rope: tables.get(weights) ?? new RopeTables(scope),
    ...(lengths && { lengths }),
    ...(cache && { cache }),
    ...(tokens && { tokens }),
  };
}

/** Where the tokens stand. */
function places(
  scope: Scope,
  batch: number,
  length: number,
  { start, starts, lengths, cache }: ContextOptions,
): Pick<ForwardContext, 'positions' | 'end' | 'lengths'> {
  const first = starts ?? Array.from({ length: batch }, () => start ?? cache?.length ?? 0);
  const positions = new Int32Array(batch * length);
  for (let b = 0; b < batch; b++) for (let s = 0; s < length; s++) positions[b * length + s] = first[b]! + s;
  return {
    positions: scope.from('i32', [batch, length], positions),
    end: Math.max(...first) + length,
    ...(lengths && {
      lengths: 'storage' in lengths ? lengths : scope.from('i32', [batch], Int32Array.from(lengths)),
    }),
  };
}
