import { Random } from '../base/rng.js';
import { adamw, binary, cast, choiceGradient, cholesky, choleskySolve, copyInto, gather, gemm, hessianAdd, matmulT, reduce, unary } from '../tensor/ops.js'; // prettier-ignore
import { Scope, type Tensor } from '../tensor/tensor.js';
import { ConvertError } from '../base/errors.js';
import type { Router } from './choose.js';
import { limitedGradient } from './groups.js';
import { columnMeans } from './score.js';
import type { Choice } from './shape.js';

export interface RouterOptions extends Choice {
  /** Whether there is a bias to put the intercept into. */
  readonly intercept: boolean;
  /** Ridge penalty relative to the mean of the diagonal of X'X. */
  readonly lambda: number;
  readonly seed: number;
}

/** Steps, batch and step size of `train`. */
const batchTokens = 1024;
const learningRate = 0.05;
/** Temperature of the soft choice at start and end, in standard deviations of the scores. */
const [warm, cool] = [1, 0.25];

/**
 * Fits linear routers to a layer's hidden states. X'X is factored once; `ridge` regresses the experts' contribution
 * norms on the hidden states, `train` goes on to maximise the energy that the chosen K experts keep.
 */
export class RouterFitter {
  readonly #scope: Scope;
  readonly #options: RouterOptions;
  /** f32 [T, C]: the hidden states less their mean (less nothing without an intercept). */
  readonly #x: Tensor;
  readonly #mean: Tensor;
  readonly #factor: Tensor;

