import { fusedName } from '../../checkpoint/fused-names.js';
import { matMulNBitsWriter, nBitsBlock, type RowPlace } from '../../layout/matmulnbits-writer.js';
import type { LinearShape, Scheme } from '../../layout/types.js';
import type { FfnSpec } from '../../nn/mlp.js';
import type { LinearSpec } from '../../nn/calls.js';
import type { PlannedTensor } from '../../checkpoint/types.js';
import { microsoft, type GraphBuilder } from './builder.js';
import { pathOf, type StoredLinears } from './linear.js';

/** The experts of a layer as com.microsoft.QMoE holds them. */
export interface QuantizedExperts {
  readonly scheme: Scheme;
  /** Columns of a block, for gate, up and down alike. */
  readonly block: number;
  readonly experts: readonly { readonly gate: LinearShape; readonly up: LinearShape; readonly down: LinearShape }[];
}

/**
 * Whether QMoE can compute these experts, else the reason. What onnxruntime's CPU kernel (1.30) takes was found by
 * experiment: 4 or 8 bits, blocks of 16 to 256 columns that divide both widths, silu with gate and up in turns
 * (swiglu_fusion 1), no bias wanted here; zero points are misread where a row is one block.
 */
export function quantizedExperts(linears: StoredLinears, experts: readonly FfnSpec[]): QuantizedExperts | string {
  const first = experts[0]!;
  const all = experts.flatMap(({ gate, up, down }) => [gate, up, down]);
  const { scheme } = linears.of(first.gate);
  if (scheme === undefined || all.some((linear) => linears.of(linear).scheme === undefined)) return 'not all experts are quantized'; // prettier-ignore
  if (all.some((linear) => JSON.stringify(linears.of(linear).scheme) !== JSON.stringify(scheme))) return 'experts differ in their schemes'; // prettier-ignore
  if (first.activation !== 'silu' || first.limit !== undefined) return `its activation is silu without limits, not ${first.activation}${first.limit === undefined ? '' : ' with a limit'}`; // prettier-ignore
  if (all.some(({ bias }) => bias)) return 'experts have biases';
  const stored = (linear: LinearSpec): LinearShape => linears.of(linear).stored;
  const [gate, down] = [stored(first.gate), stored(first.down)];
  const fits = gate.inFeatures === first.gate.inFeatures && down.outFeatures === first.down.outFeatures && gate.outFeatures === down.inFeatures; // prettier-ignore
  if (!fits) return 'hidden states are padded';
  const widths = [gate.inFeatures, down.inFeatures];
  const block = Math.min(...widths.map((width) => nBitsBlock(width, scheme) ?? 0));
  if (block === 0 || widths.some((width) => width % block !== 0)) return `no block divides ${widths.join(' and ')} columns`; // prettier-ignore
  if (!scheme.symmetric && widths.includes(block))
    return 'a row has one block, whose zero point the operator does not take';
  return {
    scheme,
    block,
    experts: experts.map(({ gate, up, down }) => ({ gate: stored(gate), up: stored(up), down: stored(down) })),
  };
}

export interface Routing {
  /** Active experts of a token. */
  readonly topK: number;
  /** [T, E]: the largest topK of each row are chosen. */
  readonly choice: string;
  /** [T, E]: what the chosen count; undefined: the softmax of their `choice`. */
  readonly weights?: string;
}

/** y [B, S, C]: only the chosen experts compute. */
export function addQuantizedExperts(
  g: GraphBuilder,
  { scheme, block, experts }: QuantizedExperts,
  { topK, choice, weights = '' }: Routing,
  x: string,
): string {
  const [{ gate, up, down }] = experts as [QuantizedExperts['experts'][number]];
  const folder = gate.name.replace(/\.\d+\.[^.]+$/, '');
  const nameIn = (leaves: readonly LinearShape[]) => `${folder}.${fusedName(leaves.map(({ name }) => name.slice(name.lastIndexOf('.') + 1)))}`; // prettier-ignore
  const stack = (module: string, k: number, parts: readonly RowPlace[]): string[] => {
    const rows = parts.reduce((sum, { linear }) => sum + linear.outFeatures, 0);
    const each = rows / experts.length;
    const planned = matMulNBitsWriter.plan({ name: module, inFeatures: k, outFeatures: rows }, scheme, g.dtype, block);
    return planned.map((tensor) => {
      const width = tensor.shape.slice(1).reduce((a, b) => a * b, 1);
      const stacked: PlannedTensor = { ...tensor, shape: [experts.length, each, width] };
      return g.weight({ planned: stacked, origin: { kind: 'rows', rows: { module, scheme, block, parts } } });
    });
  };
  const width = gate.outFeatures;
  const inTurns = experts.flatMap((expert, e) =>
    [expert.gate, expert.up].map((linear, first) => ({ linear, at: 2 * width * e + first, step: 2 })),
  );
  const below = experts.map((expert, e) => ({ linear: expert.down, at: down.outFeatures * e, step: 1 }));
  const [fc1, scales1, zeros1 = ''] = stack(nameIn([gate, up]), gate.inFeatures, inTurns) as [string, string, string?];
  const [fc2, scales2, zeros2 = ''] = stack(nameIn([down]), down.inFeatures, below) as [string, string, string?];
  const inputs = [x, choice, fc1, scales1, '', fc2, scales2, '', '', '', '', zeros1, zeros2, '', weights];
  while (inputs.at(-1) === '') inputs.pop();
  return g.node('QMoE', `${pathOf(folder)}/QMoE`, inputs, {
    domain: microsoft,
    attributes: {
      k: { int: topK },
      activation_type: { text: 'swiglu' },
      activation_alpha: { float: 1 },
      activation_beta: { float: 0 },
      swiglu_fusion: { int: 1 },
      normalize_routing_weights: { int: weights === '' ? 1 : 0 },
      expert_weight_bits: { int: scheme.bits },
      block_size: { int: block },
    },
  });
}
