import { assign, gather, gemm, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { baselineSplit } from './baseline.js';
import { balanceLoad } from './balance.js';
import { choose, scoresOf, type Router } from './choose.js';
import { clusterNeurons } from './cluster.js';
import { groupExperts } from './groups.js';
import { maskOf, membership } from './masks.js';
import type { Measured } from './measured.js';
import type { RouterFitter } from './router.js';
import type { Restructured, SplitOptions } from './restructured.js';
import { evenRows } from './sample.js';
import { energies } from './score.js';
import type { Choice } from './shape.js';
import { chooseShared, evenCapacities } from './shared.js';
import { layOut, sharedNeurons } from './split.js';

/** Tokens that loads are balanced on in a round: enough for a bound of some percent. */
const balancedTokens = 8192;

/**
 * Divides a layer's neurons among shared and routed experts and fits the router. Neurons are clustered by when they
 * fire; then routing and membership improve each other: the router is fitted to the experts as they are, and every
 * neuron goes where the router's choices keep most of its energy (a balanced assignment of sum_t z_tn m_te). Each half
 * step raises the energy that survives routing, and experts end up being what a linear router can predict. Where routing
 * is limited to groups, experts that fire together are put into one before the rounds; where the load is to be balanced,
 * it is in every round.
 */
export async function restructure(scope: Scope, measured: Measured, options: SplitOptions): Promise<Restructured> {
  const { shape, seed, balance, kind = 'fitted' } = options;
  const { limit } = shape;
  if (kind !== 'fitted') return await baselineSplit(kind, scope, measured, options);
  using work = new Scope(scope.device);
  const { x, scores, fitter } = measured;
  const all = energies(work, measured.h, measured.norms);
  const { shared, rest } = chooseShared(scores, sharedNeurons(shape));
  const z = gather(work, all, work.from('i32', [rest.length], rest), 1);
  work.free(all);

  const capacities = evenCapacities(rest.length, shape.routed);
  let expertOf = await clusterNeurons(scope.device, z, capacities, seed);
  if (limit) {
    const router = await fitRouter(work, fitter, expertEnergies(work, z, expertOf, shape.routed), 0);
    expertOf = await groupExperts(expertOf, x, router, { active: shape.active, limit }, seed);
  }
  const prices = new Float64Array(shape.routed);
  const rounds = shape.active < shape.routed ? options.rounds : 0;
  const few = balance === undefined ? x : evenRows(work, x, balancedTokens);
  for (let round = 0; round < rounds; round++) {
    using step = new Scope(scope.device);
    const fitted = await fitRouter(step, fitter, expertEnergies(step, z, expertOf, shape.routed), options.steps);
    const router = balance === undefined ? fitted : (await balanceLoad(step, few, fitted, shape, balance)).router;
    expertOf = await reassign(step, z, x, router, capacities, shape, prices);
  }
  const router = await fitRouter(scope, fitter, expertEnergies(work, z, expertOf, shape.routed), options.finalSteps);
  const made = { split: layOut(shape, shared, rest, expertOf), router, scores, expertOf, rest };
  if (balance === undefined) return made;
  const { router: balanced, ...reached } = await balanceLoad(scope, x, router, shape, balance);
  return { ...made, router: balanced, balance: { ...reached, unbalanced: router } };
}

/** Energy of each expert on each token, f32 [T, R]. One factor is 0 or 1, the other one a measurement: TF32 will do. */
function expertEnergies(s: Scope, z: Tensor, expertOf: Int32Array, experts: number): Tensor {
  return gemm(s, z, membership(s, expertOf, experts), { fast: true });
}

async function fitRouter(scope: Scope, fitter: RouterFitter, energy: Tensor, steps: number): Promise<Router> {
  using work = new Scope(scope.device);
  const ridge = await fitter.ridge(steps === 0 ? scope : work, unary(work, 'sqrt', energy));
  return steps === 0 ? ridge : await fitter.train(scope, ridge, energy, steps);
}

/** Every neuron to the expert whose tokens, as routed, hold most of its energy. */
async function reassign(
  s: Scope,
  z: Tensor,
  x: Tensor,
  router: Router,
  capacities: Int32Array,
  choice: Choice,
  prices: Float64Array,
): Promise<Int32Array> {
  const mask = maskOf(s, choose(s, scoresOf(s, x, router), choice), capacities.length);
  return await assign(gemm(s, z.transpose(), mask, { fast: true }), capacities, prices);
}
