import { badInput } from '../../base/errors.js';
import type { AttentionLayer } from '../../arch/types.js';
import type { AttentionSpec } from '../../nn/attention.js';
import type { LatentAttentionSpec } from '../../nn/mla.js';
import type { NormSpec } from '../../nn/norm.js';
import { ropeTable, type RopeSpec } from '../../nn/rope.js';
import { microsoft, type GraphBuilder } from './builder.js';
import { addFused, addLinear, pathOf, type StoredLinears } from './linear.js';
import { addNorm } from './norm.js';

/** What all layers of a graph share. */
export interface Shared {
  readonly linears: StoredLinears;
  /** Rows of the rotary tables. */
  readonly context: number;
  readonly hidden: number;
  /** i32 [B]: tokens of each row so far, less one; i32 scalar: the longest row. */
  readonly lengths: string;
  readonly total: string;
  /** i64 [B, S], made where a layer asks for it. */
  positions(): string;
  /** Tables [context, dim / 2] by rope. */
  readonly tables: Map<RopeSpec, { cos: string; sin: string }>;
}

/** Heads and width of one layer's key/value cache. */
export interface CacheShape {
  readonly heads: number;
  readonly width: number;
}

/** GroupQueryAttention wants heads of whole multiples of this width; narrower ones are padded with zeros. */
const widthStep = 8;
const fullWidth = (width: number): number => Math.ceil(width / widthStep) * widthStep;

export const cacheShape = ({ grouped, latent }: AttentionLayer): CacheShape | undefined =>
  grouped
    ? { heads: grouped.kvHeads, width: fullWidth(grouped.headDim) }
    : latent && { heads: latent.heads, width: fullWidth(Math.max(latent.nope + latent.rope.dim, latent.value)) };

/** x [B, S, heads from] with zeros behind each head: [B, S, heads to]. */
function widen(g: GraphBuilder, x: string, path: string, heads: number, from: number, to: number): string {
  if (from === to) return x;
  const perHead = g.reshape(x, `${path}/Reshape`, [0, 0, heads, from]);
  const padded = g.node('Pad', `${path}/Pad`, [perHead, g.ints([0, 0, 0, 0, 0, 0, 0, to - from]), g.scalar(0)]);
  return g.reshape(padded, `${path}/Reshape`, [0, 0, heads * to]);
}

/** The first channels of each head of x [B, S, heads from]: [B, S, heads to]. */
function narrow(g: GraphBuilder, x: string, path: string, heads: number, from: number, to: number): string {
  if (from === to) return x;
  const perHead = g.reshape(x, `${path}/Reshape`, [0, 0, heads, from]);
  const [kept] = g.split(perHead, `${path}/Split`, [to, from - to]);
  return g.reshape(kept!, `${path}/Reshape`, [0, 0, heads * to]);
}

/** Tables of cosines and sines. Error: frequencies that change with the length of the text. */
function tables(g: GraphBuilder, shared: Shared, rope: RopeSpec): { cos: string; sin: string } {
  const known = shared.tables.get(rope);
  if (known) return known;
  const { type } = rope.scaling;
  if (type === 'dynamic' || type === 'longrope') {
    throw badInput('This rope scaling is not written as ONNX: its frequencies change with the length of the text', {
      where: 'config.json, rope_parameters',
      got: type,
      expected: 'default, linear, llama3 or yarn',
    });
  }
  const suffix = shared.tables.size === 0 ? '' : `_${shared.tables.size}`;
  const shape = [shared.context, rope.dim / 2];
  const table = (part: 'cos' | 'sin'): string =>
    g.weight({
      planned: { name: `${part}_cache${suffix}`, shape, dtype: g.dtype },
      origin: {
        kind: 'computed',
        values: () => ropeTable(rope, shared.context)[part].subarray(0, (shared.context * rope.dim) / 2),
      },
    });
  const made = { cos: table('cos'), sin: table('sin') };
  shared.tables.set(rope, made);
  return made;
}

/** Turns x [B, S, heads dim] by positions; all channels. */
function turn(g: GraphBuilder, shared: Shared, rope: RopeSpec, x: string, path: string, heads: number): string {
  const { cos, sin } = tables(g, shared, rope);
  const attributes = { interleaved: { int: +rope.interleaved }, num_heads: { int: heads } };
  const inputs = [x, shared.positions(), cos, sin];
  return g.node('RotaryEmbedding', `${path}/RotaryEmbedding`, inputs, {
    domain: microsoft,
    // Without a width the op takes hidden size / heads, but its tables decide how much of it turns.
    attributes: { ...attributes, rotary_embedding_dim: { int: rope.dim } },
  });
}

