import { mean, round, sum } from './stats.js';
import type { RoutingLayer, RoutingResult } from './report.js';

/** Chosen experts of some tokens: idx [T, k], row by row. */
export interface Choices {
  readonly idx: Int32Array;
  readonly active: number;
  readonly experts: number;
}

/** Load statistics of one layer; load sums to 1. */
export function loadNumbers(counts: Float64Array): { load: number[]; maxVio: number; entropy: number; dead: number[] } {
  const total = Math.max(sum(counts), 1);
  const load = Array.from(counts, (c) => c / total);
  const even = 1 / counts.length;
  const entropy = -sum(load.map((p) => (p > 0 ? p * Math.log(p) : 0)));
  return {
    load: load.map(round),
    maxVio: round(Math.max(...load) / even - 1),
    entropy: round(counts.length > 1 ? entropy / Math.log(counts.length) : 1),
    dead: load.flatMap((p, e) => (p < 0.1 * even ? [e] : [])),
  };
}

interface Meter {
  readonly experts: number;
  readonly active: number;
  readonly counts: Float64Array;
  reference?: Float64Array;
  readonly agreed: { teacherForced: number; freeRunning: number };
  slots: number;
}

/** Which experts the candidate's tokens go to, layer by layer, and whether the reference sends them to the same. */
export class Routing {
  readonly #layers = new Map<number, Meter>();

  /**
   * One chunk of one layer.
   * @param free choices of the candidate on its own stream
   * @param teacherForced of the candidate on the reference's input
   * @param reference of the reference, where it routes here too
   */
  add(layer: number, free: Choices, teacherForced: Choices, reference: Choices | undefined): void {
    let meter = this.#layers.get(layer);
    if (!meter) {
      const { experts, active } = free;
      meter = {
        experts,
        active,
        counts: new Float64Array(experts),
        agreed: { teacherForced: 0, freeRunning: 0 },
        slots: 0,
      };
      this.#layers.set(layer, meter);
    }
    for (const e of free.idx) meter.counts[e]!++;
    if (reference?.experts !== free.experts) return;
    const counts = (meter.reference ??= new Float64Array(free.experts));
    for (const e of reference.idx) counts[e]!++;
    meter.slots += reference.idx.length;
    meter.agreed.teacherForced += shared(reference, teacherForced);
    meter.agreed.freeRunning += shared(reference, free);
  }

  finish(): RoutingResult | undefined {
    if (this.#layers.size === 0) return undefined;
    const layers = [...this.#layers].map(([layer, m]): RoutingLayer => {
      return {
        layer,
        experts: m.experts,
        active: m.active,
        ...loadNumbers(m.counts),
        ...(m.reference && {
          reference: loadNumbers(m.reference),
          agreement: {
            teacherForced: round(m.agreed.teacherForced / m.slots),
            freeRunning: round(m.agreed.freeRunning / m.slots),
          },
        }),
      };
    });
    const agreements = layers.flatMap((l) => (l.agreement ? [l.agreement.teacherForced] : []));
    return {
      layers,
      mean: {
        maxVio: round(mean(layers.map((l) => l.maxVio))),
        entropy: round(mean(layers.map((l) => l.entropy))),
        ...(agreements.length > 0 && { agreement: round(mean(agreements)) }),
      },
      dead: sum(layers.map((l) => l.dead.length)),
      experts: sum(layers.map((l) => l.experts)),
    };
  }
}

/** How many of a's choices b made as well, over all tokens. */
function shared(a: Choices, b: Choices): number {
  let found = 0;
  const tokens = a.idx.length / a.active;
  for (let t = 0; t < tokens; t++) {
    for (let i = t * a.active; i < (t + 1) * a.active; i++) {
      for (let j = t * b.active; j < (t + 1) * b.active; j++) {
        if (a.idx[i] === b.idx[j]) {
          found++;
          break;
        }
      }
    }
  }
  return found;
}