  private constructor(scope: Scope, options: RouterOptions, x: Tensor, mean: Tensor, factor: Tensor) {
    [this.#scope, this.#options, this.#x, this.#mean, this.#factor] = [scope, options, x, mean, factor];
  }

  /** `x` f32 [T, C]. What the fitter keeps lives in `scope`. */
  static async make(scope: Scope, x: Tensor, options: RouterOptions): Promise<RouterFitter> {
    const c = x.dim(1);
    const mean = options.intercept ? columnMeans(scope, x) : scope.zeros('f32', [c]);
    const centred = binary(scope, 'sub', x, mean.view(1, c));
    using work = new Scope(scope.device);
    const h = work.zeros('f32', [c, c]);
    hessianAdd(h, centred, { alpha: 1 / x.dim(0) });
    const { factor, info } = cholesky(scope, h, options.lambda);
    if ((await info.int32())[0] !== 0) {
      throw new ConvertError('internal', 'The hidden states of a layer have no factor even with the ridge penalty', {
        hint: 'They are not finite: validate the source checkpoint.',
      });
    }
    scope.free(info);
    return new RouterFitter(scope, options, centred, mean, factor);
  }

  /**
   * Ridge regression on t f32 [T, R] (a column an expert, e.g. |W_down,e h_e|): W = (X'X + lambda I)^-1 X'T, scaled so
   * that scores have deviation 1. Without an intercept each token's mean over the experts is taken off first, which
   * changes no ranking.
   */
  async ridge(scope: Scope, t: Tensor): Promise<Router> {
    using work = new Scope(scope.device);
    const { intercept } = this.#options;
    const mean = intercept ? columnMeans(work, t) : reduce(work, 'mean', t, 1);
    const centred = binary(work, 'sub', t, intercept ? mean.view(1, -1) : mean.view(-1, 1));
    const right = gemm(work, this.#x.transpose(), centred, { alpha: 1 / t.dim(0) });
    const solution = choleskySolve(work, this.#factor, right);
    const weight = scope.empty('f32', [t.dim(1), this.#x.dim(1)]);
    copyInto(weight, solution.transpose());
    const bias = intercept ? mean : work.zeros('f32', [t.dim(1)]);
    const scale = 1 / Math.max(await deviation(work, matmulT(work, this.#x, weight, { bias })), 1e-20);
    unary(work, 'affine', weight, scale, 0, weight);
    return this.#uncentre(scope, weight, unary(work, 'affine', bias, scale, 0));
  }

  /** The bias that goes with raw hidden states: b - W mean. */
  #uncentre(scope: Scope, weight: Tensor, centredBias: Tensor): Router {
    const shift = matmulT(scope, this.#mean.view(1, -1), weight).view(-1);
    return { weight, bias: binary(scope, 'sub', centredBias, shift, { out: shift }) };
  }

  /**
   * Adam on the energy that a soft choice of K experts loses: per token sum_e p_e c_e is raised, where p = sigmoid((s -
   * tau) / temperature), tau such that sum p = K, c f32 [T, R] the experts' energies. Starts from `start`, whose
   * scores have deviation 1.
   */
  async train(scope: Scope, start: Router, c: Tensor, steps: number): Promise<Router> {
    const { active, limit, seed, intercept } = this.#options;
    const [tokens, experts] = c.shape as [number, number];
    if (active >= experts || steps === 0) return { weight: cast(scope, start.weight, 'f32'), bias: cast(scope, start.bias, 'f32') }; // prettier-ignore
    using state = new Scope(scope.device);
    const x = this.#x;
    const { weight, bias, unit } = await this.#centred(scope, state, start);
    const adam = [weight, bias].map((p) => new Adam(state, p));
    const random = new Random(seed, 2);
    const batch = Math.min(batchTokens, tokens);
    const gain = 1 / Math.max((await total(state, 'sum', c)) / tokens, 1e-30);
    const draws = Int32Array.from({ length: steps * batch }, () => random.below(tokens));
    const batches = state.from('i32', [steps, batch], draws);
    for (let step = 1; step <= steps; step++) {
      using work = new Scope(scope.device);
      const progress = (step - 1) / steps;
      const temperature = warm * (cool / warm) ** progress;
      const rate = learningRate * 0.5 * (1 + Math.cos(Math.PI * progress));
      const idx = batches.at(step - 1);
      const xb = gather(work, x, idx);
      const scores = matmulT(work, xb, weight, { bias });
      const soft = { active, temperature, scale: -gain / batch };
      const worth = gather(work, c, idx);
      const gradient = limit ? limitedGradient(work, scores, worth, { ...soft, limit }) : choiceGradient(work, scores, worth, soft); // prettier-ignore
      adam[0]!.step(gemm(work, gradient.transpose(), xb), step, rate * unit);
      if (intercept) adam[1]!.step(reduce(work, 'sum', gradient, 0), step, rate);
    }
    return this.#uncentre(scope, weight, bias);
  }

  /** Weights and bias for centred hidden states; `unit`: deviation of the weights. */
  async #centred(scope: Scope, state: Scope, start: Router) {
    const weight = cast(scope, start.weight, 'f32');
    const shift = matmulT(state, this.#mean.view(1, -1), weight).view(-1);
    const bias = binary(state, 'add', start.bias, shift);
    return { weight, bias, unit: Math.max(await deviation(state, weight), 1e-20) };
  }
}

/** Of all values of a matrix, or of their squares. */
async function total(s: Scope, kind: 'sum' | 'sumsq', x: Tensor): Promise<number> {
  return (await reduce(s, 'sum', reduce(s, kind, x, 1).view(1, -1), 1).float32())[0]!;
}

/** Standard deviation of all values. */
async function deviation(s: Scope, x: Tensor): Promise<number> {
  const [mean, square] = [(await total(s, 'sum', x)) / x.count, (await total(s, 'sumsq', x)) / x.count];
  return Math.sqrt(Math.max(square - mean * mean, 0));
}

/** Adam (Kingma & Ba 2015) without decay, in place; the betas are those of a short run. */
class Adam {
  readonly #m: Tensor;
  readonly #v: Tensor;

  constructor(
    s: Scope,
    readonly p: Tensor,
  ) {
    this.#m = s.zeros('f32', p.shape);
    this.#v = s.zeros('f32', p.shape);
  }

  step(g: Tensor, step: number, lr: number): void {
    adamw(this.p, this.#m, this.#v, g, { step, lr, beta1: 0.9, beta2: 0.98, eps: 1e-10 });
  }
}
