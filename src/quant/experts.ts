import type { ExpertsCall } from '../nn/calls.js';
import type { Site } from '../arch/stream.js';
import { unary } from '../tensor/ops.js';
import { Scope, Tensor } from '../tensor/tensor.js';
import { blend, captureAll, captureExperts, countTokens, statisticsOf, type Evidence } from './capture.js';
import type { ExpertCoverage } from './report.js';

/** Bytes that the Hessians of one go over the batches may take. */
const hessianBudget = 2 ** 30;
/** An expert with less than this many tokens a channel, or less than this share of all, is starved. */
const tokensPerChannel = 2;
const leastShare = 0.005;

/**
 * Statistics of the routed experts of one layer. Tokens go where the router sends them. An expert that sees few has a
 * noisy Hessian: it is drawn towards a calmer one by a share that falls to zero at 2 K tokens (or 0.5% of all). Before
 * gate and up that is the Hessian of the whole layer's tokens, which is what the expert would see if it were asked more
 * often; before down_proj, where channels of different experts have nothing in common, its own diagonal.
 */
export class ExpertStatistics {
  private constructor(
    readonly coverage: ExpertCoverage,
    /** Rows before the layer's experts: tokens times experts a token. */
    readonly rows: number,
    readonly inner: boolean,
  ) {}

  /** At the first experts call of a block, and at the second given what the first knew. */
  static async at(site: Site, experts: number, before: ExpertStatistics | undefined): Promise<ExpertStatistics> {
    if (before) return new ExpertStatistics(before.coverage, before.rows, true);
    const tokens = await countTokens(site, experts);
    const rows = tokens.reduce((sum, count) => sum + count, 0);
    const k = (site.linears as ExpertsCall['linears'])[0]![0]!.inFeatures;
    const starved = tokens.filter((count) => count < enough(k, site.tokens)).length;
    const uncovered = tokens.filter((count) => count === 0).length;
    const layer = site.block.index;
    return new ExpertStatistics({ layer, experts, tokens, starved, uncovered }, rows, false);
  }

  /** Hands out each expert with the evidence for it, in order; the evidence lives until the handler is done. */
  async each(site: Site, handle: (expert: number, evidence: Evidence) => Promise<void>): Promise<void> {
    const linears = site.linears as ExpertsCall['linears'];
    const { tokens } = this.coverage;
    const k = linears[0]![0]!.inFeatures;
    const device = site.weights.stack(linears[0]!).device;
    using layer = new Scope(device);
    const needed = enough(k, site.tokens);
    const shared = !this.inner && tokens.some((count) => count < needed);
    const common = shared && this.rows > 0 ? await captureAll(site, this.rows, layer) : undefined;
    const step = Math.max(1, Math.floor(hessianBudget / (k * k * 4)));
    for (let from = 0; from < tokens.length; from += step) {
      using scope = new Scope(device);
      const to = Math.min(tokens.length, from + step);
      const hessians = await captureExperts(site, from, to, tokens, scope);
      for (let e = from; e < to; e++) {
        using work = new Scope(device);
        await handle(e, await this.#evidence(work, e, hessians.at(e - from), common, needed, linears[0]![e]!.name));
      }
    }
  }

  async #evidence(
    scope: Scope,
    expert: number,
    h: Tensor,
    common: Tensor | undefined,
    needed: number,
    name: string,
  ): Promise<Evidence> {
    const tokens = this.coverage.tokens[expert]!;
    if (tokens === 0) {
      const statistics = common && (await statisticsOf(common, 0, scope, name));
      const how = statistics ? 'rounded, weighted with the whole layer’s inputs' : 'rounded without statistics';
      return { statistics, roundOnly: true, tokens, note: `no calibration token reached this expert: ${how}` };
    }
    const share = Math.max(0, 1 - tokens / needed);
    if (share === 0) return { statistics: await statisticsOf(h, tokens, scope, name), tokens };
    if (common) blend(h, common, share);
    else shrinkToDiagonal(scope, h, share);
    const statistics = await statisticsOf(h, tokens, scope, name);
    const towards = common ? 'the whole layer’s' : 'its diagonal';
    const note = `${tokens} tokens: Hessian drawn ${Math.round(100 * share)}% towards ${towards}`;
    return { statistics, tokens, note };
  }
}

const enough = (channels: number, tokens: number): number => Math.max(tokensPerChannel * channels, leastShare * tokens);

/** Off-diagonal elements times (1 - share). */
function shrinkToDiagonal(scope: Scope, h: Tensor, share: number): void {
  const k = h.dim(0);
  const diagonal = new Tensor(h.storage, h.byteOffset, 'f32', [k], [k + 1]);
  const kept = unary(scope, 'affine', diagonal, 1, 0, scope.empty('f32', [k]));
  unary(scope, 'affine', h, 1 - share, 0, h);
  unary(scope, 'affine', kept, 1, 0, diagonal);
}
