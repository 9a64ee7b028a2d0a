import { gather, unary } from '../tensor/ops.js';
import type { Scope, Tensor } from '../tensor/tensor.js';
import { linear, type Calls, type ForwardContext } from '../nn/calls.js';
import { drop, linearSpec, type Layer, type TensorSpec } from '../nn/layer.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { MoeSpec } from '../nn/moe.js';
import { normalise, normTensor, type NormSpec } from '../nn/norm.js';
import { plainResidual, type Residual } from '../nn/residual.js';
import type { RopeSpec } from '../nn/rope.js';
import { limits, type Config } from './config.js';
import type { Sizes } from './sizes.js';
import { normSpec } from './parts.js';
import type { AttentionLayer, Block, Model } from './types.js';

/** What an architecture file says of one decoder layer. */
export interface LayerParts {
  readonly attention: AttentionLayer;
  readonly mlp: Layer & { readonly ffn?: FfnSpec; readonly moe?: MoeSpec };
  readonly window?: number | undefined;
}

/** What a few architectures do differently. */
export interface DecoderOptions {
  /** Prefixes of names that are carried through untouched. */
  readonly carried?: readonly string[];
  readonly ragged?: boolean;
  /** How the checkpoint spells a name: of a linear or norm without `.weight`, of a layer, of any other tensor. */
  readonly spell?: (name: string) => string;
  readonly streams?: Streams;
}

/** States that are wider than what goes through the layers (hyper-connections). */
export interface Streams {
  /** Hidden states that make one state. */
  readonly count: number;
  /** Around the attention (`attn`) or feed-forward part (`ffn`) of a layer. */
  residual(layer: string, part: 'attn' | 'ffn'): Residual;
  /** [T, C] -> [T, count C]. */
  spread(scope: Scope, x: Tensor): Tensor;
  /** [T, count C] -> [T, C] in front of the final norm. */
  readonly head: { readonly tensors: readonly TensorSpec[]; collapse(state: Tensor, ctx: ForwardContext): Tensor };
}

/**
 * A pre-norm decoder: embedding, layers of attention and feed-forward behind one norm each, final norm, head. `layer`
 * gives the parts of layer i, whose tensors start with `name`.
 */
export function decoder(
  c: Config,
  sizes: Sizes,
  rope: RopeSpec,
  layer: (i: number, name: string) => LayerParts,
  { carried = [], ragged = true, spell = (name) => name, streams }: DecoderOptions = {},
): Model {
  const { hidden, eps } = sizes;
  const vocab = c.int('vocab_size', { max: limits.vocab });
  const tied = c.bool('tie_word_embeddings', false);
  const logitCap = c.optionalFloat('final_logit_softcapping', { min: 1e-3, max: 1e6 });
  const embedding = `${spell(`${c.root}.embed_tokens`)}.weight`;
  const norm = normSpec(spell(`${c.root}.norm`), hidden, eps);
  const head = linearSpec(spell(tied ? `${c.root}.embed_tokens` : 'lm_head'), hidden, vocab, 'head');
  const shape = [vocab, hidden];
  const blocks = Array.from({ length: sizes.layers }, (_, i) => {
    const name = `${c.root}.layers.${i}`;
    return block(i, name, sizes, layer(i, name), spell, streams);
  });
  const bosIds = c.ids('bos_token_id');
  const modelType = c.raw('model_type');
  return {
    modelType: typeof modelType === 'string' ? modelType : '',
    config: c.values,
    hidden,
    stateWidth: hidden * (streams?.count ?? 1),
    vocab,
    context: sizes.context,
    heads: sizes.heads,
    kvHeads: sizes.kvHeads,
    headDim: sizes.headDim,
    blocks,
    ragged:
      ragged && !['dynamic', 'longrope'].includes(rope.scaling.type) && !blocks.some((b) => b.window !== undefined),
    outer: [
      { name: embedding, shape },
      normTensor(norm),
      ...(streams?.head.tensors ?? []),
      // A tied checkpoint may hold the head all the same: torch.save writes both names of one storage.
      { name: `${spell('lm_head')}.weight`, shape, ...(tied && { optional: true }) },
    ],
    embedding,
    norm,
    head,
    tied,
    ...(logitCap !== undefined && { logitCap }),
    bosId: bosIds[0],
    eosIds: c.ids('eos_token_id'),
    carried,
    embed: (tokens, ctx) => {
      const x = gather(ctx.scope, ctx.weights.get(embedding), tokens.view(-1));
      if (!streams) return x;
      const state = streams.spread(ctx.scope, x);
      drop(ctx.scope, [x]);
      return state;
    },
    *logits(x: Tensor, ctx: ForwardContext): Calls<Tensor> {
      const one = streams ? streams.head.collapse(x, ctx) : x;
      const h = normalise(norm, one, ctx);
      if (streams) drop(ctx.scope, [one]);
      const [y] = yield* linear([head], h);
      drop(ctx.scope, [h]);
      if (logitCap !== undefined) unary(ctx.scope, 'softcap', y!, logitCap, 0, y);
      return y!;
    },
  };
}

function block(
  index: number,
  layer: string,
  { hidden, eps }: Sizes,
  { attention, mlp, window }: LayerParts,
  spell: (name: string) => string,
  streams: Streams | undefined,
): Block {
  const before = normSpec(spell(`${layer}.input_layernorm`), hidden, eps);
  const between = normSpec(spell(`${layer}.post_attention_layernorm`), hidden, eps);
  const around = streams
    ? { attention: streams.residual(layer, 'attn'), mlp: streams.residual(layer, 'ffn') }
    : { attention: plainResidual, mlp: plainResidual };
  return {
    index,
    name: spell(layer),
    get tensors() {
      return [
        ...around.attention.tensors,
        normTensor(before),
        ...attention.tensors,
        ...around.mlp.tensors,
        normTensor(between),
        ...mlp.tensors,
      ];
    },
    linears: [...attention.linears, ...mlp.linears],
    norms: { attention: before, feedForward: between },
    attention,
    ...(mlp.ffn && { ffn: mlp.ffn }),
    ...(mlp.moe && { moe: mlp.moe }),
    ...(window && { window }),
    forward: behindNorms({ attention: before, feedForward: between }, attention, mlp, around),
  };
}

/** A block whose feed-forward part is computed in another way, from the same tensors; ordinary residuals. */
export const withMlp = (block: Block, mlp: Layer): Block => ({
  ...block,
  forward: behindNorms(block.norms, block.attention, mlp, { attention: plainResidual, mlp: plainResidual }),
});

const behindNorms = (
  norms: Block['norms'],
  attention: Layer,
  mlp: Layer,
  around: { readonly attention: Residual; readonly mlp: Residual },
): Block['forward'] =>
  function* (state, ctx) {
    const middle = yield* through(around.attention, norms.attention, attention, state, ctx);
    const next = yield* through(around.mlp, norms.feedForward, mlp, middle, ctx);
    drop(ctx.scope, [middle]);
    return next;
  };

/** The state behind one layer and the norm in front of it. */
function* through(residual: Residual, norm: NormSpec, layer: Layer, state: Tensor, ctx: ForwardContext): Calls<Tensor> {
  const { x, leave } = residual.enter(state, ctx);
  const h = normalise(norm, x, ctx);
  if (x !== state) drop(ctx.scope, [x]);
  const y = yield* layer.forward(h, ctx, () => drop(ctx.scope, [h]));
  drop(ctx.scope, [h], [y]);
  return leave(y);
}
