import { flagsOf, argumentsOf } from './state.js';
import type { Job } from './types.js';
import type { Outcome } from './worker.js';

/** Places for workers: GPUs, or shares of the CPU. */
export interface Places {
  /** undefined: none is free now. */
  take(): number | undefined;
  give(place: number): void;
  /** Calls `feed` whenever places may have become free, until the function that it returns is called. */
  watch(feed: () => void): () => void;
}

/** Runs our own program with these arguments on a place; `shard` where it solves one. */
export type Step = (argv: readonly string[], place: number, shard?: number) => Promise<Outcome>;

/** Options of the machine, which each step has for itself. */
export const machine = ['device', 'threads', 'ram', 'vram', 'trace'];

/** What `plan` says under --json. */
interface Plan {
  readonly workers: readonly { readonly shard: number; readonly done: boolean; readonly argv: readonly string[] }[];
  readonly merge: { readonly argv: readonly string[] };
}

/**
 * One attempt at a job in shards: `plan`, its workers side by side on the job's own place and all that are free, `merge`.
 * Each says by itself what is done already. The outcome is that of merge, or of the first step that failed: no worker is
 * begun after it, those under way come to their end.
 */
export async function runShards(job: Job, place: number, places: Places, step: Step): Promise<Outcome> {
  const started = performance.now();
  const flags = flagsOf(job, machine);
  const plan = await step(['plan', ...argumentsOf(job).slice(1), `--shards=${job.shards}`], place);
  const outcomes = [plan];
  const last = (outcome: Outcome): Outcome => ({
    ...outcome,
    seconds: (performance.now() - started) / 1000,
    usage: { ...outcome.usage, memory: Math.max(...outcomes.map(({ usage }) => usage.memory ?? 0)) || null },
  });
  if (plan.exitCode !== 0) return last(plan);
  const { workers, merge } = plan.result as unknown as Plan;
  const queue = workers.filter(({ done }) => !done);
  let failed: Outcome | undefined;
  const lanes = new Set<Promise<void>>();
  const lane = async (at: number): Promise<void> => {
    for (let worker = queue.shift(); worker; worker = queue.shift()) {
      const outcome = await step([...worker.argv, ...flags], at, worker.shard);
      outcomes.push(outcome);
      if (outcome.exitCode === 0) continue;
      failed ??= outcome;
      queue.length = 0;
    }
  };
  const begin = (at: number, then: () => void): void => {
    const work = lane(at).finally(() => {
      lanes.delete(work);
      then();
    });
    work.catch(() => undefined); // the first to fail is awaited below
    lanes.add(work);
  };
  const feed = (): void => {
    while (queue.length > 0) {
      const at = places.take();
      if (at === undefined) return;
      begin(at, () => places.give(at));
    }
  };
  begin(place, () => undefined);
  feed();
  const stopWatching = places.watch(feed);
  try {
    while (lanes.size > 0) await Promise.race(lanes);
  } finally {
    stopWatching();
  }
  if (failed) return last(failed);
  const merged = await step([...merge.argv, ...flags], place);
  outcomes.push(merged);
  return last(merged);
}
