import { dtypeSize, elementCount } from '../base/dtype.js';
import { stopIfAborted, type JobEnv } from '../backend/env.js';
import type { AttentionCall, Weights } from '../nn/calls.js';
import { run } from '../nn/run.js';
import { forwardContext } from '../arch/context.js';
import type { OpenModel } from '../arch/open.js';
import type { Block, Model } from '../arch/types.js';
import { WeightReader } from '../arch/weights.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { LayerErrors, rowSquares } from './activations.js';
import { HeadMaps, compareHeads, largestDifference, sameGeometry } from './attention.js';
import { LogitsMeter, comparePositions, type WorstPosition } from './logits.js';
import { Routing } from './routing.js';
import type { AttentionResult, LayerResult, LogitsResult, RoutingResult, WeightsResult } from './report.js';
import type { Windows } from './texts.js';
import { Walk, chunksOf, nextTokens, type Chunk } from './walk.js';
import { WeightErrors } from './weights.js';

export interface SidesOptions {
  /** Weights, states and arithmetic. */
  readonly dtype: 'f32' | 'bf16';
  readonly resamples: number;
  readonly seed: number;
  /** Tokens that pass through a block at once; default 2,048 on the CPU, 16,384 on a GPU. */
  readonly batchTokens?: number;
}

export interface SidesResult {
  readonly logits: Omit<LogitsResult, 'worst'>;
  readonly worst: readonly WorstPosition[];
  readonly layers: readonly LayerResult[];
  readonly attention?: AttentionResult;
  readonly routing?: RoutingResult;
  readonly weights: WeightsResult;
  readonly skipped: readonly { readonly part: string; readonly reason: string }[];
}

/** The weights of one block of both models, being read. */
interface Loading {
  readonly scope: Scope;
  readonly weights: Promise<readonly [Weights, Weights]>;
}

/**
 * Both models, block by block on the same tokens. Each block of the candidate runs twice: on the reference's input
 * (teacher-forced: what this block does wrong) and on its own stream (free-running: what adds up). The three forward
 * passes are stepped from attention call to attention call side by side, so that patterns are compared where they
 * arise and nothing is kept. Resident: one block of each model (and the next, being read, where they are small), and
 * two sets of hidden states.
 */
export async function compareModels(
  reference: OpenModel,
  candidate: OpenModel,
  windows: readonly Windows[],
  options: SidesOptions,
  env: JobEnv,
): Promise<SidesResult> {
  const walk = new Comparison(reference, candidate, windows, options, env);
  using _states = walk;
  return await walk.run();
}

class Comparison implements Disposable {
  readonly #env: JobEnv;
  readonly #options: SidesOptions;
  readonly #models: readonly [Model, Model];
  readonly #readers: readonly [WeightReader, WeightReader];
  readonly #chunks: readonly Chunk[];
  readonly #tokens: number;
  readonly #states: readonly [Scope, Scope];
  /** Hidden states by side and chunk: the reference's stream, the candidate's own. */
  readonly #x: [Tensor[], Tensor[]] = [[], []];
  readonly #weights = new WeightErrors();
  readonly #routing = new Routing();
  readonly #layers: LayerResult[] = [];
  readonly #heads: { readonly teacherForced: HeadMaps; readonly freeRunning: HeadMaps };
  readonly #names: readonly string[];
  #layer0: AttentionResult['layer0'] = null;
  readonly #skipped: { part: string; reason: string }[] = [];

  constructor(
    reference: OpenModel,
    candidate: OpenModel,
    windows: readonly Windows[],
    options: SidesOptions,
    env: JobEnv,
  ) {
    const { device } = env;
    [this.#env, this.#options] = [env, options];
    this.#models = [reference.model, candidate.model];
    this.#readers = [
      new WeightReader(reference, device, options.dtype),
      new WeightReader(candidate, device, options.dtype),
    ];
    this.#states = [new Scope(device), new Scope(device)];
    this.#names = windows.map(({ name }) => name);
    this.#chunks = chunksOf(windows, options.batchTokens ?? (device.kind === 'cpu' ? 2048 : 16384));
    this.#tokens = this.#chunks.reduce((sum, { rows, length }) => sum + rows * length, 0);
    const layers = reference.model.blocks.length;
    this.#heads = { teacherForced: new HeadMaps(layers), freeRunning: new HeadMaps(layers) };
  }