/** Turns a part of each head of x [B, S, heads width]. */
function turnPart(
  g: GraphBuilder,
  shared: Shared,
  rope: RopeSpec,
  x: string,
  path: string,
  { heads, width }: CacheShape,
): string {
  if (rope.dim === width) return turn(g, shared, rope, x, path, heads);
  const rest = width - rope.dim;
  const split = g.reshape(x, `${path}/Reshape`, [0, 0, heads, width]);
  const parts = g.split(split, `${path}/Split`, rope.fromEnd ? [rest, rope.dim] : [rope.dim, rest]);
  const [turned, still] = rope.fromEnd ? [parts[1]!, parts[0]!] : [parts[0]!, parts[1]!];
  const flat = g.reshape(turned, `${path}/Reshape`, [0, 0, heads * rope.dim]);
  const done = g.reshape(turn(g, shared, rope, flat, path, heads), `${path}/Reshape`, [0, 0, heads, rope.dim]);
  const joined = g.node('Concat', `${path}/Concat`, rope.fromEnd ? [still, done] : [done, still], {
    attributes: { axis: { int: -1 } },
  });
  return g.reshape(joined, `${path}/Reshape`, [0, 0, heads * width]);
}

interface GroupQuery {
  readonly layer: number;
  readonly heads: number;
  readonly kvHeads: number;
  readonly scale: number;
  readonly window?: number | undefined;
  /** Rotary tables for the op to turn q and k itself. */
  readonly rope?: RopeSpec | undefined;
}

/** com.microsoft.GroupQueryAttention on q, k, v [B, S, heads width], or all three in q; appends to the layer's cache. */
function groupQuery(g: GraphBuilder, shared: Shared, q: string, k: string, v: string, a: GroupQuery): string {
  const rotary = a.rope && tables(g, shared, a.rope);
  const past = [`past_key_values.${a.layer}.key`, `past_key_values.${a.layer}.value`];
  const inputs = [q, k, v, ...past, shared.lengths, shared.total, ...(rotary ? [rotary.cos, rotary.sin] : [])];
  const path = `/model/layers.${a.layer}/self_attn/GroupQueryAttention`;
  return g.node('GroupQueryAttention', path, inputs, {
    domain: microsoft,
    outputs: [`${path}/output_0`, `present.${a.layer}.key`, `present.${a.layer}.value`],
    attributes: {
      num_heads: { int: a.heads },
      kv_num_heads: { int: a.kvHeads },
      scale: { float: a.scale },
      do_rotary: { int: rotary ? 1 : 0 },
      rotary_interleaved: { int: a.rope?.interleaved ? 1 : 0 },
      local_window_size: { int: a.window ?? -1 },
    },
  });
}

function addGrouped(g: GraphBuilder, shared: Shared, a: AttentionSpec, x: string): string {
  const { headDim: width, heads, kvHeads } = a;
  // The op turns whole heads of a multiple of 16 channels only.
  const inside = a.rope.dim === width && width % 16 === 0;
  const { layer, window } = a;
  const path = `/model/layers.${layer}/self_attn`;
  const full = fullWidth(width);
  const options = {
    ...{ layer, heads, kvHeads, window, scale: a.scale ?? width ** -0.5 },
    ...(inside && { rope: a.rope }),
  };
  const fused = addFused(g, shared.linears, 'qkv', [a.q, a.k, a.v], x);
  const finish = (o: string) => addLinear(g, shared.linears, a.o, narrow(g, o, `${path}/o`, heads, full, width));
  if (fused && inside && !a.qNorm && !a.kNorm && a.clip === undefined) {
    return finish(groupQuery(g, shared, fused, '', '', options));
  }
  const sizes = [heads, kvHeads, kvHeads].map((count) => count * width);
  const parts = fused ? g.split(fused, `${path}/qkv/Split`, sizes) : undefined;
  const project = (linear: AttentionSpec['q'], norm: NormSpec | undefined, count: number, part: number): string => {
    let y = parts?.[part] ?? addLinear(g, shared.linears, linear, x);
    if (norm && norm.width === width) {
      const path = pathOf(norm.name);
      // [B, S H, D]: one norm a head.
      y = addNorm(g, norm, g.reshape(y, `${path}/Reshape`, [0, -1, width]));
      y = g.reshape(y, `${path}/Reshape`, [0, -1, count * width]);
    } else if (norm) y = addNorm(g, norm, y);
    if (a.clip === undefined) return y;
    return g.node('Clip', `${pathOf(linear.name)}/Clip`, [y, g.scalar(-a.clip), g.scalar(a.clip)]);
  };
  let q = project(a.q, a.qNorm, heads, 0);
  let k = project(a.k, a.kNorm, kvHeads, 1);
  const v = project(a.v, undefined, kvHeads, 2);
  if (!inside) {
    q = turnPart(g, shared, a.rope, q, pathOf(a.q.name), { heads, width });
    k = turnPart(g, shared, a.rope, k, pathOf(a.k.name), { heads: kvHeads, width });
  }
  const wide = (x: string, count: number, part: string) => widen(g, x, `${path}/${part}`, count, width, full);
  return finish(groupQuery(g, shared, wide(q, heads, 'q'), wide(k, kvHeads, 'k'), wide(v, kvHeads, 'v'), options));
}

