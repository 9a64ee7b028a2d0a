import type { Balanced } from './balance.js';
import type { Router } from './choose.js';
import type { MoeShape } from './shape.js';
import type { Split } from './split.js';

/** Splits to measure the method against. `fitted` is the method itself. */
export type SplitKind = 'fitted' | 'static' | 'random' | 'cmoe';

export interface SplitOptions {
  readonly shape: MoeShape;
  /** Whether the container's selection has a bias. */
  readonly intercept: boolean;
  /** Ridge penalty of the router relative to the mean of the diagonal. */
  readonly lambda: number;
  /** Times that neurons are reassigned to the experts that the router turns on for them. */
  readonly rounds: number;
  /** Router training steps in each round, and at the end; 0: ridge regression alone. */
  readonly steps: number;
  readonly finalSteps: number;
  /** Largest load of an expert over the mean load, less 1, that the router is balanced to; absent: whatever it is. */
  readonly balance?: number | undefined;
  readonly seed: number;
  /** Absent: fitted. */
  readonly kind?: SplitKind;
}

export interface Restructured {
  readonly split: Split;
  /** Lives in the scope that was given. */
  readonly router: Router;
  /** Where the load was balanced: the router as it was fitted, and what it took. */
  readonly balance?: Omit<Balanced, 'router'> & { readonly unbalanced: Router };
  /** Contribution of each neuron. */
  readonly scores: Float32Array;
  readonly expertOf: Int32Array;
  readonly rest: Int32Array;
}
