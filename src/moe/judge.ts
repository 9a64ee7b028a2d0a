import { binary, gather, gemm, normAdd, reduce, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { bestWithin } from './groups.js';
import { membership } from './masks.js';
import type { Measured } from './measured.js';
import { choose, scoresOf, type Router } from './choose.js';
import { heldPart } from './sample.js';
import { energies } from './score.js';
import type { Choice } from './shape.js';

/** |a - b|^2 / |b|^2 over all rows. */
export async function relativeError(a: Tensor, b: Tensor): Promise<number> {
  using s = new Scope(a.device);
  const sums = s.zeros('f32', [2, 2]);
  normAdd(sums.at(0), binary(s, 'sub', a, b));
  normAdd(sums.at(1), b);
  const [difference, , size] = await sums.float32();
  return difference! / Math.max(size!, 1e-30);
}

/** How tokens spread over the routed experts. */
export interface Load {
  /** Share of the tokens that use each expert. */
  readonly share: readonly number[];
  /** max / mean - 1 (Wang et al. 2024). */
  readonly maxVio: number;
  /** Of the shares, in parts of the entropy of a uniform spread. */
  readonly entropy: number;
  /** Experts that fewer than 0.1 / R of the choices take. */
  readonly dead: number;
}

export function loadOf(idx: Int32Array, active: number, experts: number): Load {
  const counts = new Array<number>(experts).fill(0);
  for (const expert of idx) counts[expert]! += 1;
  const total = idx.length;
  const part = counts.map((count) => count / total);
  const entropy = part.reduce((sum, p) => sum - (p > 0 ? p * Math.log(p) : 0), 0);
  return {
    share: part.map((p) => p * active),
    maxVio: Math.max(...part) * experts - 1,
    entropy: experts > 1 ? entropy / Math.log(experts) : 1,
    dead: part.filter((p) => p < 0.1 / experts).length,
  };
}

/** How the experts that are chosen compare with the best ones. */
export interface Kept {
  /** Share of the routed experts' energy that the chosen ones keep, and that the best choice would keep. */
  readonly kept: number;
  readonly oracleKept: number;
  /** Share of the best K experts that are chosen. */
  readonly overlap: number;
}

/** What the router does on tokens that it was not fitted to. */
export interface RouterJudgement extends Kept {
  readonly load: Load;
}

/** The K experts with the largest energies, f32 [T, R], of each token (ties to the lower index), as far as a limit lets it: i32 [T, K]. */
export async function bestExperts(s: Scope, energy: Tensor, { active, limit }: Choice): Promise<Tensor> {
  if (limit) {
    const best = bestWithin(await energy.float32(), energy.dim(1), { active, limit });
    return s.from('i32', [energy.dim(0), active], best);
  }
  using work = new Scope(s.device);
  const top = unary(work, 'clamp', reduce(work, 'max', energy, 1), 1e-30, Infinity);
  return choose(s, binary(work, 'div', energy, top.view(-1, 1)), { active });
}

/** `energy` f32 [T, R]: the energies of the experts on the tokens `x` [T, C]. */
export async function judgeRouter(x: Tensor, energy: Tensor, router: Router, choice: Choice): Promise<RouterJudgement> {
  using s = new Scope(x.device);
  const chosen = await choose(s, scoresOf(s, x, router), choice).int32();
  return {
    load: loadOf(chosen, choice.active, energy.dim(1)),
    ...(await keptBy(energy, chosen, choice)),
  };
}

/** Of `chosen` [T, K], the experts of each token, by their energies f32 [T, R]. */
export async function keptBy(energy: Tensor, chosen: Int32Array, choice: Choice): Promise<Kept> {
  const { active } = choice;
  const [tokens, experts] = energy.shape as [number, number];
  using s = new Scope(energy.device);
  const values = await energy.float32();
  const best = await (await bestExperts(s, energy, choice)).int32();
  let [all, kept, oracle, both] = [0, 0, 0, 0];
  for (let i = 0; i < values.length; i++) all += values[i]!;
  /** The last token that each expert was chosen for. */
  const lastOf = new Int32Array(experts).fill(-1);
  for (let i = 0; i < chosen.length; i++) {
    const token = Math.floor(i / active);
    kept += values[token * experts + chosen[i]!]!;
    lastOf[chosen[i]!] = token;
    if (i % active < active - 1) continue;
    for (let k = token * active; k < (token + 1) * active; k++) {
      oracle += values[token * experts + best[k]!]!;
      if (lastOf[best[k]!] === token) both++;
    }
  }
  return {
    kept: kept / Math.max(all, 1e-30),
    oracleKept: oracle / Math.max(all, 1e-30),
    overlap: both / (tokens * active),
  };
}

/** Energies of the routed experts on held-out tokens: f32 [held, R]. */
export function heldEnergies(
  s: Scope,
  { sample, norms }: Measured,
  rest: Int32Array,
  expertOf: Int32Array,
  experts: number,
): Tensor {
  const z = gather(s, energies(s, heldPart(sample).h, norms), s.from('i32', [rest.length], rest), 1);
  return gemm(s, z, membership(s, expertOf, experts));
}