/**
 * Latent attention with keys and values brought out of the latents, one of each a head: engines have no operator for
 * it. Values are padded with zeros to the width of keys, which the op wants alike.
 */
function addLatent(g: GraphBuilder, shared: Shared, a: LatentAttentionSpec, x: string): string {
  if (a.indexer && shared.context > a.indexer.topK) {
    throw badInput('Sparse attention is not written as ONNX', {
      got: `a context of ${shared.context} tokens of which ${a.indexer.topK} are chosen`,
      hint: 'Texts of up to index_topk tokens need no choice: set max_position_embeddings in config.json to it.',
    });
  }
  const { heads, nope, value, rank, rope } = a;
  const linear = (spec: Parameters<typeof addLinear>[2], input: string) => addLinear(g, shared.linears, spec, input);
  const path = `/model/layers.${a.layer}/self_attn`;
  const q = 'down' in a.q ? linear(a.q.up, addNorm(g, a.q.norm, linear(a.q.down, x))) : linear(a.q, x);
  const [latent, key] = g.split(linear(a.kvDown, x), `${path}/kv_a/Split`, [rank, rope.dim]) as [string, string];
  const up = g.reshape(linear(a.kvUp, addNorm(g, a.kvNorm, latent)), `${path}/kv_b/Reshape`, [0, 0, heads, nope + value]); // prettier-ignore
  const [kStill, v] = g.split(up, `${path}/kv_b/Split`, [nope, value]) as [string, string];
  const turned = g.reshape(turn(g, shared, rope, key, `${path}/k_rope`, 1), `${path}/k_rope/Reshape`, [0, 0, 1, rope.dim]); // prettier-ignore
  const all = g.node('Tile', `${path}/k_rope/Tile`, [turned, g.ints([1, 1, heads, 1])]);
  const k = g.node('Concat', `${path}/k/Concat`, [kStill, all], { attributes: { axis: { int: -1 } } });
  const turning = { heads, width: nope + rope.dim };
  const width = fullWidth(Math.max(turning.width, value));
  const wide = (y: string, from: number, part: string) => widen(g, y, `${path}/${part}`, heads, from, width);
  const flat = (y: string, part: string, each: number) => g.reshape(y, `${path}/${part}/Reshape`, [0, 0, heads * each]);
  const o = groupQuery(
    g,
    shared,
    wide(turnPart(g, shared, rope, q, `${path}/q_rope`, turning), turning.width, 'q'),
    wide(flat(k, 'k', turning.width), turning.width, 'k'),
    wide(flat(v, 'v', value), value, 'v'),
    { layer: a.layer, heads, kvHeads: heads, scale: a.scale },
  );
  return linear(a.o, narrow(g, o, `${path}/o`, heads, width, value));
}

export function addAttention(g: GraphBuilder, shared: Shared, attention: AttentionLayer, x: string): string {
  if (attention.grouped) return addGrouped(g, shared, attention.grouped, x);
  if (attention.latent) return addLatent(g, shared, attention.latent, x);
  throw badInput('This kind of attention is not written as ONNX');
}
