import type { NormSpec } from '../../nn/norm.js';
import { microsoft, type GraphBuilder } from './builder.js';
import { pathOf } from './linear.js';

const gamma = (g: GraphBuilder, { name, width }: NormSpec): string =>
  g.weight({
    planned: { name: `${name}.weight`, shape: [width], dtype: g.dtype },
    origin: { kind: 'values', name: `${name}.weight` },
  });

/** Root-mean-square norm over the last dimension. */
export function addNorm(g: GraphBuilder, norm: NormSpec, x: string): string {
  // Of ONNX's default domain, as onnxruntime registers it (RMSNormalization of opset 23 by another name).
  const attributes = { axis: { int: -1 }, epsilon: { float: norm.eps }, stash_type: { int: 1 } };
  return g.node('SimplifiedLayerNormalization', `${pathOf(norm.name)}/LayerNorm`, [x, gamma(g, norm)], { attributes });
}

/** The norm of x + residual, and that sum. */
export function addSkipNorm(g: GraphBuilder, norm: NormSpec, residual: string, x: string): [y: string, sum: string] {
  const path = `${pathOf(norm.name)}/SkipLayerNorm`;
  const outputs = [`${path}/output_0`, '', '', `${path}/output_3`];
  g.many('SkipSimplifiedLayerNormalization', path, [residual, x, gamma(g, norm)], {
    domain: microsoft,
    attributes: { epsilon: { float: norm.eps } },
    outputs,
  });
  return [outputs[0]!, outputs[3]!];
}
