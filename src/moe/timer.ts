import type { JobEnv } from '../backend/env.js';

/** Seconds of the stages of one layer. */
export class Timer {
  readonly seconds: Record<string, number> = {};
  #since = performance.now();

  /** Ends a stage when the device is done with it. */
  async mark(stage: string, { device }: Pick<JobEnv, 'device'>): Promise<void> {
    await device.sync();
    const now = performance.now();
    this.seconds[stage] = Math.round(now - this.#since) / 1000;
    this.#since = now;
  }
}
