import type { Model } from '../arch/types.js';
import { bytesRead, cacheBytes, footprint, type Footprint, type Storage } from '../quant/footprint.js';
import type { Goal } from './advise-options.js';
import type { Gpu, Hardware } from './hardware.js';

/** One way to store the model, from the most exact to the least. */
export interface Scheme {
  readonly name: string;
  readonly storage: Storage;
  /** What `quantize` needs to make it; undefined: nothing to do, or `convert`. */
  readonly options: readonly string[] | undefined;
}
export const bf16: Scheme = { name: 'bf16', storage: { kind: 'plain' }, options: undefined };
export const schemes: readonly Scheme[] = [
  { name: 'int8 g128', storage: { kind: 'grid', bits: 8, group: 128 }, options: ['--bits', '8'] },
  { name: 'int4 g32', storage: { kind: 'grid', bits: 4, group: 32 }, options: ['--group-size', '32'] },
  { name: 'int4 g128', storage: { kind: 'grid', bits: 4, group: 128 }, options: [] },
];

export interface Wanted {
  readonly goal: Goal;
  readonly context: number;
  readonly sequences: number;
  readonly utilization: number;
  /** Bytes of `activationBytes`, on each GPU. */
  readonly activations: number;
}

/** Bytes are those of one GPU. */
export interface Figures {
  readonly scheme: Scheme;
  readonly print: Footprint;
  readonly gpus: number;
  readonly weights: number;
  readonly cache: number;
  readonly activations: number;
  readonly total: number;
  readonly usable: number;
  readonly fits: boolean;
  /** Of `context` tokens, beside weights and activations. */
  readonly mostSequences: number;
  /** Bytes of weights that a step reads on all GPUs together, and its time. */
  readonly read: number;
  readonly stepSeconds: number;
  readonly boundBy: 'bandwidth' | 'compute';
  /** Of one sequence, and of all. */
  readonly tokensPerSecond: number;
  readonly allTokensPerSecond: number;
}

/** The arithmetic of one scheme on some GPUs; docs/advise.md has every formula. */
export function figuresOf(
  model: Model,
  { scheme, print }: { scheme: Scheme; print: Footprint },
  { gpu, gpus, efficiency }: { gpu: Gpu; gpus: number; efficiency: Hardware['efficiency'] },
  { context, sequences, utilization, activations }: Wanted,
): Figures {
  const weights = print.weights / gpus;
  const oneCache = cacheBytes(model, context, gpus);
  const cache = sequences * oneCache;
  const usable = gpu.memoryGB * 1e9 * utilization;
  const total = weights + cache + activations;
  const read = bytesRead(print, sequences);
  const byBandwidth = (read / gpus + cache) / (gpu.bandwidthGBs * 1e9 * efficiency.bandwidth);
  const byCompute = (2 * print.activeParameters * sequences) / (gpus * gpu.bf16Tflops * 1e12 * efficiency.compute);
  const stepSeconds = Math.max(byBandwidth, byCompute);
  return {
    scheme, print, gpus, weights, cache, activations, total, usable,
    fits: total <= usable,
    mostSequences: oneCache === 0 ? sequences : Math.max(0, Math.floor((usable - weights - activations) / oneCache)),
    read,
    stepSeconds,
    boundBy: byCompute > byBandwidth ? 'compute' : 'bandwidth',
    tokensPerSecond: 1 / stepSeconds,
    allTokensPerSecond: sequences / stepSeconds,
  }; // prettier-ignore
}

/** `candidates` stand from the most exact to the least. */
export function choose(candidates: readonly Figures[], goal: Goal): Figures | undefined {
  const fitting = candidates.filter(({ fits }) => fits);
  const least = (of: (f: Figures) => number) => fitting.reduce<Figures | undefined>((best, f) => (best && of(best) <= of(f) ? best : f), undefined); // prettier-ignore
  if (goal === 'quality') return fitting[0];
  return goal === 'memory' ? least(({ total }) => total) : least(({ stepSeconds }) => stepSeconds);
}

export const footprints = (model: Model, list: readonly Scheme[], stores: (name: string) => boolean) =>
  list.map((scheme) => ({ scheme, print: footprint(model, scheme.storage, stores) }));
