import { allEnded } from '../base/ended.js';
import type { CheckpointWriter } from '../checkpoint/types.js';
import type { Weights } from '../nn/calls.js';
import { copyInto, unary } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import type { NetworkNames } from './containers/types.js';
import { MadeWeights } from './exactness.js';
import type { MoePlan } from './plan.js';
import type { Experts } from './split.js';
import type { StoredRouter } from './store-router.js';

/** One converted layer as the container stores it. */
export class LayerStore {
  readonly #layer: string;

  /** `before`: the networks without what makes the output another model (refit, neurons drawn anew), where there was any. */
  constructor(
    readonly plan: MoePlan,
    readonly index: number,
    readonly networks: Experts,
    readonly router: StoredRouter,
    readonly before?: Experts,
  ) {
    this.#layer = plan.source.model.blocks[index]!.name;
  }

  /** Writes all its tensors beside each other: the device's transfers take turns anyway. */
  async write(writer: CheckpointWriter): Promise<void> {
    const { plan, networks, router } = this;
    const { container, shape } = plan;
    const writes: Promise<void>[] = [];
    const put = (name: string, x: Tensor) => writes.push(writer.write(name, x.source()));
    const putNetwork = (names: NetworkNames, w: { gate: Tensor; up: Tensor; down: Tensor }) => {
      for (const part of ['gate', 'up', 'down'] as const) put(`${names[part]}.weight`, w[part]);
    };
    put(`${container.router(this.#layer)}.weight`, router.weight);
    if (router.bias) put(container.bias!(this.#layer), router.bias);
    const { gate, up, down, shared } = networks;
    for (let e = 0; e < shape.routed; e++) {
      putNetwork(container.expert(this.#layer, e), { gate: gate.at(e), up: up.at(e), down: down.at(e) });
    }
    if (shared) putNetwork(container.sharedExpert!(this.#layer), shared);
    await allEnded(writes);
  }

  /**
   * The stored values in fp32, to be run by the container's own architecture with all experts on; `final`
   * false: with the networks of `before`. What the layer shares with the dense one comes from `dense`.
   */
  weights(s: Scope, dense: Weights, final: boolean): Weights {
    const { plan, networks, router, before } = this;
    const { container, shape, source, weighting, method } = plan;
    const made = new MadeWeights(dense);
    const names = Array.from({ length: shape.routed }, (_, e) => container.expert(this.#layer, e));
    // A container that divides by the number of active experts would be written with another factor for all of them.
    const factor = method === 'split' && weighting.normalized ? shape.routed / shape.active : 1;
    const { gate, up, down, shared } = final ? networks : (before ?? networks);
    made.addStack(names.map((n) => `${n.gate}.weight`), scaled(s, gate, 1)); // prettier-ignore
    made.addStack(names.map((n) => `${n.up}.weight`), scaled(s, up, 1)); // prettier-ignore
    made.addStack(names.map((n) => `${n.down}.weight`), scaled(s, down, factor)); // prettier-ignore
    if (shared) {
      const name = container.sharedExpert!(this.#layer);
      made.add(`${name.gate}.weight`, scaled(s, shared.gate, 1));
      made.add(`${name.up}.weight`, scaled(s, shared.up, 1));
      made.add(`${name.down}.weight`, scaled(s, shared.down, 1));
    }
    made.add(`${container.router(this.#layer)}.weight`, router.weight);
    if (router.bias) made.add(container.bias!(this.#layer), router.bias);
    addConstants(s, made, plan, this.index, !source.dense.includes(this.index));
    return made;
  }
}

/** Adds the zeros that the container wants in a layer. */
export function addConstants(s: Scope, made: MadeWeights, plan: MoePlan, index: number, converted: boolean): void {
  const { container, source } = plan;
  const layer = source.model.blocks[index]!.name;
  for (const { name, shape } of container.constants(layer, source, converted)) made.add(name, s.zeros('f32', shape));
}

/** x times `factor` in fp32. */
function scaled(s: Scope, x: Tensor, factor: number): Tensor {
  const y = s.empty('f32', x.shape);
  copyInto(y, x);
  return factor === 1 ? y : unary(s, 'affine', y, factor, 0, y);
}
