import type { Json } from '../base/job.js';
import type { Balanced } from './balance.js';
import type { Exactness } from './exactness.js';
import type { BaselineErrors } from './baseline-errors.js';
import type { RouterJudgement } from './judge.js';
import type { MoePlan } from './plan.js';
import type { SharedSearch } from './search-shared.js';

/** Errors |y' - y|^2 / |y|^2 of the feed-forward output on held-out tokens. */
export interface OwnErrors {
  /** With the routing's choice of experts and the dense weights. */
  readonly routed: number;
  /** With down_proj refitted; absent when the refit was not asked for or did not help. */
  readonly refit?: number;
  /** If the best experts were chosen for each token. */
  readonly oracle: number;
}

/** What became of one layer. */
export interface LayerReport {
  readonly block: number;
  /** Tokens that the split and the router were fitted to, and held-out ones. */
  readonly tokens: number;
  readonly held: number;
  readonly router: RouterJudgement;
  /** Where the load was balanced: on the tokens that it was balanced on, and what the router as fitted does on held-out ones. */
  readonly balance?: Omit<Balanced, 'router'> & {
    readonly before: RouterJudgement;
    /** `errors.routed` of it. */
    readonly error: number;
  };
  readonly errors: OwnErrors & BaselineErrors;
  readonly refitLambda?: number;
  readonly seconds: Readonly<Record<string, number>>;
}

export interface MoeReport {
  readonly out: string;
  readonly plan: MoePlan;
  readonly layers: readonly LayerReport[];
  /** Logits with all experts on against the dense model's: the pure split, and the output as it is. */
  readonly exactness: { readonly split: Exactness; readonly output: Exactness } | undefined;
  readonly refit: boolean;
  /** Where the number of shared experts was searched. */
  readonly sharedSearch?: SharedSearch;
  readonly calibration: string | undefined;
  readonly notices: readonly string[];
  readonly resumed: boolean;
  readonly seconds: number;
}

export const toJson = (value: unknown): Json => JSON.parse(JSON.stringify(value)) as Json;
export const layerFromJson = (json: Json): LayerReport => json as unknown as LayerReport;

export const mean = (values: readonly number[]): number =>
  values.length === 0 ? 0 : values.reduce((a, b) => a + b, 0) / values.length;

/** Means over the layers, for people and for the provenance. */
export interface Totals {
  readonly routed: number;
  /** Of the output: refitted where that was kept. */
  readonly output: number;
  readonly oracle: number;
  readonly staticBias: number;
  readonly staticRefit: number;
  readonly randomSplit: number;
  readonly cmoe: number;
  readonly kept: number;
  readonly oracleKept: number;
  readonly overlap: number;
  readonly maxVio: number;
  readonly entropy: number;
  readonly dead: number;
  readonly refitLayers: number;
  /** The same of the routers as they were fitted, where their loads were balanced; the largest MaxVio of a layer on the tokens that were balanced. */
  readonly unbalanced?: {
    readonly routed: number;
    readonly maxVio: number;
    readonly entropy: number;
    readonly dead: number;
    readonly worst: readonly [before: number, after: number];
    readonly bound: number;
  };
}

export function totalsOf(layers: readonly LayerReport[]): Totals {
  const over = (read: (layer: LayerReport) => number) => mean(layers.map(read));
  return {
    routed: over(({ errors }) => errors.routed),
    output: over(({ errors }) => errors.refit ?? errors.routed),
    oracle: over(({ errors }) => errors.oracle),
    staticBias: over(({ errors }) => errors.staticBias),
    staticRefit: over(({ errors }) => errors.staticRefit),
    randomSplit: over(({ errors }) => errors.randomSplit),
    cmoe: over(({ errors }) => errors.cmoe),
    kept: over(({ router }) => router.kept),
    oracleKept: over(({ router }) => router.oracleKept),
    overlap: over(({ router }) => router.overlap),
    maxVio: over(({ router }) => router.load.maxVio),
    entropy: over(({ router }) => router.load.entropy),
    dead: layers.reduce((sum, { router }) => sum + router.load.dead, 0),
    refitLayers: layers.filter(({ errors }) => errors.refit !== undefined).length,
    ...unbalancedTotals(layers),
  };
}

