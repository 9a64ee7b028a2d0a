import type { Block } from '../../arch/types.js';
import { badInput } from '../../base/errors.js';
import type { FfnSpec } from '../../nn/mlp.js';
import type { MoeLayerSpec } from '../../nn/moe.js';
import type { GraphBuilder } from './builder.js';
import { addQuantizedExperts, quantizedExperts, type Routing } from './experts.js';
import { addFused, addLinear, pathOf, type StoredLinears } from './linear.js';

const folder = (name: string): string => name.slice(0, name.lastIndexOf('.'));

/** down(act(gate(x)) up(x)). */
function addFfn(g: GraphBuilder, linears: StoredLinears, ffn: FfnSpec, x: string): string {
  const path = pathOf(folder(ffn.gate.name));
  const fused = addFused(g, linears, 'gate-up', [ffn.gate, ffn.up], x);
  const sizes = [ffn.gate, ffn.up].map((linear) => linears.of(linear).stored.outFeatures);
  const [gate, up] = fused
    ? (g.split(fused, `${path}/gate_up/Split`, sizes) as [string, string])
    : [addLinear(g, linears, ffn.gate, x), addLinear(g, linears, ffn.up, x)];
  let active: string;
  if (ffn.activation === 'silu') {
    active = g.node('Mul', `${path}/act_fn/Mul`, [gate, g.node('Sigmoid', `${path}/act_fn/Sigmoid`, [gate])]);
  } else {
    const approximate = { text: ffn.activation === 'gelu_tanh' ? 'tanh' : 'none' };
    active = g.node('Gelu', `${path}/act_fn/Gelu`, [gate], { attributes: { approximate } });
  }
  return addLinear(g, linears, ffn.down, g.node('Mul', `${path}/Mul`, [active, up]));
}

/** Indices of the k largest of the last dimension, and their values; the lower index first among equals. */
function topK(g: GraphBuilder, path: string, x: string, k: number): [values: string, indices: string] {
  return g.many('TopK', `${path}/TopK`, [x, g.ints([k])], { outputs: 2, attributes: { axis: { int: -1 } } }) as [string, string]; // prettier-ignore
}

const sum = (g: GraphBuilder, path: string, x: string, keep: boolean): string =>
  g.node('ReduceSum', `${path}/ReduceSum`, [x, g.ints([-1])], { attributes: { keepdims: { int: +keep } } });

/** Scores of experts outside of the best groups fall below all others (DeepSeek-V2, section 2.2.2). */
function limitToGroups(g: GraphBuilder, m: MoeLayerSpec, path: string, choice: string): string {
  const { groups = 1, topGroups = groups, groupScore } = m.route;
  if (groups <= 1) return choice;
  const size = m.experts.length / groups;
  const grouped = g.reshape(choice, `${path}/groups/Reshape`, [0, 0, groups, size]);
  const two = groupScore === 'top2' && size > 1;
  const best = topK(g, `${path}/groups/best`, grouped, two ? 2 : 1)[0];
  const [, chosen] = topK(g, `${path}/groups`, sum(g, `${path}/groups`, best, false), topGroups);
  const shape = g.node('Shape', `${path}/groups/Shape`, [grouped], { attributes: { start: { int: 0 }, end: { int: 3 } } }); // prettier-ignore
  const low = g.node('Expand', `${path}/groups/Expand`, [g.scalar(-1e30, 'f32'), shape]);
  const zeros = g.node('Mul', `${path}/groups/Mul`, [g.node('Cast', `${path}/groups/Cast`, [chosen], { attributes: { to: { int: 1 } } }), g.scalar(0, 'f32')]); // prettier-ignore
  const scatter = { attributes: { axis: { int: -1 } } };
  const mask = g.node('ScatterElements', `${path}/groups/ScatterElements`, [low, chosen, zeros], scatter);
  const column = g.node('Unsqueeze', `${path}/groups/Unsqueeze`, [mask, g.ints([-1])]);
  const limited = g.node('Add', `${path}/groups/Add`, [grouped, column]);
  return g.reshape(limited, `${path}/groups/Reshape`, [0, 0, m.experts.length]);
}

/** Scores of all experts before any choice, [B, S, E] in f32. */
function addRouterLogits(g: GraphBuilder, linears: StoredLinears, { router }: MoeLayerSpec, x: string): string {
  const raw = addLinear(g, linears, router, x);
  return g.dtype === 'f32' || !linears.of(router).scheme ? raw : g.cast(raw, `${pathOf(router.name)}/Cast`, 'f32');
}

