import { binary, copyInto, fill, gemm, rmsnorm, rope, unary } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { turn } from './attention.js';
import { attend, linear, type Calls, type ForwardContext, type LinearSpec } from './calls.js';
import { closedWindows, compress, compressorTensors, startOf, type CompressorSpec } from './compressor.js';
import { chooseKeys, chosenRows, type IndexQueries } from './indexer.js';
import { drop, linearTensors, type Layer } from './layer.js';
import { normalise, normTensor, type NormSpec } from './norm.js';
import type { RopeSpec } from './rope.js';

/**
 * DeepSeek-V4's attention (2026, section 2.3): one key of width headDim a token, which is its value too, serves all
 * heads. Queries see the keys of a window; before it, entries that stand for `rate` tokens each: all of them, or those
 * that an indexer chooses. What turned in the values is turned back in the output. Heads go out in groups, each by a
 * narrow projection of its own.
 */
export interface CompressedAttentionSpec {
  readonly layer: number;
  readonly heads: number;
  readonly headDim: number;
  readonly qDown: LinearSpec;
  readonly qNorm: NormSpec;
  readonly qUp: LinearSpec;
  readonly kv: LinearSpec;
  readonly kvNorm: NormSpec;
  /** Of the norm of each head's query, which has no weight. */
  readonly eps: number;
  /** Tensor name of each head's extra score, f32 [heads]. */
  readonly sinks: string;
  readonly rope: RopeSpec;
  readonly window: number;
  readonly compressor?: CompressorSpec | undefined;
  readonly indexer?: EntryIndexerSpec | undefined;
  readonly groups: number;
  /** Group g of the heads -> rows [g rank, (g + 1) rank) of the answer: [groups rank, heads headDim / groups]. */
  readonly oDown: LinearSpec;
  readonly oUp: LinearSpec;
}

/** Says which `topK` entries a query sees: V3.2's scorer on compressed keys of its own. */
export interface EntryIndexerSpec {
  readonly q: LinearSpec;
  readonly weights: LinearSpec;
  readonly compressor: CompressorSpec;
  readonly heads: number;
  readonly width: number;
  readonly topK: number;
}

export function compressedAttention(a: CompressedAttentionSpec): Layer {
  const { compressor, indexer } = a;
  const parts = [...(compressor ? [compressor] : []), ...(indexer ? [indexer.compressor] : [])];
  return {
    tensors: [
      ...linearTensors([a.qDown, a.qUp, a.kv, a.oDown, a.oUp, ...(indexer ? [indexer.q, indexer.weights] : [])]),
      ...[a.qNorm, a.kvNorm].map(normTensor),
      { name: a.sinks, shape: [a.heads], f32: true },
      ...parts.flatMap(compressorTensors),
    ],
    linears: [fromInput(a), fromLatent(a), [a.oDown], [a.oUp]],
    cached: (tokens) =>
      a.headDim * Math.min(tokens, a.window) +
      parts.reduce((sum, { width, rate }) => sum + width * Math.floor(tokens / rate), 0),
    forward: (x, ctx) => forward(a, x, ctx),
  };
}

const fromInput = ({ qDown, kv, compressor, indexer }: CompressedAttentionSpec): LinearSpec[] => [
  qDown,
  kv,
  ...(compressor ? [compressor.values, compressor.gates] : []),
  ...(indexer ? [indexer.compressor.values, indexer.compressor.gates, indexer.weights] : []),
];
const fromLatent = ({ qUp, indexer }: CompressedAttentionSpec): LinearSpec[] => [qUp, ...(indexer ? [indexer.q] : [])];

