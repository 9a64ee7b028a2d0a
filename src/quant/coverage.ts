import { ConvertError } from '../base/errors.js';
import type { Model } from '../arch/types.js';

/** Counts the routed experts that saw no calibration token, block by block; too many of the model's fail the job. */
export class CoverageGate {
  readonly #experts: number;
  readonly #most: number;
  #uncovered: number;

  /** `before`: those of blocks that an earlier run has finished. */
  constructor({ blocks }: Pick<Model, 'blocks'>, maxUncovered = 0.1, before = 0) {
    this.#experts = blocks.reduce((sum, { moe }) => sum + (moe?.experts ?? 0), 0);
    this.#most = maxUncovered;
    this.#uncovered = before;
  }

  add(uncovered: number, block: string): void {
    this.#uncovered += uncovered;
    if (this.#experts === 0 || this.#uncovered <= this.#most * this.#experts) return;
    throw new ConvertError('gate', 'Too many experts saw no calibration token', {
      where: `up to ${block}`,
      got: `${this.#uncovered} of ${this.#experts} experts`,
      expected: `at most ${(100 * this.#most).toFixed(1)}% (--max-uncovered)`,
      hint: 'Calibrate on more or more varied text (--samples, --calibration), or raise --max-uncovered: these experts are then rounded without statistics.',
    });
  }
}
