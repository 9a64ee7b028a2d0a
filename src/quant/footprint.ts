import { elementCount } from '../base/dtype.js';
import type { Block, Model, TensorSpec } from '../arch/types.js';
import type { LinearSpec } from '../nn/calls.js';
import { fitGroup } from './scheme.js';
import { fitWidths } from './widths.js';

/** How the linears of the blocks are stored; everything else stays in two bytes (fp32 where an architecture says so). */
export type Storage =
  | { readonly kind: 'plain' }
  /** One byte a weight and an fp32 scale for each tile, as DeepSeek-V3 is published. */
  | { readonly kind: 'fp8'; readonly tile: readonly [rows: number, columns: number] }
  /** Integer codes with a two-byte scale a group; -1: one group a row. */
  | { readonly kind: 'grid'; readonly bits: number; readonly group: number };

/** Bytes and operations of a model in one form of storage, from its config alone. */
export interface Footprint {
  /** All weights, in bytes. */
  readonly weights: number;
  /** Of these: what every step reads, and routed experts, of which it reads some. The rest is the embedding table. */
  readonly always: number;
  readonly experts: number;
  /** Share of the routed experts that one token uses (1 where there are none). */
  readonly activeShare: number;
  /** Weights that one token is multiplied with: 2 operations each. */
  readonly activeParameters: number;
}

const inPlain = (role: LinearSpec['role']): boolean => role === 'router' || role === 'head' || role === 'other';

/**
 * What a model's weights take in `storage`, and what a decoding step reads of them. Feed-forward widths are padded and
 * groups chosen as `quantize` does. Tensors that are carried through (drafting layers, vision towers) are not counted.
 */
export function footprint(model: Model, storage: Storage, stores: (name: string) => boolean = () => false): Footprint {
  const widths = storage.kind === 'grid' ? fitWidths(model, storage.group, true) : undefined;
  const linears = new Map<string, LinearSpec>();
  for (const linear of model.blocks.flatMap((block) => block.linears.flat())) linears.set(`${linear.name}.weight`, linear); // prettier-ignore
  const bytesOf = (spec: TensorSpec): number => {
    const linear = linears.get(spec.name);
    const values = elementCount(spec.shape);
    if (linear === undefined || inPlain(linear.role) || storage.kind === 'plain') return values * (spec.f32 ? 4 : 2);
    if (storage.kind === 'fp8') {
      const [rows, columns] = storage.tile;
      return values + 4 * Math.ceil(linear.outFeatures / rows) * Math.ceil(linear.inFeatures / columns);
    }
    const { inFeatures, outFeatures } = widths!.stored.get(linear.name) ?? linear;
    const group = widths!.groups.get(linear.name) ?? fitGroup(inFeatures, storage.group, false).group;
    return outFeatures * ((inFeatures * storage.bits) / 8 + 2 * (group === 0 ? 1 : Math.ceil(inFeatures / group)));
  };
  let [weights, experts, active] = [0, 0, 0];
  const present = ({ name, optional, below }: TensorSpec) => below === undefined && (optional !== true || stores(name));
  const specs = [...model.outer, ...model.blocks.flatMap(({ tensors }) => tensors)].filter(present);
  const share = activeShare(model.blocks);
  let table = 0;
  for (const spec of specs) {
    const bytes = bytesOf(spec);
    weights += bytes;
    const routed = linears.get(spec.name)?.role === 'expert';
    if (routed) experts += bytes;
    if (spec.name === model.embedding && !model.tied) table = bytes;
    else active += elementCount(spec.shape) * (routed ? share : 1);
  }
  return { weights, experts, always: weights - experts - table, activeShare: share, activeParameters: active };
}

function activeShare(blocks: readonly Block[]): number {
  const moe = blocks.find((block) => block.moe)?.moe;
  return moe === undefined ? 1 : moe.active / moe.experts;
}

/**
 * Bytes of weights that one step of `sequences` tokens reads. Of the routed experts each token uses the share
 * k / E; tokens that choose independently and evenly touch 1 - (1 - k / E)^sequences of them.
 */
export const bytesRead = ({ always, experts, activeShare: share }: Footprint, sequences: number): number =>
  always + experts * (1 - (1 - share) ** sequences);

/**
 * Bytes that one sequence of `tokens` has in the cache of one of `gpus` devices, at two bytes a value. Heads of keys and
 * values are divided among devices; latents (which serve all heads) and what a scorer keeps are on each.
 */
export function cacheBytes(model: Model, tokens: number, gpus = 1): number {
  return model.blocks.reduce((sum, { attention }) => {
    const parts = attention.grouped ? Math.min(gpus, model.kvHeads) : 1;
    return sum + (2 * (attention.cached?.(tokens) ?? 0)) / parts;
  }, 0);
}

/**
 * Bytes at most alive while `tokens` tokens of a prompt go through at once: state and residual (2 W a token), and all
 * outputs of the linears of one block's widest half (attention, or feed-forward with the active experts), in two bytes;
 * and fp32 logits of the last token of each sequence. Attention is taken to keep no scores (flash attention).
 */
export function activationBytes(model: Model, tokens: number, sequences = 1): number {
  let widest = 0;
  for (const block of model.blocks) {
    const share = activeShare([block]);
    let [attention, feedForward] = [0, 0];
    for (const { role, outFeatures } of block.linears.flat()) {
      if (role === 'attention') attention += outFeatures;
      else feedForward += outFeatures * (role === 'expert' ? share : 1);
    }
    widest = Math.max(widest, attention, feedForward);
  }
  return 2 * tokens * (2 * model.stateWidth + Math.round(widest)) + 4 * sequences * model.vocab;
}