function unbalancedTotals(layers: readonly LayerReport[]): Pick<Totals, 'unbalanced'> {
  const balances = layers.flatMap(({ balance }) => balance ?? []);
  const [first] = balances;
  if (!first) return {};
  const over = (read: (balance: (typeof balances)[number]) => number) => mean(balances.map(read));
  const worst = (when: 0 | 1) => Math.max(...balances.map(({ maxVio }) => maxVio[when]));
  return {
    unbalanced: {
      routed: over(({ error }) => error),
      maxVio: over(({ before }) => before.load.maxVio),
      entropy: over(({ before }) => before.load.entropy),
      dead: balances.reduce((sum, { before }) => sum + before.load.dead, 0),
      worst: [worst(0), worst(1)],
      bound: first.bound,
    },
  };
}

const percent = (x: number, digits = 1): string => `${(100 * x).toFixed(digits)}%`;

/** Lines for people. */
export function summary(report: MoeReport): string[] {
  const { plan, layers, exactness } = report;
  const lines: string[] = [];
  if (exactness) {
    const { split, output } = exactness;
    lines.push(`${plan.method === 'split' ? 'All experts on' : 'As copies'}: logits differ from the dense model's by ${split.relative.toExponential(1)} (relative, ${split.tokens} tokens)`); // prettier-ignore
    if (plan.method === 'drop') lines.push(`  with neurons drawn anew: ${output.relative.toExponential(1)}`);
    if (report.refit) lines.push(`  after the refit, which is made for ${plan.shape.active} active experts: ${output.relative.toExponential(1)}`); // prettier-ignore
  }
  if (plan.method === 'split' && layers.length > 0 && plan.shape.active < plan.shape.routed) {
    const t = totalsOf(layers);
    lines.push(
      `Layer error at ${plan.shape.active} of ${plan.shape.routed} experts: ${percent(t.output)}${t.refitLayers > 0 ? ` (before the refit ${percent(t.routed)})` : ''}; best choice of experts ${percent(t.oracle)}`,
      `  same budget: static mask with bias ${percent(t.staticBias)}, refitted ${percent(t.staticRefit)}; random split ${percent(t.randomSplit)}; after CMoE ${percent(t.cmoe)}`,
      `Router: keeps ${percent(t.kept)} of the energy (best possible ${percent(t.oracleKept)}), finds ${percent(t.overlap, 0)} of the best experts; MaxVio ${t.maxVio.toFixed(2)}, entropy ${t.entropy.toFixed(3)}, ${t.dead} dead`,
      ...(t.unbalanced ? balanceLines(t, t.unbalanced) : []),
    );
  }
  return lines;
}

/** What balancing the load did and cost. */
function balanceLines(
  t: Totals,
  { bound, worst, maxVio, entropy, dead, routed }: NonNullable<Totals['unbalanced']>,
): string[] {
  const missed = worst[1] > bound ? `: not reached in every layer, the largest is ${worst[1].toFixed(3)}` : '';
  return [
    `Balanced to MaxVio ${bound} on calibration text (before at most ${worst[0].toFixed(2)})${missed}`,
    `  on held-out text before: MaxVio ${maxVio.toFixed(2)}, entropy ${entropy.toFixed(3)}, ${dead} dead; layer error ${percent(routed, 2)}, now ${percent(t.routed, 2)}, both before a refit`,
  ];
}

export const describeSearch = ({ layers, tokens, trials, best }: SharedSearch): string =>
  `Shared experts: ${best.shared}, by the held-out error of layers ${layers.join(', ')} on ${tokens} tokens: ${trials.map(({ shared, error }) => `${shared} ${percent(error, 2)}`).join(', ')}`;

/** One line about a layer, for progress. */
export function detailOf(layer: LayerReport | undefined): string {
  if (!layer) return 'stays dense';
  const { errors, router } = layer;
  const refit = errors.refit === undefined ? '' : `, refitted ${percent(errors.refit)}`;
  return `layer error ${percent(errors.routed)}${refit} (static mask ${percent(errors.staticBias)}), ${percent(router.kept)} of the energy kept`;
}
