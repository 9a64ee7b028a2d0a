import { add, gather } from '../tensor/ops.js';
import type { Tensor } from '../tensor/tensor.js';
import { linear, type Calls, type ForwardContext } from '../nn/calls.js';
import { drop, linearSpec, type Layer } from '../nn/layer.js';
import type { FfnSpec } from '../nn/mlp.js';
import type { MoeSpec } from '../nn/moe.js';
import { normalise, normTensor } from '../nn/norm.js';
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

/**
 * A pre-norm decoder: embedding, layers of attention and feed-forward behind one norm each, final norm, head. `layer`
 * gives the parts of layer i, whose tensors start with `name`.
 */
export function decoder(
  c: Config,
  sizes: Sizes,
  rope: RopeSpec,
  layer: (i: number, name: string) => LayerParts,
  { carried = [], ragged = true }: { carried?: readonly string[]; ragged?: boolean } = {},
): Model {
  const { hidden, eps } = sizes;
  const vocab = c.int('vocab_size', { max: limits.vocab });
  const tied = c.bool('tie_word_embeddings', false);
  const embedding = `${c.root}.embed_tokens.weight`;
  const norm = normSpec(`${c.root}.norm`, hidden, eps);
  const head = linearSpec(tied ? `${c.root}.embed_tokens` : 'lm_head', hidden, vocab, 'head');
  const shape = [vocab, hidden];
  const blocks = Array.from({ length: sizes.layers }, (_, i) => {
    const name = `${c.root}.layers.${i}`;
    return block(i, name, sizes, layer(i, name));
  });
  const bosIds = c.ids('bos_token_id');
  const modelType = c.raw('model_type');
  return {
    modelType: typeof modelType === 'string' ? modelType : '',
    config: c.values,
    hidden,
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
      // A tied checkpoint may hold the head all the same: torch.save writes both names of one storage.
      { name: 'lm_head.weight', shape, ...(tied && { optional: true }) },
    ],
    embedding,
    norm,
    head,
    tied,
    bosId: bosIds[0],
    eosIds: c.ids('eos_token_id'),
    carried,
    embed: (tokens, ctx) => gather(ctx.scope, ctx.weights.get(embedding), tokens.view(-1)),
    *logits(x: Tensor, ctx: ForwardContext): Calls<Tensor> {
      const h = normalise(norm, x, ctx);
      const [y] = yield* linear([head], h);
      drop(ctx.scope, [h]);
      return y!;
    },
  };
}

function block(index: number, name: string, { hidden, eps }: Sizes, { attention, mlp, window }: LayerParts): Block {
  const before = normSpec(`${name}.input_layernorm`, hidden, eps);
  const between = normSpec(`${name}.post_attention_layernorm`, hidden, eps);
  return {
    index,
    name,
    tensors: [normTensor(before), ...attention.tensors, normTensor(between), ...mlp.tensors],
    linears: [...attention.linears, ...mlp.linears],
    norms: { attention: before, feedForward: between },
    attention,
    ...(mlp.ffn && { ffn: mlp.ffn }),
    ...(mlp.moe && { moe: mlp.moe }),
    ...(window && { window }),
    *forward(x: Tensor, ctx: ForwardContext): Calls<Tensor> {
      const { scope } = ctx;
      const h = normalise(before, x, ctx);
      const a = yield* attention.forward(h, ctx);
      const middle = add(scope, x, a);
      drop(scope, [h, a]);
      const n = normalise(between, middle, ctx);
      const f = yield* mlp.forward(n, ctx);
      const y = add(scope, middle, f);
      drop(scope, [middle, n, f]);
      return y;
    },
  };
}
