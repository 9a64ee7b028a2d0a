import type { ProgressStep } from '../base/log.js';
import type { Metrics } from './metrics.js';
import type { Outcome, WorkerUsage } from './worker.js';

/** What comes after a worker's last step: verification, names, the end of the process. */
const lastStage = 'end';

/** Turns what one worker says and uses into the numbers of the batch. One for each worker that is started. */
export class Meter {
  #since = performance.now();
  #stage = '';
  #done = 0;
  /** How far each stage has come, with this worker or those before it, and which it has been in itself. */
  readonly #reached: Map<string, number>;
  readonly #own = new Set<string>();
  #used = { read: 0, written: 0 };

  constructor(
    private readonly metrics: Metrics,
    /** Of the job; the label is not called `job`, which is what Prometheus calls its own. */
    private readonly name: string,
    /** Of the worker that this one goes on for. */
    before?: Meter,
  ) {
    this.#reached = new Map(before ? before.#reached : []);
  }

  step({ stage, done, total, data }: ProgressStep): void {
    // A worker that goes on where another stopped begins in the middle: its first step is one step, and those that the
    // other had finished but was killed before it told of.
    if (stage !== this.#stage || done < this.#done) {
      const told = this.#own.has(stage) ? undefined : this.#reached.get(stage);
      [this.#stage, this.#done] = [stage, Math.max(0, Math.min(done - 1, told ?? done))];
    }
    const steps = done - this.#done;
    this.metrics.add('steps_total', { stage }, steps);
    this.#done = done;
    this.#reached.set(stage, done);
    this.#own.add(stage);
    this.metrics.changed();
    this.#time(stage);
    const isBlock = data?.block !== undefined;
    if (isBlock) this.metrics.add('blocks_total', { stage }, steps);
    if (typeof data?.tokens === 'number') this.metrics.add('tokens_total', { stage }, isBlock ? (data.tokens * steps) / total : data.tokens); // prettier-ignore
  }

  #time(stage: string): void {
    const now = performance.now();
    this.metrics.add('stage_seconds_total', { stage }, (now - this.#since) / 1000);
    this.#since = now;
  }

  /** What the worker has used since it began, told again and again. */
  usage({ memory, read, written, devices }: WorkerUsage): void {
    const { name } = this;
    this.metrics.add('read_bytes_total', {}, Math.max(0, (read ?? 0) - this.#used.read));
    this.metrics.add('written_bytes_total', {}, Math.max(0, (written ?? 0) - this.#used.written));
    this.#used = { read: Math.max(this.#used.read, read ?? 0), written: Math.max(this.#used.written, written ?? 0) };
    if (memory !== null) this.metrics.raise('job_memory_peak_bytes', { name }, memory);
    for (const { device, memory } of devices)
      this.metrics.raise('job_device_memory_peak_bytes', { name, device }, memory);
  }

  /** The worker has ended. `linears` of its result have the errors that quantization made. */
  end({ result }: Outcome): void {
    this.#time(lastStage);
    const { linears } = (result ?? {}) as { readonly linears?: unknown };
    const errors = Array.isArray(linears) ? linears.map((linear: { error?: unknown }) => linear.error) : [];
    const known = errors.filter((error) => typeof error === 'number');
    if (known.length === 0) return;
    this.metrics.set('quantization_error_ratio', { name: this.name }, known.reduce((a, b) => a + b, 0) / known.length);
  }
}