  [Symbol.dispose](): void {
    for (const scope of this.#states) scope[Symbol.dispose]();
  }

  async run(): Promise<SidesResult> {
    const [a, b] = this.#models;
    await this.#embed();
    if (a.stateWidth === b.stateWidth && a.blocks.length === b.blocks.length) {
      await this.#pairs(a.blocks.length);
    } else {
      const reason = `the models differ in shape: ${a.blocks.length} layers of width ${a.stateWidth} against ${b.blocks.length} of ${b.stateWidth}`;
      for (const part of ['layers', 'attention']) this.#skipped.push({ part, reason });
      for (const side of [0, 1] as const) {
        for (let i = 0; i < this.#models[side].blocks.length; i++) await this.#alone(side, i);
      }
    }
    const meter = await this.#logits();
    const { teacherForced, freeRunning } = this.#heads;
    const routing = this.#routing.finish();
    return {
      logits: meter.finish(this.#options),
      worst: meter.worst,
      layers: this.#layers,
      ...(!teacherForced.empty && {
        attention: {
          teacherForced: teacherForced.finish(),
          freeRunning: freeRunning.finish(),
          layer0: this.#layer0,
        },
      }),
      ...(routing && { routing }),
      weights: this.#weights.finish(),
      skipped: this.#skipped,
    };
  }

  async #embed(): Promise<void> {
    using outer = new Scope(this.#env.device);
    const weights = await this.#both((reader) => reader.outer(outer, 'embedding'));
    await this.#compareOuter(weights, (model, name) => name === model.embedding);
    for (const side of [0, 1] as const) {
      const model = this.#models[side];
      for (const [c, chunk] of this.#chunks.entries()) {
        using scope = new Scope(this.#env.device);
        const tokens = scope.from('i32', [chunk.rows, chunk.length], chunk.tokens);
        const ctx = forwardContext(scope, model, weights[side], chunk.rows, chunk.length);
        this.#put(side, c, model.embed(tokens, ctx), scope);
      }
    }
    await this.#env.device.sync();
  }

  /** Compares tensors outside the blocks; a tied head is the embedding and counts once. */
  async #compareOuter(
    weights: readonly [Weights, Weights],
    wanted: (model: Model, name: string) => boolean,
  ): Promise<void> {
    const side = (i: 0 | 1) => {
      const model = this.#models[i];
      return { specs: model.outer.filter(({ name }) => wanted(model, name)), weights: weights[i] };
    };
    await this.#weights.compare(side(0), side(1), null);
  }

  #put(side: 0 | 1, chunk: number, x: Tensor, scope: Scope): void {
    const before = this.#x[side][chunk];
    this.#x[side][chunk] = scope.move(x, this.#states[side]);
    if (before) this.#states[side].free(before);
  }

  async #pairs(count: number): Promise<void> {
    const ahead = this.#readsAhead();
    let next: Loading | undefined;
    try {
      for (let i = 0; i < count; i++) {
        this.#stopIfAborted();
        const { scope, weights } = next ?? this.#load(i);
        using _resident = scope;
        next = undefined;
        const loaded = await weights;
        if (ahead && i + 1 < count) next = this.#load(i + 1);
        await this.#pair(i, loaded);
      }
    } finally {
      // A read under way when something fails must end before its memory goes.
      await next?.weights.catch(() => undefined);
      next?.scope[Symbol.dispose]();
    }
  }

  /** Begins to read block `i` of both models. */
  #load(i: number): Loading {
    const scope = new Scope(this.#env.device);
    const weights = this.#both((reader) => reader.block(i, scope));
    weights.catch(() => undefined); // reported where it is awaited
    return { scope, weights };
  }

  /** Reads something of both models. Ends when both reads have, so that no memory is freed under a transfer. */
  async #both(read: (reader: WeightReader) => Promise<Weights>): Promise<readonly [Weights, Weights]> {
    const [a, b] = await Promise.allSettled([read(this.#readers[0]), read(this.#readers[1])]);
    if (a.status === 'rejected') throw a.reason;
    if (b.status === 'rejected') throw b.reason;
    return [a.value, b.value];
  }

  /** The next block is read while one computes, where the blocks of both models are small beside the memory. */
  #readsAhead(): boolean {
    const blocks = this.#models.map(({ blocks }) =>
      Math.max(...blocks.map(({ tensors }) => tensors.reduce((n, { shape }) => n + elementCount(shape), 0))),
    );
    return 2 * (blocks[0]! + blocks[1]!) * dtypeSize(this.#options.dtype) < this.#env.device.available() / 4;
  }

  /** Block `i` of both models, side by side. */
  async #pair(i: number, weights: readonly [Weights, Weights]): Promise<void> {
    const { log } = this.#env;
    const blocks = [this.#models[0].blocks[i]!, this.#models[1].blocks[i]!] as const;
    const identical = await this.#weights.compare(
      { specs: blocks[0].tensors, weights: weights[0] },
      { specs: blocks[1].tensors, weights: weights[1] },
      i,
    );
    if (i === 0) this.#layer0 = { expected: attentionIsEqual(blocks, identical), difference: 0 };
    const errors = { teacherForced: new LayerErrors(), freeRunning: new LayerErrors() };
    for (const [c, chunk] of this.#chunks.entries()) {
      this.#stopIfAborted();
      await this.#pairChunk(i, blocks, weights, c, chunk, errors);
    }
    const [own, free] = [errors.teacherForced.finish(), errors.freeRunning.finish()];
    const kind = blocks[1].moe ? 'moe' : blocks[1].ffn ? 'dense' : 'other';
    this.#layers.push({ index: i, name: blocks[1].name, kind, teacherForced: own, freeRunning: free });
    log.progress({
      stage: 'compare',
      done: i + 1,
      total: this.#models[0].blocks.length,
      detail: `${blocks[1].name}: own error ${own.update.toPrecision(3)}, stream ${free.output.toPrecision(3)}`,
      data: { block: blocks[1].name, layer: i, ownError: own.update, streamError: free.output, tokens: this.#tokens }, // prettier-ignore
    });
  }

  async #pairChunk(
    i: number,
    blocks: readonly [Block, Block],
    weights: readonly [Weights, Weights],
    c: number,
    chunk: Chunk,
    errors: { readonly teacherForced: LayerErrors; readonly freeRunning: LayerErrors },
  ): Promise<void> {
    const { device } = this.#env;
    using results = new Scope(device);
    const [x, own] = [this.#x[0][c]!, this.#x[1][c]!];
    const start = (side: 0 | 1, input: Tensor): Walk =>
      new Walk(results, this.#models[side], blocks[side], weights[side], input, chunk);
    const reference = start(0, x);
    const forced = start(1, x);
    const free = start(1, own);
    const downloads: Promise<void>[] = [];
    try {
      for (let call = 0; ; call++) {
        const [p, q, r] = [reference.toAttention(), forced.toAttention(), free.toAttention()];
        if (p && q && r) downloads.push(...this.#attention(i, call, results, p, q, r));
        if (!p && !q && !r) break;
        for (const walk of [reference, forced, free]) walk.pass();
      }
      const [y, yForced, yFree] = [reference.result, forced.result, free.result];
      const squares = [rowSquares(results, y), rowSquares(results, y, x), rowSquares(results, yForced, y), rowSquares(results, yFree, y)]; // prettier-ignore
      this.#put(0, c, y, reference.scope);
      this.#put(1, c, yFree, free.scope);
      const [output, update, byForced, byFree] = await Promise.all(squares.map((t) => t.float32()));
      errors.teacherForced.add(byForced!, output!, update!);
      errors.freeRunning.add(byFree!, output!, update!);
      await Promise.all(downloads);
      await this.#routes(i, blocks[1], reference, forced, free);
    } finally {
      await Promise.allSettled(downloads);
      for (const walk of [reference, forced, free]) walk.scope[Symbol.dispose]();
    }
  }

  /** Compares one attention call of the three passes; the numbers arrive later. */
  #attention(
    layer: number,
    call: number,
    scope: Scope,
    p: AttentionCall,
    q: AttentionCall,
    r: AttentionCall,
  ): Promise<void>[] {
    if (call > 0 || !sameGeometry(p, q)) {
      const reason = call > 0 ? 'only the first attention of a layer is compared' : 'the heads of the models differ';
      if (!this.#skipped.some((s) => s.reason === reason)) this.#skipped.push({ part: 'attention', reason });
      return [];
    }
    const add = async (maps: HeadMaps, other: AttentionCall): Promise<void> => {
      const { sums, queries } = compareHeads(scope, p, other);
      maps.add(layer, await sums.float32(), queries);
    };
    const pending = [add(this.#heads.teacherForced, q), add(this.#heads.freeRunning, r)];
    if (layer === 0 && this.#layer0) pending.push(this.#checkLayer0(this.#layer0.expected, scope, p, q));
    return pending;
  }

  async #checkLayer0(expected: boolean, scope: Scope, p: AttentionCall, q: AttentionCall): Promise<void> {
    const largest = largestDifference(scope, p, q);
    const values = largest ? await largest.float32() : [Infinity];
    const before = this.#layer0?.difference ?? 0;
    this.#layer0 = { expected, difference: Math.max(before, ...values) };
  }

  async #routes(layer: number, block: Block, reference: Walk, forced: Walk, free: Walk): Promise<void> {
    const experts = block.moe?.experts;
    if (experts === undefined) return;
    const [p, q, r] = await Promise.all([reference.choices(), forced.choices(), free.choices()]);
    if (q && r) this.#routing.add(layer, r, q, p);
  }

  /** Also within quantize and moe, whose own blocks are saved all the same. */
  #stopIfAborted(): void {
    stopIfAborted(this.#env, 'The same command begins it anew.', 'the comparison is not kept');
  }

  /** Block `i` of one model by itself, where the two have nothing to be compared layer by layer. */
  async #alone(side: 0 | 1, i: number): Promise<void> {
    this.#stopIfAborted();
    const model = this.#models[side];
    using resident = new Scope(this.#env.device);
    const weights = await this.#readers[side].block(i, resident);
    for (const [c, chunk] of this.#chunks.entries()) {
      using scope = new Scope(this.#env.device);
      const ctx = forwardContext(scope, model, weights, chunk.rows, chunk.length, { tokens: chunk.tokens });
      this.#put(side, c, run(model.blocks[i]!.forward(this.#x[side][c]!, ctx), ctx), scope);
      await this.#env.device.sync();
    }
    const stage = side === 0 ? 'reference' : 'candidate';
    const data = { block: model.blocks[i]!.name, tokens: this.#tokens };
    this.#env.log.progress({ stage, done: i + 1, total: model.blocks.length, data });
  }

  async #logits(): Promise<LogitsMeter> {
    const { device } = this.#env;
    using outer = new Scope(device);
    const weights = await this.#both((reader) => reader.outer(outer, 'head'));
    await this.#compareOuter(weights, (model, name) => name !== model.embedding);
    const meter = new LogitsMeter(this.#names);
    const vocab = Math.min(this.#models[0].vocab, this.#models[1].vocab);
    if (this.#models[0].vocab !== this.#models[1].vocab) {
      const reason = `the heads are ${this.#models[0].vocab} and ${this.#models[1].vocab} wide: only the first ${vocab} tokens are compared`;
      this.#skipped.push({ part: 'some logits', reason });
    }
    const budget = device.kind === 'cpu' ? 2 ** 26 : 2 ** 29;
    const step = Math.max(1, Math.floor(budget / (4 * Math.max(this.#models[0].vocab, this.#models[1].vocab))));
    for (const [c, { text, first, rows, length, tokens }] of this.#chunks.entries()) {
      this.#stopIfAborted();
      const targets = nextTokens(tokens, length);
      for (let from = 0; from < rows * length; from += step) {
        const to = Math.min(rows * length, from + step);
        using scope = new Scope(device);
        const [p, q] = ([0, 1] as const).map((side) => {
          const ctx = forwardContext(scope, this.#models[side], weights[side], 1, to - from);
          const all = run(this.#models[side].logits(this.#x[side][c]!.slice(0, from, to), ctx), ctx);
          return all.slice(1, 0, vocab);
        }) as [Tensor, Tensor];
        const part = targets.subarray(from, to);
        const positions = await comparePositions(scope, p, q, scope.from('i32', [to - from], part));
        meter.add(text, { window: first, position: from }, length, part, positions);
      }
    }
    return meter;
  }
}

/** What shapes layer 0's attention: everything in it but the feed-forward part and the norm before that. */
function attentionIsEqual(blocks: readonly [Block, Block], identical: ReadonlySet<string>): boolean {
  const ofFfn = (block: Block): Set<string> => {
    const linears = block.linears.flat().filter(({ role }) => role !== 'attention');
    return new Set(linears.flatMap(({ name }) => [`${name}.weight`, `${name}.bias`]));
  };
  const names = blocks.map((block) => {
    const ffn = ofFfn(block);
    return block.tensors
      .map(({ name }) => name)
      .filter((name) => !ffn.has(name) && !/\.(mlp|block_sparse_moe)\./.test(name))
      .filter((name) => !/o_proj|post_attention_layernorm/.test(name));
  });
  return names.flat().length > 0 && names.flat().every((name) => identical.has(name));
}
