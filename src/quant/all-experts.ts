import type { ExpertsCall } from '../nn/calls.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { Site } from '../arch/stream.js';
import { copyInto, gather, hessianAdd, matmulT, swiglu, symmetrize } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { captureAll, statisticsOf, type Evidence } from './capture.js';
import type { ExpertCoverage } from './report.js';

/**
 * `--calibrate-all-experts`: every expert is calibrated on every token, as if the router sent all of them everywhere;
 * what the model computes with stays as routed. Before gate and up all experts then share one Hessian; before down_proj
 * each has its own, from its (already quantized) gate and up on all tokens. Those are gathered while gate and up are at
 * hand and kept until down_proj comes: E width^2 floats.
 */
export class AllExpertStatistics {
  readonly #scope: Scope;
  /** Before down_proj: [E, width, width]. */
  #inner: Tensor | undefined;
  #second = false;

  constructor(
    site: Site,
    readonly coverage: ExpertCoverage,
  ) {
    this.#scope = new Scope(site.weights.stack((site.linears as ExpertsCall['linears'])[0]!).device);
  }

  async each(site: Site, handle: (expert: number, evidence: Evidence) => Promise<void>): Promise<void> {
    const linears = site.linears as ExpertsCall['linears'];
    const device = this.#scope.device;
    const name = (e: number) => linears[0]![e]!.name;
    if (this.#second) {
      for (let e = 0; e < this.coverage.experts; e++) {
        using work = new Scope(device);
        const statistics = await statisticsOf(this.#inner!.at(e), site.tokens, work, name(e));
        await handle(e, { statistics, tokens: site.tokens });
      }
      return;
    }
    this.#second = true;
    using scope = new Scope(device);
    const rows = this.coverage.tokens.reduce((sum, count) => sum + count, 0);
    const statistics = await statisticsOf(await captureAll(site, rows, scope), site.tokens, scope, name(0));
    for (let e = 0; e < this.coverage.experts; e++) await handle(e, { statistics, tokens: site.tokens });
    await this.#gatherInner(site);
  }

  async #gatherInner(site: Site): Promise<void> {
    const ffns = site.block.moe!.expertLinears;
    const width = ffns[0]!.down.inFeatures;
    const inner = this.#scope.zeros('f32', [ffns.length, width, width]);
    this.#inner = inner;
    await site.each(async (call) => {
      using work = new Scope(this.#scope.device);
      const x = everyToken(work, call as ExpertsCall);
      for (const [e, ffn] of ffns.entries()) {
        using one = new Scope(this.#scope.device);
        hessianAdd(inner.at(e), hidden(one, x, ffn, site), { alpha: 1 / site.tokens });
      }
      await this.#scope.device.sync();
    });
    symmetrize(inner);
  }

  [Symbol.dispose](): void {
    this.#scope[Symbol.dispose]();
  }
}

/** Each token of the batch once, in order: x [T, C] of its first expert's row. */
function everyToken(scope: Scope, { x, order }: ExpertsCall): Tensor {
  const first = scope.empty('i32', [order.place.dim(0), 1]);
  copyInto(first, order.place.slice(1, 0, 1));
  return gather(scope, x, first.view(-1));
}

function hidden(scope: Scope, x: Tensor, { gate, up, activation }: FfnSpec, { weights }: Site): Tensor {
  const y = (name: string) => matmulT(scope, x, weights.get(`${name}.weight`));
  return swiglu(scope, y(gate.name), y(up.name), activation);
}
