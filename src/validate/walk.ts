import type { AttentionCall, Calls, ForwardContext, RouteCall, Weights } from '../nn/calls.js';
import { answer } from '../nn/run.js';
import { forwardContext } from '../arch/context.js';
import type { Block, Model } from '../arch/types.js';
import { copyInto } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import type { Choices } from './routing.js';
import type { Windows } from './texts.js';

/** Some windows of one text that pass through the models together. */
export interface Chunk {
  readonly text: number;
  /** Index of the first window in its text. */
  readonly first: number;
  readonly rows: number;
  readonly length: number;
  readonly tokens: Int32Array;
}

/** One forward pass through one block, stepped from attention call to attention call. */
export class Walk {
  readonly scope: Scope;
  readonly #ctx: ForwardContext;
  readonly #calls: Calls<Tensor>;
  readonly #block: Block;
  /** Where chosen experts are kept beyond the pass. */
  readonly #kept: Scope;
  #step: ReturnType<Calls<Tensor>['next']>;
  #chosen: Tensor | undefined;

  constructor(kept: Scope, model: Model, block: Block, weights: Weights, x: Tensor, { rows, length, tokens }: Chunk) {
    [this.#kept, this.#block] = [kept, block];
    this.scope = new Scope(kept.device);
    this.#ctx = forwardContext(this.scope, model, weights, rows, length, { tokens });
    this.#calls = block.forward(x, this.#ctx);
    this.#step = this.#calls.next();
  }

  /** The attention call at which the pass now stands; undefined when it is through. */
  toAttention(): AttentionCall | undefined {
    while (!this.#step.done) {
      const call = this.#step.value;
      if (call.kind === 'attention') return call;
      this.#step = this.#calls.next(call.kind === 'route' ? this.#route(call) : answer(call, this.#ctx));
    }
    return undefined;
  }

  /** Answers the attention call, if it stands at one. */
  pass(): void {
    if (!this.#step.done) this.#step = this.#calls.next(answer(this.#step.value, this.#ctx));
  }

  get result(): Tensor {
    return this.#step.value as Tensor;
  }

  #route(call: RouteCall): unknown {
    const answered = answer(call, this.#ctx) as { w: Tensor; idx: Tensor };
    // The block frees idx as soon as it has sorted by it: keep a copy.
    const copy = this.#kept.empty('i32', answered.idx.shape);
    copyInto(copy, answered.idx);
    this.#chosen = copy;
    return answered;
  }

  /** The experts that its tokens were sent to; undefined where it has none. */
  async choices(): Promise<Choices | undefined> {
    if (!this.#chosen) return undefined;
    const experts = this.#block.moe?.experts ?? 0;
    return { idx: await this.#chosen.int32(), active: this.#chosen.dim(1), experts };
  }
}

/** Each row's next token; -1 at the end of each window. */
export function nextTokens(tokens: Int32Array, length: number): Int32Array {
  return tokens.map((_, i) => ((i + 1) % length === 0 ? -1 : tokens[i + 1]!));
}

export function chunksOf(windows: readonly Windows[], batchTokens: number): Chunk[] {
  return windows.flatMap(({ tokens, n, length }, text) => {
    const most = Math.max(1, Math.floor(batchTokens / length));
    const chunks: Chunk[] = [];
    for (let first = 0; first < n; first += most) {
      const rows = Math.min(most, n - first);
      chunks.push({ text, first, rows, length, tokens: tokens.subarray(first * length, (first + rows) * length) });
    }
    return chunks;
  });
}