function* forward(a: CompressedAttentionSpec, x: Tensor, ctx: ForwardContext): Calls<Tensor> {
  const { scope, batch, length } = ctx;
  const [down, kvRaw, values, gates, indexValues, indexGates, indexWeights] = yield* linear(fromInput(a), x);
  const latent = normalise(a.qNorm, down!, ctx);
  drop(scope, [down]);
  const [up, indexUp] = yield* linear(fromLatent(a), latent);
  drop(scope, [latent]);
  const heads = rmsnorm(scope, up!.view(-1, a.headDim), undefined, a.eps);
  const q = turn(ctx, a.rope, heads.view(batch, length, a.heads, a.headDim));
  const kvNormed = normalise(a.kvNorm, kvRaw!, ctx);
  const k = turn(ctx, a.rope, kvNormed.view(batch, length, 1, a.headDim));
  drop(scope, [up, heads, kvRaw, kvNormed]);

  const entries = a.compressor && compress(a.compressor, 'entries', values!, gates!, ctx);
  let chooser: Chooser | undefined;
  if (a.indexer) {
    const i = a.indexer;
    const keys = compress(i.compressor, 'index', indexValues!, indexGates!, ctx);
    const turned = turn(ctx, i.compressor.rope, indexUp!.view(batch, length, i.heads, i.width));
    drop(scope, [indexUp]);
    // Few entries are seen all of them, without being scored.
    if (keys && keys.dim(1) > i.topK) chooser = { ...i, keys, queries: { q: turned, weights: indexWeights! } };
    else drop(scope, [turned, keys, indexWeights]);
  }

  const window = ctx.cache ? ctx.cache.append(k, undefined, a.window) : { k, v: k, offset: 0 };
  const lse = entries && scope.empty('f32', [batch, a.heads, length]);
  const near = yield* attend({
    layer: a.layer,
    q,
    k: window.k,
    v: window.v,
    options: {
      causal: true,
      window: a.window,
      offset: window.offset,
      scale: a.headDim ** -0.5,
      sinks: ctx.weights.get(a.sinks),
      ...(lse && { lse }),
      ...(ctx.lengths && { lengths: ctx.lengths }),
    },
  });
  drop(scope, [k]);
  if (entries && lse) {
    const far = yield* attendEntries(a, q, entries, chooser, ctx);
    join(near, far.o, lse, far.lse);
    drop(scope, [lse, far.o, far.lse, entries]);
  }
  if (chooser) drop(scope, [chooser.keys, chooser.queries.q, chooser.queries.weights]);
  drop(scope, [q]);
  const out = outOfHeads(a, near, ctx);
  drop(scope, [near]);
  const [y] = yield* linear([a.oUp], out);
  drop(scope, [out]);
  return y!;
}

interface Chooser extends Pick<EntryIndexerSpec, 'heads' | 'width' | 'topK'> {
  /** [B, E, 1, width] */
  readonly keys: Tensor;
  readonly queries: IndexQueries;
}

/** Attention of one call: o [B,S,H,D], and the log-sum-exp of its scores f32 [B,S,H]. */
interface Part {
  readonly o: Tensor;
  readonly lse: Tensor;
}

/** Some queries of one row, in groups that see the same entries. */
interface Run {
  readonly from: number;
  readonly groups: number;
  /** Queries of a group. */
  readonly size: number;
  /** Entries that the first group sees; each later group sees one more. */
  readonly visible: number;
}

/** Attention on entries. A query sees those of windows that are closed. */
function* attendEntries(
  a: CompressedAttentionSpec,
  q: Tensor,
  entries: Tensor,
  chooser: Chooser | undefined,
  ctx: ForwardContext,
): Calls<Part> {
  const { scope, batch, length } = ctx;
  const o = scope.empty(q.dtype, q.shape);
  const lse = scope.empty('f32', [batch, length, a.heads]);
  fill(o, 0);
  fill(lse, -1e30); // of queries that see nothing
  for (let b = 0; b < batch; b++) {
    const row = { q: q.at(b), entries: entries.at(b), o: o.at(b), lse: lse.at(b) };
    if (chooser) yield* attendChosen(a, row, chooser, b, ctx);
    else for (const run of runs(a.compressor!, startOf(ctx), length)) yield* attendRun(a, row, run, ctx);
  }
  return { o, lse };
}

/** Queries up to the end of the open window, whole windows, the rest. */
function runs(c: CompressorSpec, start: number, length: number): Run[] {
  const before = Math.min(length, c.rate - 1 - (start % c.rate));
  const whole = Math.floor((length - before) / c.rate);
  const rest = length - before - whole * c.rate;
  const run = (from: number, groups: number, size: number): Run => {
    return { from, groups, size, visible: closedWindows(c, start + from) };
  };
  return [run(0, 1, before), run(before, whole, c.rate), run(length - rest, 1, rest)].filter(
    ({ groups, size, visible }) => groups * size > 0 && visible > 0,
  );
}

/** One row of a batch: q, o [S,H,D], entries [E,1,D], lse [S,H]. */
interface Row {
  readonly q: Tensor;
  readonly entries: Tensor;
  readonly o: Tensor;
  readonly lse: Tensor;
}

