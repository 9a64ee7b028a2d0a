import { badInput, badUsage } from '../base/errors.js';
import { dtypeSize } from '../base/dtype.js';
import { stopReading, type JobEnv } from '../backend/env.js';
import { run } from '../nn/run.js';
import { crossEntropy } from '../tensor/ops.js';
import { Scope, type Tensor } from '../tensor/tensor.js';
import { forwardContext } from './context.js';
import type { OpenModel } from './open.js';
import type { Block, Model } from './types.js';
import { WeightReader } from './weights.js';

export interface ScoreOptions {
  readonly dtype?: 'f32' | 'bf16';
  /** Longest sequence; default: the model's context. */
  readonly window?: number;
  /** Most bytes of hidden states at once; default: a quarter of the free memory. Longer texts take several passes. */
  readonly stateBytes?: number;
}

export interface Score {
  /** Natural log-probability of each token given those before it in its window; NaN for the first of each. */
  readonly logprobs: Float64Array;
  /** Tokens with a log-probability. */
  readonly scored: number;
  readonly meanLogprob: number;
  /** exp(-meanLogprob). */
  readonly perplexity: number;
  /** Length of the windows; the last one may be shorter. */
  readonly window: number;
}

/** Log-probabilities of one text's tokens, as `scoreAll` gives them. */
export async function score(
  open: OpenModel,
  env: JobEnv,
  tokens: Int32Array,
  options: ScoreOptions = {},
): Promise<Score> {
  return (await scoreAll(open, env, [tokens], options))[0]!;
}

/**
 * Log-probabilities of the tokens of texts. Up to the context a text is one sequence; a longer one is cut into windows of
 * the context's length that know nothing of each other, so that the first token of each has no log-probability.
 * The model passes through the device block by block: one block's weights are resident, and the hidden states of all
 * windows of all texts, as far as memory allows; each block is read once for as many.
 * Errors: fewer than two tokens, ids outside the vocabulary, log-probabilities that are not finite.
 */
export async function scoreAll(
  open: OpenModel,
  env: JobEnv,
  texts: readonly Int32Array[],
  options: ScoreOptions = {},
): Promise<Score[]> {
  const { model } = open;
  const window = Math.min(options.window ?? model.context, model.context);
  for (const tokens of texts) check(tokens, model, window);
  const results = texts.map((tokens) => new Float64Array(tokens.length));
  const batches = texts.flatMap((tokens, i) => cut(tokens, results[i]!, window, env));
  const passes = plan(open, env, batches, options);
  const reader = new WeightReader(open, env.device, options.dtype ?? 'f32');
  const total = passes.length * (model.blocks.length + 1);
  for (const [p, batches] of passes.entries()) {
    using held = new Scope(env.device);
    let states = await embed(reader, env, model, batches, held);
    for (const [i, block] of model.blocks.entries()) {
      stopReading(env);
      states = await advance(reader, env, model, block, batches, states, held);
      await env.device.sync();
      env.log.progress({ stage: 'score', done: p * (model.blocks.length + 1) + i + 1, total, data: { block: block.name } }); // prettier-ignore
    }
    await readLogprobs(reader, env, model, batches, states);
    const through = batches.reduce((sum, { tokens }) => sum + tokens.length, 0);
    env.log.progress({ stage: 'score', done: (p + 1) * (model.blocks.length + 1), total, data: { tokens: through } });
  }
  return results.map((logprobs) => summary(logprobs, window));
}

function summary(logprobs: Float64Array, window: number): Score {
  const scored = logprobs.length - Math.ceil(logprobs.length / window);
  let sum = 0;
  for (const value of logprobs) if (!Number.isNaN(value)) sum += value;
  const meanLogprob = sum / scored;
  return { logprobs, scored, meanLogprob, perplexity: Math.exp(-meanLogprob), window };
}

function check(tokens: Int32Array, model: Model, window: number): void {
  if (window < 2) throw badUsage('The window is too short to score anything', { got: String(window), expected: '2 or more' }); // prettier-ignore
  if (tokens.length < 2) {
    throw badInput('The text is too short to score', { got: `${tokens.length} tokens`, expected: 'two or more' });
  }
  const odd = tokens.find((id) => id < 0 || id >= model.vocab);
  if (odd !== undefined) {
    throw badInput('The text has a token that the model does not know', {
      got: `token ${odd}`,
      expected: `0 to ${model.vocab - 1}`,
      hint: 'The tokenizer belongs to another model.',
    });
  }
}

