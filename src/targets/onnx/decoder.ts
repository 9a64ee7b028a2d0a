import { badInput } from '../../base/errors.js';
import { tool } from '../../base/version.js';
import { isCapped, type Model } from '../../arch/types.js';
import type { OnnxGraph, OnnxValue } from '../../formats/onnx-writer.js';
import type { OutputTensor } from '../types.js';
import { addAttention, cacheShape, type CacheShape, type Shared } from './attention.js';
import { GraphBuilder, type FusedLinears } from './builder.js';
import { addFeedForward } from './feed-forward.js';
import { addLinear, type StoredLinears } from './linear.js';
import { addNorm, addSkipNorm } from './norm.js';

export interface OnnxModel {
  readonly graph: OnnxGraph;
  /** External data, in the order in which the graph uses it. */
  readonly weights: readonly OutputTensor[];
  readonly cache: CacheShape;
  /** What was decided on the way, one sentence each. */
  readonly notes: readonly string[];
  readonly fused: readonly FusedLinears[];
}

/**
 * A decoder as an ONNX graph with the inputs and outputs of onnxruntime-genai: input_ids i64 [B, S], attention_mask
 * i64 [B, T] (1 for the T tokens so far), past_key_values.{i}.key and .value [B, H, P, D] -> logits [B, S, V],
 * present.{i}.key and .value [B, H, T, D]. T = P + S; rows are padded on the right.
 * Errors: attention, rotary scaling or sparse choices that no operator says.
 */
export function buildOnnx(model: Model, dtype: 'f32' | 'f16', linears: StoredLinears): OnnxModel {
  if (isCapped(model))
    throw badInput('Soft caps on scores or logits are not written as ONNX', { got: model.modelType });
  const g = new GraphBuilder(dtype);
  const caches = model.blocks.map((block) => cacheShape(block.attention));
  const cache = caches[0];
  if (cache === undefined) throw badInput('This kind of attention is not written as ONNX', { got: model.modelType });
  const shared = sharedValues(g, model, linears);
  const embedding = {
    planned: { name: model.embedding, shape: [model.vocab, model.hidden], dtype },
    origin: { kind: 'values', name: model.embedding } as const,
  };
  let residual = g.node('Gather', '/model/embed_tokens/Gather', [g.weight(embedding), 'input_ids']);
  let pending: string | undefined;
  const normed = (norm: Model['norm']): string => {
    if (pending === undefined) return addNorm(g, norm, residual);
    const [y, sum] = addSkipNorm(g, norm, residual, pending);
    residual = sum;
    return y;
  };
  for (const block of model.blocks) {
    pending = addAttention(g, shared, block.attention, normed(block.norms.attention));
    pending = addFeedForward(g, linears, block, normed(block.norms.feedForward));
  }
  addHead(g, model, linears, normed(model.norm));

  const names = { name: 'decoder', producer: tool };
  const cached = (prefix: string, length: string): OnnxValue[] =>
    caches.flatMap((shape, i) =>
      ['key', 'value'].map((part) => ({
        name: `${prefix}.${i}.${part}`,
        dtype,
        shape: ['batch_size', shape!.heads, length, shape!.width],
      })),
    );
  const graph: OnnxGraph = {
    ...names,
    nodes: g.nodes,
    inputs: [
      { name: 'input_ids', dtype: 'i64', shape: ['batch_size', 'sequence_length'] },
      { name: 'attention_mask', dtype: 'i64', shape: ['batch_size', 'total_sequence_length'] },
      ...cached('past_key_values', 'past_sequence_length'),
    ],
    outputs: [
      { name: 'logits', dtype: 'f32', shape: ['batch_size', 'sequence_length', model.vocab] },
      ...cached('present', 'total_sequence_length'),
    ],
    opsets: { '': 21, 'com.microsoft': 1 },
    metadata: { model_type: model.modelType },
  };
  return { graph, weights: g.weights, cache, notes: [...g.notes], fused: g.fused };
}

/** Lengths and positions, from the mask and the ids. */
function sharedValues(g: GraphBuilder, model: Model, linears: StoredLinears): Shared {
  const path = '/model/attn_mask';
  const seen = g.node('ReduceSum', `${path}/ReduceSum`, ['attention_mask', g.ints([1])], { attributes: { keepdims: { int: 1 } } }); // prettier-ignore
  const last = g.node('Sub', `${path}/Sub`, [seen, g.ints([1])]);
  const flat = g.reshape(last, `${path}/Reshape`, [-1]);
  const lengths = g.cast(flat, `${path}/Cast`, 'i32');
  const width = g.node('Shape', `${path}/Shape`, ['attention_mask'], { attributes: { start: { int: 1 }, end: { int: 2 } } }); // prettier-ignore
  const total = g.cast(g.node('Squeeze', `${path}/Squeeze`, [width]), `${path}/Cast`, 'i32');
  let positions: string | undefined;
  return {
    linears,
    context: model.context,
    hidden: model.hidden,
    lengths,
    total,
    tables: new Map(),
    positions: () => (positions ??= addPositions(g, seen)),
  };
}

/** i64 [B, S]: the tokens behind the cached ones. */
function addPositions(g: GraphBuilder, seen: string): string {
  const path = '/model/position_ids';
  const shape = g.node('Shape', `${path}/Shape`, ['input_ids'], { attributes: { start: { int: 1 }, end: { int: 2 } } });
  const length = g.node('Squeeze', `${path}/Squeeze`, [shape]);
  const past = g.node('Max', `${path}/Max`, [g.node('Sub', `${path}/Sub`, [seen, shape]), g.ints([0])]);
  const steps = g.node('Range', `${path}/Range`, [g.ints([0], []), length, g.ints([1], [])]);
  return g.node('Add', `${path}/Add`, [past, steps]);
}

function addHead(g: GraphBuilder, model: Model, linears: StoredLinears, x: string): void {
  let logits: string;
  if (model.tied) {
    // The embedding again: as [V, C], which Gemm takes transposed without a copy of it.
    const rows = g.reshape(x, '/lm_head/Reshape', [-1, model.hidden]);
    const flat = g.node('Gemm', '/lm_head/Gemm', [rows, model.embedding], { attributes: { transB: { int: 1 } } });
    const ids = g.node('Shape', '/lm_head/Shape', ['input_ids']);
    const shape = g.node('Concat', '/lm_head/Concat', [ids, g.ints([model.vocab])], { attributes: { axis: { int: 0 } } }); // prettier-ignore
    logits = g.node('Reshape', '/lm_head/Reshape', [flat, shape]);
  } else logits = addLinear(g, linears, model.head, x);
  const last = g.dtype === 'f32' ? 'Identity' : 'Cast';
  const attributes = g.dtype === 'f32' ? {} : { to: { int: 1 } };
  g.many(last, '/lm_head/logits', [logits], { attributes, outputs: ['logits'] });
}
