import type { LinearSpec } from '../../nn/calls.js';
import { matMulNBitsWriter, nBitsBlock } from '../../layout/matmulnbits-writer.js';
import type { LinearShape, Scheme } from '../../layout/types.js';
import { microsoft, type GraphBuilder } from './builder.js';

/** How the linears of a model are stored. */
export interface StoredLinears {
  /** Sizes as stored (padded), and the scheme of a quantized one. */
  of(linear: LinearSpec): { readonly stored: LinearShape; readonly scheme?: Scheme | undefined };
  /** MatMulNBits' accuracy_level: 0 computes in the graph's precision, 4 rounds activations to 8 bits. */
  readonly accuracy: 0 | 4;
}

/** `model.layers.0.mlp.up_proj` -> `/model/layers.0/mlp/up_proj`: ONNX paths keep numbers with their list. */
export const pathOf = (name: string): string => `/${name.replace(/\.(?=\D)/g, '/')}`;

/** y [B, S, N] = x [B, S, K] W' + b. Routers, whose choices hang on small differences, give f32. */
export function addLinear(g: GraphBuilder, linears: StoredLinears, linear: LinearSpec, x: string): string {
  const { stored, scheme } = linears.of(linear);
  const { name, inFeatures: k, outFeatures: n } = stored;
  const path = pathOf(name);
  const precise = linear.role === 'router' && scheme === undefined;
  const dtype = precise ? 'f32' : g.dtype;
  if (dtype !== g.dtype) x = g.cast(x, `${path}/Cast`, dtype);
  let y: string;
  if (scheme) {
    const planned = matMulNBitsWriter.plan(stored, scheme, g.dtype);
    const inputs = planned.map((tensor) => g.weight({ planned: tensor, origin: { kind: 'linear', name } }));
    const attributes = {
      ...{ K: { int: k }, N: { int: n }, bits: { int: scheme.bits }, block_size: { int: nBitsBlock(k, scheme)! } },
      accuracy_level: { int: linears.accuracy },
    };
    y = g.node('MatMulNBits', `${path}/MatMulNBits`, [x, ...inputs], { domain: microsoft, attributes });
  } else {
    const planned = { name: `${name}.weight`, shape: [k, n], dtype };
    const origin = { kind: 'values', name: planned.name, transposed: true } as const;
    y = g.node('MatMul', `${path}/MatMul`, [x, g.weight({ planned, origin })]);
  }
  if (!linear.bias) return y;
  const bias = { name: `${name}.bias`, shape: [n], dtype };
  return g.node('Add', `${path}/Add`, [y, g.weight({ planned: bias, origin: { kind: 'values', name: bias.name } })]);
}