/** Windows of one text and one length that run together. */
interface Batch {
  /** Where they begin in their text. */
  readonly from: number;
  readonly rows: number;
  readonly length: number;
  /** [rows, length] */
  readonly tokens: Int32Array;
  /** Their part of the result. */
  readonly logprobs: Float64Array;
}

function cut(tokens: Int32Array, logprobs: Float64Array, window: number, { device }: JobEnv): Batch[] {
  const perBatch = Math.max(1, Math.floor((device.kind === 'cpu' ? 4096 : 16384) / window));
  const full = Math.floor(tokens.length / window);
  const batch = (from: number, rows: number, length: number): Batch => {
    const end = from + rows * length;
    return { from, rows, length, tokens: tokens.subarray(from, end), logprobs: logprobs.subarray(from, end) };
  };
  const batches: Batch[] = [];
  for (let w = 0; w < full; w += perBatch) batches.push(batch(w * window, Math.min(perBatch, full - w), window));
  const rest = tokens.length % window;
  if (rest > 0) batches.push(batch(full * window, 1, rest));
  return batches;
}

/** Batches whose states are held at once. */
function plan(open: OpenModel, env: JobEnv, all: readonly Batch[], options: ScoreOptions): Batch[][] {
  const budget = options.stateBytes ?? env.device.available() / 4;
  const bytes = ({ tokens }: Batch) => tokens.length * open.model.stateWidth * dtypeSize(options.dtype ?? 'f32');
  const passes: Batch[][] = [];
  let used = Infinity;
  for (const batch of all) {
    if (used + bytes(batch) > budget) {
      passes.push([]);
      used = 0;
    }
    passes.at(-1)!.push(batch);
    used += bytes(batch);
  }
  return passes;
}

async function embed(
  reader: WeightReader,
  { device }: JobEnv,
  model: Model,
  batches: readonly Batch[],
  held: Scope,
): Promise<Tensor[]> {
  using scope = new Scope(device);
  const weights = await reader.outer(scope, 'embedding');
  return batches.map(({ rows, length, tokens }) => {
    using inner = new Scope(device);
    const ids = inner.from('i32', [rows, length], tokens);
    return inner.move(model.embed(ids, forwardContext(inner, model, weights, rows, length)), held);
  });
}

async function advance(
  reader: WeightReader,
  { device }: JobEnv,
  model: Model,
  block: Block,
  batches: readonly Batch[],
  states: readonly Tensor[],
  held: Scope,
): Promise<Tensor[]> {
  using scope = new Scope(device);
  const weights = await reader.block(model.blocks.indexOf(block), scope);
  return batches.map(({ rows, length, tokens }, b) => {
    using inner = new Scope(device);
    const ctx = forwardContext(inner, model, weights, rows, length, { tokens });
    const next = inner.move(run(block.forward(states[b]!, ctx), ctx), held);
    held.free(states[b]!);
    return next;
  });
}

/** Rows of logits at once: about 64 MB on the CPU, 1 GB on a GPU. */
const logitRows = (vocab: number, kind: string): number =>
  Math.max(8, Math.floor((kind === 'cpu' ? 2 ** 24 : 2 ** 28) / vocab));

async function readLogprobs(
  reader: WeightReader,
  { device }: JobEnv,
  model: Model,
  batches: readonly Batch[],
  states: readonly Tensor[],
): Promise<void> {
  using scope = new Scope(device);
  const weights = await reader.outer(scope, 'head');
  const chunk = logitRows(model.vocab, device.kind);
  for (const [b, { from, length, tokens, logprobs }] of batches.entries()) {
    const count = tokens.length;
    const targets = new Int32Array(count);
    for (let t = 0; t < count; t++) targets[t] = (t + 1) % length === 0 ? -1 : tokens[t + 1]!;
    for (let t = 0; t < count; t += chunk) {
      using inner = new Scope(device);
      const end = Math.min(t + chunk, count);
      const ctx = forwardContext(inner, model, weights, 1, end - t);
      const logits = run(model.logits(states[b]!.slice(0, t, end), ctx), ctx);
      const loss = crossEntropy(inner, logits, inner.from('i32', [end - t], targets.subarray(t, end)));
      const values = await loss.float32();
      values.forEach((value, i) => {
        if (targets[t + i]! >= 0) logprobs[t + i + 1] = finite(-value, from + t + i + 1);
      });
    }
    for (let t = 0; t < count; t += length) logprobs[t] = Number.NaN;
  }
}

function finite(logprob: number, at: number): number {
  if (Number.isFinite(logprob)) return logprob;
  throw badInput('The model gives a probability that is no number', {
    where: `token ${at}`,
    got: String(logprob),
    hint: 'Hidden states overflowed: the checkpoint is damaged, or belongs to another config.',
  });
}
