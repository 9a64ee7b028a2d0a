import { median } from './stats.js';
import type { GateResult } from './report.js';
import type { Measurements } from './gates.js';

/** So many times its fellows' median, and a layer, a head or a tensor is named. */
const standsOut = 3;

const short = (value: number): string => (Number.isFinite(value) ? String(Number(value.toPrecision(3))) : 'not finite');

/** What the numbers point at, the most telling first. Says nothing where nothing stands out. */
export function diagnose(m: Measurements, gates: readonly GateResult[]): string[] {
  const found: string[] = [];
  const failed = gates.filter(({ status }) => status === 'fail');
  const layer0 = failed.find(({ id }) => id === 'maxLayer0Change');
  if (layer0) {
    found.push(
      "Layer 0 has the reference's attention weights, yet its queries or keys differ: the two configurations disagree (rope, norm epsilon, heads), and every layer is hit.",
    );
  }
  const errors = m.layers.map((l) => l.teacherForced.update);
  const typical = median(errors.filter(Number.isFinite));
  for (const [i, error] of errors.entries()) {
    if (error <= 1e-3 || error <= standsOut * typical) continue;
    const times = typical > 0 && Number.isFinite(error) ? `, ${short(error / typical)} times the median layer's` : '';
    found.push(`Layer ${i} (${m.layers[i]!.name}) stands out: its own error is ${short(error)}${times}.`);
  }
  const weight = m.weights?.worst[0];
  if (weight && weight.error > 0.05 && (weight.lost || weight.error > 2.5 * weight.peers)) {
    const lost = weight.lost ? ' (all zero)' : '';
    found.push(
      `${weight.name} differs by ${short(weight.error)}${lost}, its kind by ${short(weight.peers)} at the median.`,
    );
  }
  const heads = m.attention?.teacherForced;
  const flat = heads?.divergence.flatMap((row) => row ?? []) ?? [];
  const head = heads?.worst.heads[0];
  if (head && head.divergence > 0.01 && head.divergence > standsOut * median(flat)) {
    const others = heads.worst.heads.filter((h) => h.divergence > 0.01 && h.divergence > standsOut * median(flat));
    const names = others.slice(0, 4).map((h) => `head ${h.head} of layer ${h.layer}`);
    found.push(
      `Attention moved most in ${names.join(', ')}: divergence ${short(head.divergence)} against ${short(median(flat))} at the median.`,
    );
  }
  const first = m.layers.findIndex((l) => l.freeRunning.output > 0.5);
  if (first > 0 && failed.length > 0 && found.length === 0) {
    found.push(
      `No single layer stands out; the errors add up, and from layer ${first} on they exceed half of the signal.`,
    );
  }
  return found;
}
