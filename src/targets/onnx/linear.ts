import type { LinearSpec } from '../../nn/calls.js';
import { fusedName } from '../../checkpoint/fused-names.js';
import { matMulNBitsWriter, nBitsBlock } from '../../layout/matmulnbits-writer.js';
import type { LinearShape, Scheme } from '../../layout/types.js';
import type { SharedRows } from '../types.js';
import { microsoft, type FusedLinears, type GraphBuilder } from './builder.js';

export type Fusing = FusedLinears['kind'];

/** How the linears of a model are stored. */
export interface StoredLinears {
  /** Sizes as stored (padded), and the scheme of a quantized one. */
  of(linear: LinearSpec): { readonly stored: LinearShape; readonly scheme?: Scheme | undefined };
  /** MatMulNBits' accuracy_level: 0 computes in the graph's precision, 4 rounds activations to 8 bits. */
  readonly accuracy: 0 | 4;
  /** What is fused where it can be, and why a linear can not. */
  readonly fuse?: ReadonlySet<Fusing>;
  refuse?(linear: LinearSpec): string | undefined;
}

/** `model.layers.0.mlp.up_proj` -> `/model/layers.0/mlp/up_proj`: ONNX paths keep numbers with their list. */
export const pathOf = (name: string): string => `/${name.replace(/\.(?=\D)/g, '/')}`;

/** y [B, S, N] = x [B, S, K] W' + b. Routers, whose choices hang on small differences, give f32. */
export const addLinear = (g: GraphBuilder, linears: StoredLinears, linear: LinearSpec, x: string): string =>
  addJoined(g, linears, [linear], x);

/**
 * Several linears of one input as one matrix, their outputs side by side; undefined where they stay apart, with the
 * reason among the graph's notes.
 */
export function addFused(
  g: GraphBuilder,
  linears: StoredLinears,
  kind: Fusing,
  specs: readonly LinearSpec[],
  x: string,
): string | undefined {
  if (!linears.fuse?.has(kind)) return undefined;
  const schemes = specs.map((linear) => linears.of(linear).scheme);
  const reason =
    new Set(schemes.map((scheme) => JSON.stringify(scheme))).size > 1
      ? 'they are quantized in different ways'
      : new Set(specs.map(({ bias }) => bias === true)).size > 1
        ? 'some have a bias and some have none'
        : specs.map((linear) => linears.refuse?.(linear)).find((why) => why !== undefined);
  if (reason === undefined) {
    g.fused.push({ kind, linears: specs });
    return addJoined(g, linears, specs, x);
  }
  g.notes.add(`${specs.map(({ name }) => name).join(', ')} are not fused: ${reason}.`);
  return undefined;
}

function addJoined(g: GraphBuilder, linears: StoredLinears, specs: readonly LinearSpec[], x: string): string {
  const own = specs.map((linear) => linears.of(linear).stored);
  const { scheme } = linears.of(specs[0]!);
  const k = own[0]!.inFeatures;
  const n = own.reduce((sum, { outFeatures }) => sum + outFeatures, 0);
  const names = own.map(({ name }) => name);
  const name = names.length === 1 ? names[0]! : fusedName(names);
  const path = pathOf(name);
  const precise = specs[0]!.role === 'router' && scheme === undefined;
  const dtype = precise ? 'f32' : g.dtype;
  if (dtype !== g.dtype) x = g.cast(x, `${path}/Cast`, dtype);
  let y: string;
  if (scheme) {
    const block = nBitsBlock(k, scheme)!;
    const planned = matMulNBitsWriter.plan({ name, inFeatures: k, outFeatures: n }, scheme, g.dtype, block);
    const origin = names.length === 1 ? ({ kind: 'linear', name } as const) : ({ kind: 'rows', rows: below(name, scheme, block, own) } as const); // prettier-ignore
    const inputs = planned.map((tensor) => g.weight({ planned: tensor, origin }));
    const attributes = {
      ...{ K: { int: k }, N: { int: n }, bits: { int: scheme.bits }, block_size: { int: block } },
      accuracy_level: { int: linears.accuracy },
    };
    y = g.node('MatMulNBits', `${path}/MatMulNBits`, [x, ...inputs], { domain: microsoft, attributes });
  } else {
    const planned = { name: `${name}.weight`, shape: [k, n], dtype };
    y = g.node('MatMul', `${path}/MatMul`, [x, g.weight({ planned, origin: valuesOf(names, 'weight', true) })]);
  }
  if (!specs[0]!.bias) return y;
  const bias = { name: `${name}.bias`, shape: [n], dtype };
  return g.node('Add', `${path}/Add`, [y, g.weight({ planned: bias, origin: valuesOf(names, 'bias', false) })]);
}

function valuesOf(modules: readonly string[], part: string, transposed: boolean) {
  const names = modules.map((name) => `${name}.${part}`);
  const how = transposed ? { transposed } : {};
  return names.length === 1
    ? ({ kind: 'values', name: names[0]!, ...how } as const)
    : ({ kind: 'joined', names, ...how } as const);
}

function below(module: string, scheme: Scheme, block: number, linears: readonly LinearShape[]): SharedRows {
  let at = 0;
  const parts = linears.map((linear) => {
    const place = { linear, at, step: 1 };
    at += linear.outFeatures;
    return place;
  });
  return { module, scheme, block, parts };
}
