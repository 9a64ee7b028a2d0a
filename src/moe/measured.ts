import type { Scope, Tensor } from '../tensor/tensor.js';
import { RouterFitter } from './router.js';
import type { FfnWeights, Sample } from './sample.js';
import { columnNorms, contributions, energies } from './score.js';
import type { SplitOptions } from './restructured.js';

/** What every split of a layer starts from, measured once. */
export interface Measured {
  readonly sample: Sample;
  /** The rows of the sample that are fitted to. */
  readonly x: Tensor;
  readonly h: Tensor;
  /** Length of each neuron's column of down_proj, f32 [I]. */
  readonly norms: Tensor;
  /** Contribution of each neuron. */
  readonly scores: Float32Array;
  readonly fitter: RouterFitter;
}

export async function measure(
  s: Scope,
  sample: Sample,
  w: FfnWeights,
  { intercept, lambda, seed, shape }: SplitOptions,
): Promise<Measured> {
  const [x, h] = [sample.x.slice(0, 0, sample.fit), sample.h.slice(0, 0, sample.fit)];
  const norms = columnNorms(s, w.down);
  const all = energies(s, h, norms);
  const scores = await contributions(s, all);
  s.free(all);
  const fitter = await RouterFitter.make(s, x, { ...shape, intercept, lambda, seed });
  return { sample, x, h, norms, scores, fitter };
}
