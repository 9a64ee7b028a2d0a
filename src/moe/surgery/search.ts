import type { MoeLayerSpec } from '../../nn/moe.js';
import { binary, cast, gemm, matmulT, route } from '../../tensor/ops.js';
import { Scope, type Tensor } from '../../tensor/tensor.js';
import { allOutputs, eachPart, rowsFor, type RoutedWeights } from './layer.js';

/** Takes the place of the logits and biases of experts that are gone: their weight is zero, and nobody chooses them. */
const gone = -1e30;
/** Rounds at most; where there is more to remove, each round removes several. */
const mostRounds = 32;

/**
 * The experts that a layer misses least, by trying: in each round every expert that is left is taken away once, the tokens
 * that had chosen it go where the router sends them then, and what raises the layer's error least is gone for good. (Lu
 * et al. 2024 try all subsets of eight experts; this is the greedy way to it.) Ascending, the same number of each group.
 * `x` f32 [T, C] are the tokens to try on.
 */
export async function searchExperts(
  m: MoeLayerSpec,
  w: RoutedWeights,
  x: Tensor,
  keep: number,
  groups: number,
): Promise<number[]> {
  using scope = new Scope(x.device);
  const experts = m.experts.length;
  const logits = scope.empty('f32', [x.dim(0), experts]);
  const trial = new Trial(m, w, logits, await innerProducts(m, w, x, logits));
  await trial.begin();
  const left = new Set(Array.from({ length: experts }, (_, e) => e));
  const groupOf = (e: number) => Math.floor((e * groups) / experts);
  const room = new Array<number>(groups).fill((experts - keep) / groups);
  const atOnce = Math.ceil((experts - keep) / mostRounds);
  while (left.size > keep) {
    const costs: [expert: number, cost: number][] = [];
    for (const e of left) if (room[groupOf(e)]! > 0) costs.push([e, await trial.error(left, e)]);
    costs.sort(([a, x], [b, y]) => x - y || a - b);
    const enough = Math.max(keep, left.size - atOnce);
    for (const [e] of costs) {
      if (left.size === enough || room[groupOf(e)] === 0) continue;
      left.delete(e);
      room[groupOf(e)]! -= 1;
    }
  }
  return [...left];
}

/** E_i(x) E_j(x) for each token, [T, E, E]; writes the router's logits beside it. */
async function innerProducts(m: MoeLayerSpec, w: RoutedWeights, x: Tensor, logits: Tensor): Promise<Float32Array> {
  const experts = m.experts.length;
  const all = new Float32Array(x.dim(0) * experts * experts);
  await eachPart(
    x,
    w,
    async (s, part, from) => {
      const rows = part.dim(0);
      matmulT(s, part, w.router, { out: logits.slice(0, from, from + rows) });
      const outputs = cast(s, allOutputs(s, m, w, part).transpose(0, 1), 'f32'); // [T, E, C]
      all.set(await gemm(s, outputs, outputs.transpose()).float32(), from * experts * experts);
    },
    rowsFor(experts, x.dim(1)),
  );
  return all;
}

/** |y' - y|^2 summed over the tokens, for any set of experts: with y = sum g_i E_i inner products are all it takes. */
class Trial {
  readonly #experts: number;
  /** Of the whole layer, for each token: y E_i(x) [T, E], and |y|^2. */
  #along = new Float32Array(0);
  #size = 0;

  constructor(
    readonly m: MoeLayerSpec,
    readonly w: RoutedWeights,
    readonly logits: Tensor,
    readonly products: Float32Array,
  ) {
    this.#experts = m.experts.length;
  }

  async begin(): Promise<void> {
    const experts = this.#experts;
    const { weights, idx } = await this.#choose(new Float32Array(experts));
    this.#along = new Float32Array(this.logits.dim(0) * experts);
    const k = this.m.route.topK;
    for (let slot = 0; slot < idx.length; slot++) {
      const [t, g] = [Math.floor(slot / k), weights[slot]!];
      const row = (t * experts + idx[slot]!) * experts;
      for (let e = 0; e < experts; e++) this.#along[t * experts + e]! += g * this.products[row + e]!;
    }
    for (let slot = 0; slot < idx.length; slot++) {
      this.#size += weights[slot]! * this.#along[Math.floor(slot / k) * experts + idx[slot]!]!;
    }
  }

  /** With the experts of `left` but one. */
  async error(left: ReadonlySet<number>, without: number): Promise<number> {
    const experts = this.#experts;
    const mask = Float32Array.from({ length: experts }, (_, e) => (left.has(e) && e !== without ? 0 : gone));
    const { weights, idx } = await this.#choose(mask);
    const k = this.m.route.topK;
    let error = this.#size;
    for (let start = 0; start < idx.length; start += k) {
      const t = start / k;
      for (let a = start; a < start + k; a++) {
        const row = (t * experts + idx[a]!) * experts;
        let own = -2 * this.#along[t * experts + idx[a]!]!;
        for (let b = start; b < start + k; b++) own += weights[b]! * this.products[row + idx[b]!]!;
        error += weights[a]! * own;
      }
    }
    return error;
  }

  async #choose(mask: Float32Array): Promise<{ weights: Float32Array; idx: Int32Array }> {
    using s = new Scope(this.logits.device);
    const add = s.from('f32', [1, mask.length], mask);
    const bias = this.w.bias && binary(s, 'add', this.w.bias, add.view(-1));
    const { w, idx } = route(s, binary(s, 'add', this.logits, add), { ...this.m.route, ...(bias && { bias }) });
    return { weights: await w.float32(), idx: await idx.int32() };
  }
}
