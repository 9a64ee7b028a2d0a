import type { Weights } from '../nn/calls.js';
import { binary, normAdd } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { TensorSpec } from '../arch/types.js';
import { mean, median, round } from './stats.js';
import type { WeightError, WeightsResult } from './report.js';

/** One side's tensors of a block, or of what lies outside the blocks. */
export interface NamedWeights {
  readonly specs: readonly TensorSpec[];
  readonly weights: Weights;
}

/** Values that are compared at once: bounds the fp32 copy of a large embedding. */
const atOnce = 1 << 24;

interface Compared {
  readonly name: string;
  readonly kind: string;
  readonly layer: number | null;
  readonly error: number;
  /** All zero in the candidate, and not in the reference. */
  readonly lost: boolean;
}

/** `model.layers.3.mlp.experts.7.down_proj.weight` -> `mlp.experts.*.down_proj.weight`. */
export const kindOf = (name: string): string => name.replace(/^.*\blayers\.\d+\./, '').replace(/\.\d+\./g, '.*.');

const sameShape = (a: readonly number[], b: readonly number[]): boolean =>
  a.length === b.length && a.every((d, i) => d === b[i]);

/** Relative errors of tensors that both models have under the same name and shape. */
export class WeightErrors {
  readonly #compared: Compared[] = [];
  #unmatched = { reference: 0, candidate: 0 };

  /**
   * Compares what both sides hold now.
   * @returns names of the tensors that are bit-identical
   */
  async compare(reference: NamedWeights, candidate: NamedWeights, layer: number | null): Promise<Set<string>> {
    const present = ({ specs, weights }: NamedWeights) => specs.filter(({ name }) => weights.has(name));
    const others = new Map(present(candidate).map((spec) => [spec.name, spec]));
    const mine = present(reference);
    const both = mine.filter((spec) => sameShape(spec.shape, others.get(spec.name)?.shape ?? []));
    this.#unmatched.reference += mine.length - both.length;
    this.#unmatched.candidate += others.size - both.length;
    if (both.length === 0) return new Set();
    using scope = new Scope(reference.weights.get(both[0]!.name).device);
    // {sum of squares, count of non-finite values} of the difference, of the reference, of the candidate.
    const norms = scope.zeros('f32', [both.length, 3, 2]);
    both.forEach(({ name }, i) => {
      const [a, b] = [reference.weights.get(name), candidate.weights.get(name)];
      addDifference(norms.at(i).at(0), a, b);
      normAdd(norms.at(i).at(1), a);
      normAdd(norms.at(i).at(2), b);
    });
    const values = await norms.float32();
    const identical = new Set<string>();
    both.forEach(({ name }, i) => {
      const [difference, odd, size] = [values[6 * i]!, values[6 * i + 1]!, values[6 * i + 2]!];
      if (difference === 0 && odd === 0) identical.add(name);
      const error = odd > 0 ? Infinity : difference === 0 ? 0 : Math.sqrt(difference / Math.max(size, 1e-30));
      this.#compared.push({ name, kind: kindOf(name), layer, error, lost: size > 0 && values[6 * i + 4] === 0 });
    });
    return identical;
  }

  finish(): WeightsResult {
    const kinds = new Map<string, Compared[]>();
    for (const one of this.#compared) {
      const list = kinds.get(one.kind);
      if (list) list.push(one);
      else kinds.set(one.kind, [one]);
    }
    const peers = new Map([...kinds].map(([kind, list]) => [kind, median(list.map(({ error }) => error))]));
    const finite = (value: number): number => (Number.isFinite(value) ? round(value) : Number.MAX_VALUE);
    // Where most of a kind are untouched, a difference of 2% is no news yet.
    const excess = ({ error, kind }: Compared): number => error / Math.max(peers.get(kind)!, 0.02);
    const worst = this.#compared
      .filter(({ error }) => error > 0)
      .sort(
        (a, b) => +b.lost - +a.lost || excess(b) - excess(a) || b.error - a.error || a.name.localeCompare(b.name, 'en'),
      )
      .slice(0, 40)
      .map(({ name, error, kind, layer, lost }): WeightError => {
        return { name, error: finite(error), peers: finite(peers.get(kind)!), layer, ...(lost && { lost }) };
      });
    return {
      compared: this.#compared.length,
      identical: this.#compared.filter(({ error }) => error === 0).length,
      unmatched: this.#unmatched,
      kinds: [...kinds].map(([kind, list]) => {
        const errors = list.map(({ error }) => error);
        return {
          kind,
          count: list.length,
          mean: finite(mean(errors)),
          max: finite(errors.reduce((a, b) => Math.max(a, b), 0)),
        };
      }),
      worst,
    };
  }
}

/** into += {sum of squares, non-finite count} of a - b, in fp32, some rows at a time. */
function addDifference(into: Tensor, a: Tensor, b: Tensor): void {
  const rows = a.dim(0);
  const step = Math.max(1, Math.floor(atOnce / Math.max(1, a.count / rows)));
  for (let from = 0; from < rows; from += step) {
    using scope = new Scope(a.device);
    const [x, y] = [a, b].map((t) => t.slice(0, from, Math.min(rows, from + step))) as [Tensor, Tensor];
    normAdd(into, binary(scope, 'sub', x, y, { out: scope.empty('f32', x.shape) }));
  }
}
