import { mean } from '../report.js';
import type { Kept, Load } from '../judge.js';
import type { SurgeryErrors } from './judge.js';
import type { SurgeryPlan } from './plan.js';

/** What became of one layer; errors and loads are of held-out tokens. */
export interface SurgeryLayer {
  readonly block: number;
  /** Tokens that decided, and held-out ones. */
  readonly tokens: number;
  readonly held: number;
  /** The old experts that make up each of the new ones. */
  readonly members: readonly (readonly number[])[];
  /** Of each of the old ones: mean of g |E(x)| over its tokens, and the share of the tokens that choose it. */
  readonly values: { readonly reap: readonly number[]; readonly frequency: readonly number[] };
  /** Experts that no deciding token chose. */
  readonly unused: number;
  readonly errors: SurgeryErrors;
  readonly load: { readonly before: Load; readonly after: Load };
  /** The experts that tokens choose beside those with the largest outputs, |E(x)|^2, among as many as there are then. */
  readonly router: { readonly before: Kept; readonly after: Kept };
}

export interface SurgeryReport {
  readonly out: string;
  readonly plan: SurgeryPlan;
  readonly by: string;
  readonly layers: readonly SurgeryLayer[];
  readonly calibration: string;
  readonly notices: readonly string[];
  readonly resumed: boolean;
  readonly seconds: number;
}

/** Means over the layers; dead and unused experts are counted. */
export function surgeryTotals(layers: readonly SurgeryLayer[]) {
  const over = (read: (layer: SurgeryLayer) => number) => mean(layers.map(read));
  const all = (read: (layer: SurgeryLayer) => number) => layers.reduce((sum, layer) => sum + read(layer), 0);
  const loads = (of: 'before' | 'after') => ({
    maxVio: over(({ load }) => load[of].maxVio),
    entropy: over(({ load }) => load[of].entropy),
    dead: all(({ load }) => load[of].dead),
  });
  const routers = (of: 'before' | 'after') => ({
    kept: over(({ router }) => router[of].kept),
    oracleKept: over(({ router }) => router[of].oracleKept),
    overlap: over(({ router }) => router[of].overlap),
  });
  return {
    error: over(({ errors }) => errors.output),
    reap: over(({ errors }) => errors.reap),
    frequency: over(({ errors }) => errors.frequency),
    random: over(({ errors }) => errors.random),
    load: { before: loads('before'), after: loads('after') },
    router: { before: routers('before'), after: routers('after') },
    unused: all(({ unused }) => unused),
  };
}

const percent = (x: number): string => `${(100 * x).toFixed(1)}%`;

/** Lines for people. */
export function surgerySummary({ plan, layers }: SurgeryReport): string[] {
  const t = surgeryTotals(layers);
  const [experts] = plan.experts;
  const load = ({ maxVio, entropy, dead }: (typeof t.load)['before']) =>
    `MaxVio ${maxVio.toFixed(2)}, entropy ${entropy.toFixed(3)}, ${dead} dead`;
  const router = ({ kept, oracleKept, overlap }: (typeof t.router)['before']) =>
    `keeps ${percent(kept)} of the energy (best possible ${percent(oracleKept)}), finds ${percent(overlap)} of the best experts`;
  return [
    `Layer error (routed output, held-out tokens): ${percent(t.error)}; pruned by REAP ${percent(t.reap)}, by frequency ${percent(t.frequency)}, at random ${percent(t.random)}`,
    `Load before: ${load(t.load.before)}; after: ${load(t.load.after)}`,
    `Router before: ${router(t.router.before)}; after: ${router(t.router.after)}`,
    ...(t.unused > 0 ? [`${t.unused} of ${experts * layers.length} experts saw no calibration token: they count as worth nothing. More or more varied text may know better.`] : []),
  ]; // prettier-ignore
}

/** One line about a layer, for progress. */
export function detailOf(layer: SurgeryLayer | undefined): string {
  if (!layer) return 'has no experts';
  const { errors, load } = layer;
  return `layer error ${percent(errors.output)} (pruned at random ${percent(errors.random)}), MaxVio ${load.after.maxVio.toFixed(2)}`;
}