/** The weight of each expert for each token, [B, S, E]: zero for those not chosen. */
function addRouterWeights(g: GraphBuilder, m: MoeLayerSpec, logits: string): string {
  const path = pathOf(m.router.name);
  const { scoring, topK: k, normalize, scale = 1 } = m.route;
  let scores: string;
  if (scoring === 'softmax')
    scores = g.node('Softmax', `${path}/Softmax`, [logits], { attributes: { axis: { int: -1 } } }); // prettier-ignore
  else if (scoring === 'sigmoid') scores = g.node('Sigmoid', `${path}/Sigmoid`, [logits]);
  else scores = g.node('Sqrt', `${path}/Sqrt`, [g.node('Softplus', `${path}/Softplus`, [logits])]);
  let choice = scores;
  if (m.routeBias !== undefined) {
    const planned = { name: m.routeBias, shape: [m.experts.length], dtype: 'f32' as const };
    choice = g.node('Add', `${path}/Add`, [scores, g.weight({ planned, origin: { kind: 'values', name: m.routeBias } })]); // prettier-ignore
  }
  const [, chosen] = topK(g, path, limitToGroups(g, m, path, choice), k);
  const onLast = { attributes: { axis: { int: -1 } } };
  let weights = g.node('GatherElements', `${path}/GatherElements`, [scores, chosen], onLast);
  if (normalize) {
    const total = g.node('Add', `${path}/Add`, [sum(g, path, weights, true), g.scalar(1e-20, 'f32')]);
    weights = g.node('Div', `${path}/Div`, [weights, total]);
  }
  if (scale !== 1) weights = g.node('Mul', `${path}/Mul`, [weights, g.scalar(scale, 'f32')]);
  const none = g.node('Mul', `${path}/Mul`, [logits, g.scalar(0, 'f32')]);
  const dense = g.node('ScatterElements', `${path}/ScatterElements`, [none, chosen, weights], onLast);
  return g.dtype === 'f32' ? dense : g.cast(dense, `${path}/Cast`, g.dtype);
}

/** What QMoE chooses by. It knows the normalized softmax; any other rule comes to it as finished weights. */
function addRouting(g: GraphBuilder, m: MoeLayerSpec, logits: string): Routing {
  const { scoring, topK: k, normalize, scale = 1, groups = 1 } = m.route;
  const own = scoring === 'softmax' && normalize === true && scale === 1 && groups <= 1 && m.routeBias === undefined;
  const rows = (x: string) => g.reshape(x, `${pathOf(m.router.name)}/Reshape`, [-1, m.experts.length]);
  // In half precision neighbouring scores would become equal.
  if (own && g.dtype === 'f32') return { topK: k, choice: rows(logits) };
  const weights = rows(addRouterWeights(g, m, logits));
  return { topK: k, choice: weights, weights };
}

/**
 * Every expert computes every token, and the router's weights (zero for most) decide what counts. Exact on every
 * execution provider, at the cost of all experts' work.
 */
function addDenseLoop(g: GraphBuilder, linears: StoredLinears, m: MoeLayerSpec, logits: string, x: string): string {
  const path = pathOf(folder(m.router.name));
  const weights = addRouterWeights(g, m, logits);
  const columns = g.split(weights, `${path}/experts/Split`, m.experts.map(() => 1)); // prettier-ignore
  let out: string | undefined;
  for (const [e, ffn] of m.experts.entries()) {
    const y = g.node('Mul', `${path}/experts.${e}/weighted/Mul`, [addFfn(g, linears, ffn, x), columns[e]!]);
    out = out === undefined ? y : g.node('Add', `${path}/experts.${e}/Add`, [out, y]);
  }
  return out!;
}

/** A mixture of experts: one QMoE where it can hold the experts, else a dense loop. */
function addMoe(g: GraphBuilder, linears: StoredLinears, m: MoeLayerSpec, x: string): string {
  const path = pathOf(folder(m.router.name));
  const logits = addRouterLogits(g, linears, m, x);
  const experts = quantizedExperts(linears, m.experts);
  let out: string;
  if (typeof experts !== 'string') out = addQuantizedExperts(g, experts, addRouting(g, m, logits), x);
  else {
    g.notes.add(`Experts are a dense loop, not QMoE: ${experts}.`);
    out = addDenseLoop(g, linears, m, logits, x);
  }
  if (m.shared) {
    let shared = addFfn(g, linears, m.shared, x);
    if (m.sharedGate) {
      const gate = addLinear(g, linears, m.sharedGate, x);
      const wide = g.node('Sigmoid', `${pathOf(m.sharedGate.name)}/Sigmoid`, [gate]);
      const open = g.dtype === 'f32' ? wide : g.cast(wide, `${pathOf(m.sharedGate.name)}/Cast`, g.dtype);
      shared = g.node('Mul', `${pathOf(m.sharedGate.name)}/Mul`, [shared, open]);
    }
    out = g.node('Add', `${path}/shared/Add`, [out, shared]);
  }
  return out;
}

export function addFeedForward(g: GraphBuilder, linears: StoredLinears, { ffn, moe, name }: Block, x: string): string {
  if (ffn) return addFfn(g, linears, ffn, x);
  if (moe) return addMoe(g, linears, moe.layer, x);
  throw badInput('This feed-forward part is not written as ONNX', { where: name });
}
