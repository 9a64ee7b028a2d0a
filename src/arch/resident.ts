import { stopReading, type JobEnv } from '../backend/env.js';
import { GrowingCache } from '../nn/cache.js';
import type { KvCache, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { forwardContext, type ContextOptions } from './context.js';
import type { OpenModel } from './open.js';
import type { Model } from './types.js';
import { WeightReader } from './weights.js';

/**
 * For so many sequences int4_matmul is no slower than products with floats. CPU: measured (at 8 it is even). CUDA: the
 * rows of one pass over the weights; from fp32 it would unpack them each time.
 */
const packedRows = (kind: string, dtype: 'f32' | 'bf16'): number => (kind === 'cpu' ? 4 : dtype === 'bf16' ? 8 : 0);

/** A model with all its weights on a device, for many forward passes: generation, small models. */
export class ResidentModel implements Disposable {
  readonly model: Model;
  readonly #scope: Scope;
  readonly #outer: Weights;
  readonly #blocks: readonly Weights[];

  private constructor(model: Model, scope: Scope, outer: Weights, blocks: readonly Weights[]) {
    this.model = model;
    this.#scope = scope;
    this.#outer = outer;
    this.#blocks = blocks;
  }

  /**
   * `sequences`: how many will be continued at once; for few, INT4 linears stay packed. Then logits are those of unpacked
   * weights up to rounding: in fp32 of the order of sums, in bf16 also of the weights, which unpacked are rounded.
   */
  static async load(
    open: OpenModel,
    env: Pick<JobEnv, 'device' | 'signal'>,
    dtype: 'f32' | 'bf16',
    sequences = Infinity,
  ): Promise<ResidentModel> {
    const { device } = env;
    const scope = new Scope(device);
    try {
      const packed = sequences <= packedRows(device.kind, dtype);
      const reader = new WeightReader(open, device, dtype, { packed });
      const outer = await reader.outer(scope);
      const blocks: Weights[] = [];
      for (let i = 0; i < open.model.blocks.length; i++) {
        stopReading(env);
        blocks.push(await reader.block(i, scope));
      }
      return new ResidentModel(open.model, scope, outer, blocks);
    } catch (error) {
      scope[Symbol.dispose]();
      throw error;
    }
  }

  /** Whether a layer looks tokens up in a table of the host's: then they cannot stay on the device. */
  get looksUp(): boolean {
    return this.model.blocks.some(({ tensors }) => tensors.some(({ below }) => below !== undefined));
  }

  /** One cache a block, in `scope`; `lengths`: real tokens of each row's prompt. */
  caches(scope: Scope, lengths?: readonly number[]): KvCache[] {
    return this.model.blocks.map(() => new GrowingCache(scope, lengths));
  }

  /**
   * States [B S, W] behind the last block for tokens [B, S]; where they are on the device already (i32), a model that
   * `looksUp` cannot have them.
   */
  hidden(
    scope: Scope,
    tokens: Int32Array | Tensor,
    batch: number,
    { caches, ...options }: Omit<ContextOptions, 'cache' | 'tokens' | 'like'> & { caches?: readonly KvCache[] } = {},
  ): Tensor {
    const { model } = this;
    const known = 'storage' in tokens ? undefined : tokens;
    const length = (known?.length ?? (tokens as Tensor).count) / batch;
    const ids = known ? scope.from('i32', [batch, length], known) : (tokens as Tensor).view(batch, length);
    const more = { ...(known && { tokens: known }) };
    const start = options.start ?? caches?.[0]?.length ?? 0;
    const like = forwardContext(scope, model, this.#outer, batch, length, { ...options, start, ...more });
    let x = model.embed(ids, like);
    model.blocks.forEach((block, i) => {
      using inner = new Scope(scope.device);
      const cache = caches?.[i];
      const ctx = forwardContext(inner, model, this.#blocks[i]!, batch, length, { like, ...more, ...(cache && { cache }) }); // prettier-ignore
      const y = inner.move(run(block.forward(x, ctx), ctx), scope);
      scope.free(x);
      x = y;
    });
    return x;
  }

  /** Logits f32 [T, V] of states [T, W]. */
  logits(scope: Scope, x: Tensor): Tensor {
    const ctx = forwardContext(scope, this.model, this.#outer, 1, x.dim(0));
    return run(this.model.logits(x, ctx), ctx);
  }

  [Symbol.dispose](): void {
    this.#scope[Symbol.dispose]();
  }
}