function* attendRun(a: CompressedAttentionSpec, row: Row, run: Run, { scope }: ForwardContext): Calls<void> {
  const { from, groups, size, visible } = run;
  const to = from + groups * size;
  const some = (x: Tensor) => x.slice(0, from, to).view(groups, size, ...x.shape.slice(1));
  const seen = visible + groups - 1;
  const k = row.entries.slice(0, 0, seen).expand(groups, seen, 1, a.headDim);
  const lse = scope.empty('f32', [groups, a.heads, size]);
  const lengths = scope.from('i32', [groups], Int32Array.from({ length: groups }, (_, g) => visible + g)); // prettier-ignore
  const options = { causal: false, scale: a.headDim ** -0.5, lengths, lse };
  const o = yield* attend({ layer: a.layer, q: some(row.q), k, v: k, options });
  copyInto(some(row.o), o);
  copyInto(some(row.lse), lse.transpose(1, 2));
  drop(scope, [o, lse, lengths]);
}

/** Values that are gathered at once: bounds the memory of chosen entries. */
const gatherLimit = 2 ** 26;

function* attendChosen(
  a: CompressedAttentionSpec,
  row: Row,
  { keys, queries, ...i }: Chooser,
  b: number,
  ctx: ForwardContext,
): Calls<void> {
  const { scope, length } = ctx;
  const start = startOf(ctx);
  const visible = (s: number) => closedWindows(a.compressor!, start + s);
  const flat = (x: Tensor) => x.transpose(0, 1).at(0); // [E, 1, D] -> [E, D]
  const step = Math.max(1, Math.floor(gatherLimit / (i.topK * a.headDim)));
  for (let from = 0; from < length; from += step) {
    const to = Math.min(from + step, length);
    const n = to - from;
    const idx = chooseKeys(i, queries, flat(keys.at(b)), { b, from, to, visible }, scope);
    const rows = chosenRows(scope, flat(row.entries), idx);
    const lse = scope.empty('f32', [n, a.heads, 1]);
    const seen = Int32Array.from({ length: n }, (_, s) => Math.min(i.topK, visible(from + s)));
    const lengths = scope.from('i32', [n], seen);
    const options = { causal: false, scale: a.headDim ** -0.5, lengths, lse };
    const q = row.q.slice(0, from, to).view(n, 1, a.heads, a.headDim);
    const o = yield* attend({ layer: a.layer, q, k: rows, v: rows, options });
    copyInto(row.o.slice(0, from, to), o.view(n, a.heads, a.headDim));
    copyInto(row.lse.slice(0, from, to), lse.view(n, a.heads));
    drop(scope, [idx, rows, o, lse, lengths]);
  }
}

/** near [B,S,H,D] becomes attention on the keys of both parts; nearLse is [B,H,S], farLse [B,S,H]. */
function join(near: Tensor, far: Tensor, nearLse: Tensor, farLse: Tensor): void {
  using work = new Scope(near.device);
  const share = binary(work, 'sub', farLse, nearLse.transpose(1, 2));
  unary(work, 'sigmoid', share, 0, 0, share);
  const [b, s, h] = share.shape as [number, number, number];
  binary(work, 'sub', far, near, { out: far });
  binary(work, 'mul', far, share.view(b, s, h, 1), { out: far });
  binary(work, 'add', near, far, { out: near });
}

/** Turns o [B,S,H,D] back and brings each group of heads through its own narrow projection: [B S, groups rank]. */
function outOfHeads(a: CompressedAttentionSpec, o: Tensor, ctx: ForwardContext): Tensor {
  const { scope, batch, length } = ctx;
  using work = new Scope(scope.device);
  const { cos, sin } = ctx.rope.get(a.rope, ctx.end);
  const { interleaved, fromEnd } = a.rope;
  const back = rope(work, o, cos, sin, ctx.positions, { interleaved, fromEnd, inverse: true });
  const [tokens, rank] = [batch * length, a.oDown.outFeatures / a.groups];
  const out = scope.empty(o.dtype, [tokens, a.oDown.outFeatures]);
  const weight = ctx.weights.get(`${a.oDown.name}.weight`).view(a.groups, rank, a.oDown.inFeatures);
  const perGroup = (x: Tensor) => x.view(tokens, a.groups, -1).transpose(0, 1);
  gemm(work, perGroup(back), weight.transpose(), { out: perGroup(out) });
  return out;
}
